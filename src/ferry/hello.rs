//! What two ends say of themselves before anything else, and how they refuse each other.

use std::fmt;

use crate::limits::{FERRY_STREAMS_MAX, FERRY_TEXT_BYTES_MAX};
use crate::units::PageSize;

use super::fields::{Fields, PutFields};
use super::frame::{FrameError, Kind, OpenFrame};
use super::hash::HashKey;

/// The version of the stream that is spoken here.
pub const VERSION: u16 = 1;

/// The `attempt` of a HELLO that only looks who is there: the connections of a session are dialled from 1 on. An
/// older build refuses such a connection as superseded, without an end of its own.
pub const LOOK_ATTEMPT: u32 = 0;

/// Names a session: 128 random bits, chosen by the connecting side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u128::from_be_bytes(self.0) >> 96)
    }
}

/// What one end of a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Role {
    /// Has pages and sends them.
    Sender = 1,
    /// Wants pages.
    Receiver = 2,
    /// Asks for the pages that threads wait for.
    Requester = 3,
    /// Answers a requester.
    Responder = 4,
}

impl Role {
    /// The role at the other end of the connection.
    pub const fn opposite(self) -> Role {
        match self {
            Role::Sender => Role::Receiver,
            Role::Receiver => Role::Sender,
            Role::Requester => Role::Responder,
            Role::Responder => Role::Requester,
        }
    }

    fn from_number(number: u16) -> Option<Role> {
        [
            Role::Sender,
            Role::Receiver,
            Role::Requester,
            Role::Responder,
        ]
        .into_iter()
        .find(|role| *role as u16 == number)
    }
}

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(u64);

impl Features {
    /// A receiver answers questions for hashes.
    pub const HASHES: Features = Features(1);
    /// Pages may be sent as the difference to the base version.
    pub const DELTA: Features = Features(2);
    /// Faults are answered on connections of their own.
    pub const FAULTS: Features = Features(4);
    /// A receiver that wants nothing but the answers to its faults: nothing is pushed.
    pub const ON_DEMAND: Features = Features(8);
    /// A receiver confirms BYE.
    pub const CONFIRMS_BYE: Features = Features(16);
    /// A requester understands that a page is in the push, and waits for it there.
    pub const IN_PUSH: Features = Features(32);
    /// A page may be named as that of another target of the session.
    pub const SHARED: Features = Features(64);
    /// The sender knows what an earlier round has left at the receiver: the key in its hello is that of both sides' hashes, and
    /// it does not ask for the receiver's.
    pub const KNOWN: Features = Features(128);
    /// All that is known here.
    pub const ALL: Features = Features(255);

    /// What both sets have.
    #[must_use]
    pub const fn common(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// Whether all of `other` are in the set.
    pub const fn has(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }
}

/// How much may be on its way without an acknowledgement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// Frames.
    pub frames: u32,
    /// Bytes of frames.
    pub bytes: u64,
}

/// The body of HELLO and WELCOME.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Version of the stream.
    pub version: u16,
    /// What the side is that sends this.
    pub role: Role,
    /// Its page size.
    pub page: PageSize,
    /// What it can do.
    pub features: Features,
    /// The session that the connection belongs to.
    pub session: SessionId,
    /// Which of the session's connections this is.
    pub stream: u16,
    /// How many connections the session has at most.
    pub streams: u16,
    /// How often this stream was dialled.
    pub attempt: u32,
    /// Whether the connection may begin a session.
    pub opening: bool,
    /// Receiver: how much it can hold.
    pub window: Window,
    /// Receiver: the key of its hashes. A sender with [`Features::KNOWN`]: the key of those that it knows.
    pub hash_key: HashKey,
}

/// What the first fields of a hello say when the rest need not be understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Greeting {
    /// A hello of this version.
    Hello(Hello),
    /// A hello of a version that is not spoken here.
    OtherVersion(u16),
}

impl Hello {
    /// What a listening side says of itself, whoever connects: a session's own fields are filled in when it is welcomed.
    pub fn of_listener(role: Role, page: PageSize, features: Features, window: Window) -> Hello {
        Hello {
            version: VERSION,
            role,
            page,
            features,
            session: SessionId::default(),
            stream: 0,
            streams: FERRY_STREAMS_MAX,
            attempt: 0,
            opening: false,
            window,
            hash_key: HashKey::default(),
        }
    }

    /// Appends the frame that says it. `kind` is HELLO or WELCOME.
    pub fn encode(&self, kind: Kind, out: &mut Vec<u8>) {
        let frame = OpenFrame::begin(out);
        out.put_u16(self.version);
        out.put_u16(self.role as u16);
        out.put_u32(u32::try_from(self.page.bytes()).expect("pages are small"));
        out.put_u64(self.features.0);
        out.extend_from_slice(&self.session.0);
        out.put_u16(self.stream);
        out.put_u16(self.streams);
        out.put_u32(self.attempt);
        out.put_u16(u16::from(self.opening));
        out.put_u16(0);
        out.put_u32(self.window.frames);
        out.put_u64(self.window.bytes);
        out.extend_from_slice(&self.hash_key.0);
        frame.finish(out, kind, 0);
    }

    /// Reads a body of HELLO or WELCOME.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Greeting, FrameError> {
        let wrong = |field, value| FrameError::Field { kind, field, value };
        let mut fields = Fields::new(kind, body);
        let version = fields.u16()?;
        if version != VERSION {
            return Ok(Greeting::OtherVersion(version));
        }
        let role = fields.u16()?;
        let role = Role::from_number(role).ok_or(wrong("role", role.into()))?;
        let page = u64::from(fields.u32()?);
        let page = PageSize::new(page).ok_or(wrong("page size", page))?;
        let features = Features(fields.u64()?);
        let session = SessionId(fields.array()?);
        let (stream, streams) = (fields.u16()?, fields.u16()?);
        if stream >= FERRY_STREAMS_MAX || stream >= streams {
            return Err(wrong("stream", stream.into()));
        }
        let attempt = fields.u32()?;
        let opening = fields.u16()? == 1;
        let _reserved = fields.u16()?;
        let window = Window {
            frames: fields.u32()?,
            bytes: fields.u64()?,
        };
        let hash_key = HashKey(fields.array()?);
        // What a later version appends is ignored.
        Ok(Greeting::Hello(Hello {
            version,
            role,
            page,
            features,
            session,
            stream,
            streams,
            attempt,
            opening,
            window,
            hash_key,
        }))
    }
}

/// Why a session or connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum FailCode {
    /// The version of the stream is not spoken here.
    Version = 1,
    /// The page sizes differ.
    PageSize = 2,
    /// The roles do not fit together.
    Role = 3,
    /// The session is not known: it was given up, or the process was started anew.
    UnknownSession = 4,
    /// The receiver failed.
    Receiver = 5,
    /// The sender failed.
    Sender = 6,
    /// The peer broke the protocol.
    Protocol = 7,
    /// The base versions at the two ends differ.
    Disagreement = 8,
    /// A newer connection has replaced this one. The session goes on.
    Superseded = 9,
    /// No further session is accepted.
    Busy = 10,
}

impl FailCode {
    fn from_number(number: u16) -> Option<FailCode> {
        use FailCode::{
            Busy, Disagreement, PageSize, Protocol, Receiver, Role, Sender, Superseded,
            UnknownSession, Version,
        };
        [
            Version,
            PageSize,
            Role,
            UnknownSession,
            Receiver,
            Sender,
            Protocol,
            Disagreement,
            Superseded,
            Busy,
        ]
        .into_iter()
        .find(|code| *code as u16 == number)
    }
}

/// The body of FAIL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fail {
    /// Why.
    pub code: FailCode,
    /// What happened, for a log.
    pub text: String,
}

impl Fail {
    /// A failure, told in words.
    pub fn new(code: FailCode, text: impl Into<String>) -> Fail {
        Fail {
            code,
            text: text.into(),
        }
    }

    /// Appends the frame that says it. The text is cut at its cap.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let frame = OpenFrame::begin(out);
        out.put_u16(self.code as u16);
        out.put_u16(0);
        let most = self.text.len().min(FERRY_TEXT_BYTES_MAX);
        let mut cuts = (0..=most).rev();
        let cut = cuts.find(|at| self.text.is_char_boundary(*at)).unwrap_or(0);
        out.extend_from_slice(&self.text.as_bytes()[..cut]);
        frame.finish(out, Kind::Fail, 0);
    }

    /// Reads a body of FAIL.
    pub fn decode(body: &[u8]) -> Result<Fail, FrameError> {
        let kind = Kind::Fail;
        let mut fields = Fields::new(kind, body);
        let number = fields.u16()?;
        let code = FailCode::from_number(number).ok_or(FrameError::Field {
            kind,
            field: "code",
            value: number.into(),
        })?;
        let _reserved = fields.u16()?;
        let text = String::from_utf8_lossy(fields.rest()).into_owned();
        Ok(Fail { code, text })
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fail {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ferry::frame::{Split, split};

    fn hello() -> Hello {
        Hello {
            version: VERSION,
            role: Role::Sender,
            page: PageSize::KIB_4,
            features: Features::ALL,
            session: SessionId([5; 16]),
            stream: 2,
            streams: 4,
            attempt: 9,
            opening: true,
            window: Window {
                frames: 100,
                bytes: 1 << 20,
            },
            hash_key: HashKey([7; 16]),
        }
    }

    fn body(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut frame = Vec::new();
        write(&mut frame);
        match split(&frame) {
            Ok(Split::Frame(found)) => frame[found.body].to_vec(),
            other => panic!("no frame: {other:?}"),
        }
    }

    #[test]
    fn a_hello_comes_back_as_it_was_and_may_grow() {
        let mut bytes = body(|out| hello().encode(Kind::Hello, out));
        for cut in 0..bytes.len() {
            assert!(
                Hello::decode(Kind::Hello, &bytes[..cut]).is_err(),
                "cut at {cut}"
            );
        }
        for _later_field in 0..3 {
            let read = Hello::decode(Kind::Hello, &bytes);
            assert_eq!(read, Ok(Greeting::Hello(hello())));
            bytes.push(0xee);
        }
    }

    #[test]
    fn another_version_is_known_before_the_rest_is_read() {
        assert_eq!(
            Hello::decode(Kind::Hello, &[2, 0, 0xff]),
            Ok(Greeting::OtherVersion(2))
        );
    }

    #[test]
    fn fields_out_of_range_are_refused() {
        let bytes = body(|out| hello().encode(Kind::Hello, out));
        for (at, value, name) in [(2, 5, "role"), (4, 1, "page size"), (32, 4, "stream")] {
            let mut changed = bytes.clone();
            changed[at] = value;
            match Hello::decode(Kind::Hello, &changed) {
                Err(FrameError::Field { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn unknown_features_are_ignored() {
        let newer = Features(u64::MAX);
        assert_eq!(newer.common(Features::ALL), Features::ALL);
        assert!(newer.has(Features::DELTA));
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let fail = Fail::new(FailCode::Receiver, "ä".repeat(FERRY_TEXT_BYTES_MAX));
        let read = Fail::decode(&body(|out| fail.encode(out))).expect("well-formed");
        assert_eq!(read.code, FailCode::Receiver);
        assert_eq!(read.text, "ä".repeat(FERRY_TEXT_BYTES_MAX / 2));
    }
}
