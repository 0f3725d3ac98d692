//! The frame around CRIU's image files: two magic words, then messages with their lengths.
//!
//! ```text
//! 0          4          8        12
//! | common   | kind     | length | message ... | length | message ... |
//! ```

use std::fmt;
use std::io::{ErrorKind, Read, Write};

use prost::Message;
use thiserror::Error;

use crate::limits::IMAGE_MESSAGE_BYTES_MAX;

/// First word of every image file but the inventory's and the pages files.
pub const COMMON_MAGIC: u32 = 0x5456_4319;

/// Which image a file is: its second word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Magic {
    /// `pagemap-*.img` and `pagemap-shmem-*.img`.
    Pagemap,
    /// `mm-*.img`.
    Mm,
    /// `pstree.img`.
    Pstree,
    /// `core-*.img`.
    Core,
    /// `memfd.img`.
    Memfd,
    /// `inventory.img`, which has no common first word.
    Inventory,
}

impl fmt::Display for Magic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Magic::Pagemap => "pagemap",
            Magic::Mm => "mm",
            Magic::Pstree => "pstree",
            Magic::Core => "core",
            Magic::Memfd => "memfd",
            Magic::Inventory => "inventory",
        })
    }
}

impl Magic {
    const fn word(self) -> u32 {
        match self {
            Magic::Pagemap => 0x5608_4025,
            Magic::Mm => 0x5749_2820,
            Magic::Pstree => 0x5027_3030,
            Magic::Core => 0x5505_3847,
            Magic::Memfd => 0x4845_3499,
            Magic::Inventory => 0x5831_3116,
        }
    }

    /// How many words stand before the messages.
    const fn words(self) -> usize {
        match self {
            Magic::Inventory => 1,
            _ => 2,
        }
    }
}

/// Why an image file cannot be read. The caller adds the file's name.
#[derive(Debug, Error)]
pub enum FileError {
    /// The first words are not those of this kind of image.
    #[error(
        "not a {expected} image: it begins with {found:08x?} (is this an image directory of CRIU?)"
    )]
    Magic {
        /// What was to be read.
        expected: Magic,
        /// The words where those of the magic should be.
        found: Vec<u32>,
    },
    /// The file ends inside a message.
    #[error("the file ends inside message {0}: it is cut short")]
    Truncated(usize),
    /// A message is longer than any that CRIU writes.
    #[error("message {index} claims {bytes} bytes, more than {IMAGE_MESSAGE_BYTES_MAX}")]
    TooLong {
        /// The message's number, from 0.
        index: usize,
        /// Its claimed length.
        bytes: u32,
    },
    /// A message is not valid protobuf.
    #[error("message {index} is damaged: {source}")]
    Message {
        /// The message's number, from 0.
        index: usize,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Reads the messages of one image file, one after the other.
pub struct MessageReader<R> {
    input: R,
    index: usize,
    buffer: Vec<u8>,
}

impl<R: Read> MessageReader<R> {
    /// Checks the magic words of `input` (buffered by the caller).
    pub fn new(mut input: R, expected: Magic) -> Result<MessageReader<R>, FileError> {
        let mut found = Vec::new();
        for _ in 0..expected.words() {
            let mut word = [0; 4];
            read_all(&mut input, &mut word).map_err(|error| cut_short(error, 0))?;
            found.push(u32::from_le_bytes(word));
        }
        let common = [COMMON_MAGIC, expected.word()];
        if found != common[2 - expected.words()..] {
            return Err(FileError::Magic { expected, found });
        }
        Ok(MessageReader {
            input,
            index: 0,
            buffer: Vec::new(),
        })
    }

    /// The next message, or `None` at the end of the file.
    pub fn read<M: Message + Default>(&mut self) -> Result<Option<M>, FileError> {
        let index = self.index;
        let mut length = [0; 4];
        match read_all(&mut self.input, &mut length) {
            Ok(()) => {}
            Err(ReadError::Ended { read: 0 }) => return Ok(None),
            Err(error) => return Err(cut_short(error, index)),
        }
        let bytes = u32::from_le_bytes(length);
        if bytes > IMAGE_MESSAGE_BYTES_MAX {
            return Err(FileError::TooLong { index, bytes });
        }
        // Grows with what is really there: a cut file cannot make us allocate what it claims.
        self.buffer.clear();
        let got = self
            .input
            .by_ref()
            .take(u64::from(bytes))
            .read_to_end(&mut self.buffer)?;
        if got as u64 != u64::from(bytes) {
            return Err(FileError::Truncated(index));
        }
        self.index += 1;
        M::decode(self.buffer.as_slice())
            .map(Some)
            .map_err(|source| FileError::Message { index, source })
    }
}

/// Writes an image file: the magic words first, then messages.
#[derive(Debug)]
pub struct MessageWriter<W> {
    output: W,
    buffer: Vec<u8>,
}

impl<W: Write> MessageWriter<W> {
    /// Writes the magic words of `kind` to `output` (buffered by the caller).
    pub fn new(mut output: W, kind: Magic) -> std::io::Result<MessageWriter<W>> {
        if kind.words() == 2 {
            output.write_all(&COMMON_MAGIC.to_le_bytes())?;
        }
        output.write_all(&kind.word().to_le_bytes())?;
        Ok(MessageWriter {
            output,
            buffer: Vec::new(),
        })
    }

    /// Appends a message.
    pub fn write<M: Message>(&mut self, message: &M) -> std::io::Result<()> {
        self.buffer.clear();
        message
            .encode(&mut self.buffer)
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        let length = u32::try_from(self.buffer.len())
            .ok()
            .filter(|length| *length <= IMAGE_MESSAGE_BYTES_MAX)
            .ok_or_else(|| std::io::Error::other("a message longer than an image file may hold"))?;
        self.output.write_all(&length.to_le_bytes())?;
        self.output.write_all(&self.buffer)
    }

    /// Hands the output back, to flush and sync it.
    pub fn into_inner(self) -> W {
        self.output
    }
}

enum ReadError {
    Ended { read: usize },
    Io(std::io::Error),
}

fn read_all(input: &mut impl Read, out: &mut [u8]) -> Result<(), ReadError> {
    let mut read = 0;
    while read < out.len() {
        match input.read(&mut out[read..]) {
            Ok(0) => return Err(ReadError::Ended { read }),
            Ok(n) => read += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Io(error)),
        }
    }
    Ok(())
}

fn cut_short(error: ReadError, index: usize) -> FileError {
    match error {
        ReadError::Ended { .. } => FileError::Truncated(index),
        ReadError::Io(error) => FileError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::proto::PagemapHead;

    fn sample() -> Vec<u8> {
        let mut writer = MessageWriter::new(Vec::new(), Magic::Pagemap).unwrap();
        for pages_id in [1, 70_000] {
            writer.write(&PagemapHead { pages_id }).unwrap();
        }
        writer.into_inner()
    }

    #[test]
    fn messages_come_back() {
        let file = sample();
        let mut reader = MessageReader::new(file.as_slice(), Magic::Pagemap).unwrap();
        for pages_id in [1, 70_000] {
            assert_eq!(reader.read().unwrap(), Some(PagemapHead { pages_id }));
        }
        assert_eq!(reader.read::<PagemapHead>().unwrap(), None);
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_or_ends_between_messages() {
        let file = sample();
        let ends_of_messages = [8, 8 + 4 + 2, file.len()];
        for cut in 0..=file.len() {
            let read = MessageReader::new(&file[..cut], Magic::Pagemap).and_then(|mut reader| {
                while reader.read::<PagemapHead>()?.is_some() {}
                Ok(())
            });
            assert_eq!(
                read.is_ok(),
                ends_of_messages.contains(&cut),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn another_kind_and_a_monstrous_length_are_refused() {
        let mut file = sample();
        assert!(matches!(
            MessageReader::new(file.as_slice(), Magic::Mm),
            Err(FileError::Magic { .. })
        ));
        file[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut reader = MessageReader::new(file.as_slice(), Magic::Pagemap).unwrap();
        assert!(matches!(
            reader.read::<PagemapHead>(),
            Err(FileError::TooLong { .. })
        ));
    }
}
