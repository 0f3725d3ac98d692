//! Messages of CRIU's remote procedure calls as rows of fields, to change some and leave all others as
//! they are: also those of a newer CRIU that [`super::rpc`] does not know.

use prost::encoding::{WireType, decode_varint, encode_varint};
use thiserror::Error;

use crate::limits::RPC_MESSAGE_BYTES_MAX;

/// Bits of a key below the number of the field.
const TYPE_BITS: u32 = 3;

/// Numbers of the fields of a request.
pub mod request {
    /// See [`super::super::rpc::kind`].
    pub const KIND: u32 = 1;
    /// A message, see [`super::options`].
    pub const OPTIONS: u32 = 2;
    /// Of an answer to a notification: whether the work goes on.
    pub const NOTIFY_SUCCESS: u32 = 3;
    /// A message with the features that are asked for.
    pub const FEATURES: u32 = 5;
}

/// Numbers of the fields of an answer.
pub mod response {
    /// See [`super::super::rpc::kind`].
    pub const KIND: u32 = 1;
    /// Whether it was done.
    pub const SUCCESS: u32 = 2;
    /// What a dump says of itself.
    pub const DUMP: u32 = 3;
    /// A message that tells a stage of the work: see [`STAGE`].
    pub const NOTIFY: u32 = 5;
    /// Name of the stage, in the message [`NOTIFY`]: `post-restore`, `post-resume`, ...
    pub const STAGE: u32 = 1;
    /// A message with the features that were asked for.
    pub const FEATURES: u32 = 8;
}

/// Number of the dirty tracking in a message of features.
pub const FEATURE_MEM_TRACK: u32 = 1;

/// Numbers of the fields of a request's options, of those that are changed.
pub mod options {
    #![allow(missing_docs, reason = "they are named as in CRIU's descriptors")]
    pub const IMAGES_DIR_FD: u32 = 1;
    pub const PID: u32 = 2;
    pub const LEAVE_RUNNING: u32 = 3;
    pub const EXT_UNIX_SK: u32 = 4;
    pub const TCP_ESTABLISHED: u32 = 5;
    pub const EVASIVE_DEVICES: u32 = 6;
    pub const SHELL_JOB: u32 = 7;
    pub const FILE_LOCKS: u32 = 8;
    pub const LOG_LEVEL: u32 = 9;
    pub const PAGE_SERVER: u32 = 11;
    pub const NOTIFY_SCRIPTS: u32 = 12;
    pub const PARENT_IMG: u32 = 14;
    pub const TRACK_MEM: u32 = 15;
    pub const WORK_DIR_FD: u32 = 17;
    pub const LINK_REMAP: u32 = 18;
    pub const RST_SIBLING: u32 = 26;
    pub const INHERIT_FD: u32 = 27;
    pub const AUTO_EXT_MNT: u32 = 28;
    pub const EXT_SHARING: u32 = 29;
    pub const EXT_MASTERS: u32 = 30;
    pub const GHOST_LIMIT: u32 = 35;
    pub const EXTERNAL: u32 = 37;
    pub const LAZY_PAGES: u32 = 48;
    pub const IMAGES_DIR: u32 = 68;
    pub const STATUS_FD: u32 = 49;
    pub const TCP_CLOSE: u32 = 52;
    pub const PRE_DUMP_MODE: u32 = 61;
    pub const PIDFD_STORE_SK: u32 = 62;
    pub const NETWORK_LOCK: u32 = 64;
    pub const LEAVE_STOPPED: u32 = 69;
    /// The address in the message [`PAGE_SERVER`].
    pub const PAGE_SERVER_ADDRESS: u32 = 1;
    /// The port in the message [`PAGE_SERVER`].
    pub const PAGE_SERVER_PORT: u32 = 2;
    /// The descriptor in the message [`PAGE_SERVER`].
    pub const PAGE_SERVER_FD: u32 = 4;
    /// The resource in a message [`INHERIT_FD`], as CRIU names it.
    pub const INHERIT_FD_KEY: u32 = 1;
    /// The descriptor in a message [`INHERIT_FD`].
    pub const INHERIT_FD_NUMBER: u32 = 2;
    /// A value of [`NETWORK_LOCK`]: none.
    pub const NETWORK_LOCK_SKIP: u64 = 3;
}

/// Bytes that are no message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("a message of CRIU's remote procedure calls is damaged")]
pub struct Damaged;

/// The value of a field.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// A number or a truth value. Negative ones are as large as 64 bits allow.
    Number(u64),
    /// A text, bytes or a message.
    Bytes(Vec<u8>),
    /// Four or eight bytes.
    Fixed(Vec<u8>),
}

/// A message.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Fields(Vec<(u32, Value)>);

impl Fields {
    /// Reads a message.
    ///
    /// # Errors
    ///
    /// It is damaged, or longer than [`RPC_MESSAGE_BYTES_MAX`].
    pub fn decode(mut bytes: &[u8]) -> Result<Fields, Damaged> {
        if bytes.len() > RPC_MESSAGE_BYTES_MAX {
            return Err(Damaged);
        }
        let mut fields = Vec::new();
        let take = |bytes: &mut &[u8], count: usize| {
            let (taken, rest) = bytes.split_at_checked(count).ok_or(Damaged)?;
            *bytes = rest;
            Ok(taken.to_vec())
        };
        while !bytes.is_empty() {
            let key = decode_varint(&mut bytes).map_err(|_| Damaged)?;
            let number = u32::try_from(key >> TYPE_BITS).map_err(|_| Damaged)?;
            let value = match WireType::try_from(key & 7).map_err(|_| Damaged)? {
                WireType::Varint => Value::Number(decode_varint(&mut bytes).map_err(|_| Damaged)?),
                WireType::LengthDelimited => {
                    let length = decode_varint(&mut bytes).map_err(|_| Damaged)?;
                    let length = usize::try_from(length).map_err(|_| Damaged)?;
                    Value::Bytes(take(&mut bytes, length)?)
                }
                WireType::SixtyFourBit => Value::Fixed(take(&mut bytes, 8)?),
                WireType::ThirtyTwoBit => Value::Fixed(take(&mut bytes, 4)?),
                WireType::StartGroup | WireType::EndGroup => return Err(Damaged),
            };
            if number == 0 {
                return Err(Damaged);
            }
            fields.push((number, value));
        }
        Ok(Fields(fields))
    }

    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, value) in &self.0 {
            let kind = match value {
                Value::Number(_) => WireType::Varint,
                Value::Bytes(_) => WireType::LengthDelimited,
                Value::Fixed(fixed) if fixed.len() == 8 => WireType::SixtyFourBit,
                Value::Fixed(_) => WireType::ThirtyTwoBit,
            };
            encode_varint(u64::from(*number) << TYPE_BITS | kind as u64, &mut bytes);
            match value {
                Value::Number(number) => encode_varint(*number, &mut bytes),
                Value::Bytes(value) => {
                    encode_varint(value.len() as u64, &mut bytes);
                    bytes.extend(value);
                }
                Value::Fixed(value) => bytes.extend(value),
            }
        }
        bytes
    }

    /// The last value of field `number`, which is the one that counts.
    pub fn get(&self, number: u32) -> Option<&Value> {
        self.0
            .iter()
            .rev()
            .find(|(other, _)| *other == number)
            .map(|(_, value)| value)
    }

    /// The number in field `number`.
    pub fn number(&self, number: u32) -> Option<u64> {
        match self.get(number)? {
            Value::Number(value) => Some(*value),
            _ => None,
        }
    }

    /// The number in field `number` as C's `int`, as which descriptors and pids are sent.
    pub fn int(&self, number: u32) -> Option<i32> {
        let value = self.number(number)?.cast_signed();
        i32::try_from(value).ok()
    }

    /// Whether field `number` says yes.
    pub fn is_on(&self, number: u32) -> bool {
        self.number(number).is_some_and(|value| value != 0)
    }

    /// The bytes in field `number`.
    pub fn bytes(&self, number: u32) -> Option<&[u8]> {
        match self.get(number)? {
            Value::Bytes(value) => Some(value),
            _ => None,
        }
    }

    /// The message in field `number`: an empty one if it is missing.
    ///
    /// # Errors
    ///
    /// It is damaged.
    pub fn message(&self, number: u32) -> Result<Fields, Damaged> {
        self.bytes(number)
            .map_or(Ok(Fields::default()), Fields::decode)
    }

    /// All messages in field `number`, of which there may be several.
    ///
    /// # Errors
    ///
    /// One is damaged.
    pub fn messages(&self, number: u32) -> Result<Vec<Fields>, Damaged> {
        let found = self.0.iter().filter(|(other, _)| *other == number);
        found
            .map(|(_, value)| match value {
                Value::Bytes(bytes) => Fields::decode(bytes),
                _ => Err(Damaged),
            })
            .collect()
    }

    /// Adds a text to those of field `number`.
    pub fn add_text(&mut self, number: u32, text: &str) {
        self.0.push((number, Value::Bytes(text.into())));
    }

    /// Adds a message to those of field `number`.
    pub fn add_message(&mut self, number: u32, message: &Fields) {
        self.0.push((number, Value::Bytes(message.encode())));
    }

    /// Takes field `number` out.
    pub fn remove(&mut self, number: u32) {
        self.0.retain(|(other, _)| *other != number);
    }

    /// Puts a number in the place of field `number`.
    pub fn set(&mut self, number: u32, value: u64) {
        self.remove(number);
        self.0.push((number, Value::Number(value)));
    }

    /// Puts a text in the place of field `number`.
    pub fn set_text(&mut self, number: u32, text: &str) {
        self.remove(number);
        self.0.push((number, Value::Bytes(text.into())));
    }

    /// Puts a message in the place of field `number`.
    pub fn set_message(&mut self, number: u32, message: &Fields) {
        self.remove(number);
        self.0.push((number, Value::Bytes(message.encode())));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::criu::rpc::{Options, Request, kind};

    #[test]
    fn fields_are_changed_and_others_stay() {
        let request = Request {
            kind: kind::PAGE_SERVER,
            keep_open: Some(true),
            options: Some(Options {
                images_dir_fd: -1,
                parent_img: Some("../1".to_owned()),
                log_level: Some(4),
                ..Options::default()
            }),
            ..Request::default()
        };
        let mut fields = Fields::decode(&request.encode_to_vec()).unwrap();
        let mut changed = fields.message(request::OPTIONS).unwrap();
        assert_eq!(changed.int(options::IMAGES_DIR_FD), Some(-1));
        assert_eq!(changed.bytes(options::PARENT_IMG), Some(&b"../1"[..]));
        changed.remove(options::PARENT_IMG);
        changed.set(options::IMAGES_DIR_FD, 7);
        fields.set_message(request::OPTIONS, &changed);
        let back = Request::decode(&*fields.encode()).unwrap();
        let wanted = Options {
            images_dir_fd: 7,
            parent_img: None,
            ..request.options.clone().unwrap()
        };
        assert_eq!(
            back,
            Request {
                options: Some(wanted),
                ..request
            }
        );
    }

    #[test]
    fn the_last_of_repeated_fields_counts() {
        let fields = Fields::decode(&[8, 1, 8, 2]).unwrap();
        assert_eq!(fields.number(1), Some(2));
        assert!(fields.is_on(1) && !fields.is_on(2));
    }

    #[test]
    fn messages_of_one_field_are_all_there() {
        let mut fields = Fields::default();
        for number in [1, 2] {
            let mut message = Fields::default();
            message.set(options::INHERIT_FD_NUMBER, number);
            fields.add_message(options::INHERIT_FD, &message);
        }
        fields.add_text(options::EXTERNAL, "file[1:2]");
        let fields = Fields::decode(&fields.encode()).unwrap();
        let numbers = fields.messages(options::INHERIT_FD).unwrap();
        let numbers: Vec<Option<i32>> = numbers
            .iter()
            .map(|message| message.int(options::INHERIT_FD_NUMBER))
            .collect();
        assert_eq!(numbers, [Some(1), Some(2)]);
        assert_eq!(fields.bytes(options::EXTERNAL), Some(&b"file[1:2]"[..]));
        assert_eq!(fields.messages(options::PARENT_IMG), Ok(Vec::new()));
    }

    #[test]
    fn damaged_messages_are_refused() {
        for bytes in [
            &[8][..],
            &[0, 1],
            &[10, 5, 1],
            &[11],
            &[14],
            &[13, 0],
            &[0xff; 20],
        ] {
            assert_eq!(Fields::decode(bytes), Err(Damaged), "{bytes:?}");
        }
        assert_eq!(
            Fields::decode(&[0; RPC_MESSAGE_BYTES_MAX + 1]),
            Err(Damaged)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(fields) = Fields::decode(&bytes) {
                prop_assert_eq!(Fields::decode(&fields.encode()).unwrap(), fields);
            }
        }
    }
}
