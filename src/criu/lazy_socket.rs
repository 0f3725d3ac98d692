//! The records that `criu restore --lazy-pages` writes to `lazy-pages.socket`.
//!
//! ```text
//! | i32 pid | byte 0 with a userfaultfd |     a process: the descriptor rides on the byte
//! | i32 -pid |                              a zombie: no byte, no descriptor
//! | u32 0x52535446 |                        the restore is finished; then the end of the stream
//! ```
//!
//! A record is read in exact steps, since the descriptor comes with its own byte: read
//! [`RECORD_BYTES`] first, then for a process one byte more.

/// Length of the first part of each record.
pub const RECORD_BYTES: usize = 4;

/// The message that the restore is finished.
const FINISHED: u32 = 0x5253_5446;

/// What the first part of a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// A process with this pid in the images; its userfaultfd comes next.
    Process(u32),
    /// A zombie with this pid: nothing follows.
    Zombie(u32),
    /// Every process runs: the background transfer may begin.
    Finished,
}

impl Record {
    /// Reads the first part of a record.
    pub fn decode(bytes: [u8; RECORD_BYTES]) -> Record {
        if u32::from_le_bytes(bytes) == FINISHED {
            return Record::Finished;
        }
        let pid = i32::from_le_bytes(bytes);
        if pid < 0 {
            Record::Zombie(pid.unsigned_abs())
        } else {
            Record::Process(pid.unsigned_abs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_told_apart() {
        assert_eq!(Record::decode(77_i32.to_le_bytes()), Record::Process(77));
        assert_eq!(Record::decode((-77_i32).to_le_bytes()), Record::Zombie(77));
        assert_eq!(Record::decode(*b"FTSR"), Record::Finished);
    }
}
