//! The replayer's decision: whether the next entry may be carried out, and whether the answers agree.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use super::Entry;
use crate::limits::{REPLAY_CONNECTIONS_MAX, REPLAY_HEAD_BYTES_MAX};

/// What the next entry asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Connect, under this number.
    Connect(u32),
    /// Send the piece's bytes.
    Send(u32),
    /// End the sending half of the connection.
    Finish(u32),
    /// Wait until [`Player::wait_reason`] is `None`.
    Await,
    /// Wait as long as the recorder did.
    Pause,
    /// End all connections, and wait until the service has ended them too.
    EndAll,
    /// The file is over: its entries go on in the next one.
    NextFile,
    /// The recording is over: all connections are to be ended, then [`Player::close`] judges.
    Done,
}

/// Where a replay and its recording differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// The number of the entry, counted from 0 over all files of the log.
    pub entry: u64,
    /// The connection.
    pub connection: u32,
    /// What is different.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "connection {}, entry {}: {}",
            self.connection, self.entry, self.what
        )
    }
}

impl std::error::Error for Difference {}

/// What a replay waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WaitReason {
    /// Bytes of answers.
    Answers {
        /// On which connection.
        connection: u32,
        /// How many have come.
        has: u64,
        /// How many had come in the recording.
        wants: u64,
    },
    /// The end of a connection, which the service had ended in the recording.
    End {
        /// Which.
        connection: u32,
    },
}

/// A recorded state of one connection's answers that is to be reached.
#[derive(Debug)]
struct Checkpoint {
    entry: u64,
    total: u64,
    checksum: u32,
    head: Vec<u8>,
}

#[derive(Default, Debug)]
struct Connection {
    received: u64,
    /// Bytes that have been compared, and their CRC-32.
    compared: u64,
    checksum: crc32fast::Hasher,
    /// What has come and is not compared yet. Empty unless bytes are compared.
    ahead: VecDeque<u8>,
    /// The first bytes since the last checkpoint, for messages.
    head: Vec<u8>,
    checkpoints: VecDeque<Checkpoint>,
    /// The last recorded total.
    recorded: u64,
    has_ended: bool,
    /// The recording says that the service has ended it, at this entry.
    must_end: Option<u64>,
    /// The first piece that the service did not take, since it had ended the connection.
    lost: Option<u64>,
}

/// The state of a replay. See the module's text.
#[derive(Debug)]
pub struct Player {
    verify: bool,
    ordered: bool,
    /// Entries that were taken.
    entries: u64,
    connections: BTreeMap<u32, Connection>,
    awaited: Option<u32>,
}

impl Player {
    /// Nothing is replayed yet. With `verify`, bytes of answers are compared, and otherwise their number.
    pub fn new(verify: bool) -> Player {
        Player {
            verify,
            ordered: true,
            entries: 0,
            connections: BTreeMap::new(),
            awaited: None,
        }
    }

    /// Waits for nothing before a piece is sent. For tests: a replay in a wrong order must be noticed.
    #[must_use]
    pub fn without_order(mut self) -> Player {
        self.ordered = false;
        self
    }

    /// Entries taken so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// What the next entry of the log asks for.
    ///
    /// # Errors
    /// Answers that have come already differ from the recorded ones; or the log is not one that a recorder writes.
    pub fn take(&mut self, entry: &Entry) -> Result<Step, Difference> {
        let number = self.entries;
        self.entries += 1;
        self.awaited = None;
        match entry {
            Entry::Open { connection } => self.open(*connection, number),
            Entry::Piece { connection, .. } => {
                let known = self.known(*connection, number)?;
                if known.has_ended {
                    known.lost.get_or_insert(number);
                }
                Ok(Step::Send(*connection))
            }
            Entry::Finish { connection } => {
                self.known(*connection, number)?;
                Ok(Step::Finish(*connection))
            }
            Entry::Answers {
                connection,
                total,
                checksum,
                head,
            } => {
                let checkpoint = Checkpoint {
                    entry: number,
                    total: *total,
                    checksum: *checksum,
                    head: head.clone(),
                };
                let known = self.known(*connection, number)?;
                known.recorded = *total;
                known.checkpoints.push_back(checkpoint);
                self.await_on(*connection, number)
            }
            Entry::Ended { connection } => {
                self.known(*connection, number)?.must_end = Some(number);
                self.await_on(*connection, number)
            }
            Entry::Settled if self.ordered => Ok(Step::Pause),
            Entry::Settled => Ok(Step::Await),
            Entry::Restart => Ok(Step::EndAll),
            Entry::FileEnd => Ok(Step::NextFile),
            Entry::End { .. } => Ok(Step::Done),
        }
    }

    fn open(&mut self, connection: u32, number: u64) -> Result<Step, Difference> {
        let problem = match self.connections.len() {
            _ if self.connections.contains_key(&connection) => "the log opens it twice",
            open if open >= REPLAY_CONNECTIONS_MAX => {
                "the log has more connections open than a recorder takes"
            }
            _ => {
                self.connections.insert(connection, Connection::default());
                return Ok(Step::Connect(connection));
            }
        };
        Err(difference(number, connection, problem))
    }

    fn known(&mut self, connection: u32, number: u64) -> Result<&mut Connection, Difference> {
        let known = self.connections.get_mut(&connection);
        known.ok_or_else(|| difference(number, connection, "the log does not open it"))
    }

    fn await_on(&mut self, connection: u32, number: u64) -> Result<Step, Difference> {
        self.awaited = self.ordered.then_some(connection);
        let verify = self.verify;
        self.known(connection, number)?
            .compare(connection, verify)?;
        self.drop_ended();
        Ok(Step::Await)
    }

    /// What the last [`Step::Await`] still waits for.
    pub fn wait_reason(&self) -> Option<WaitReason> {
        let connection = self.awaited?;
        let known = self.connections.get(&connection)?;
        if let Some(first) = known.checkpoints.front() {
            return Some(WaitReason::Answers {
                connection,
                has: known.received,
                wants: first.total,
            });
        }
        (known.must_end.is_some() && !known.has_ended).then_some(WaitReason::End { connection })
    }

    /// Bytes of answers that have come and could not be compared yet: who reads them waits if that is too much.
    pub fn ahead(&self, connection: u32) -> usize {
        let known = self.connections.get(&connection);
        known.map_or(0, |known| known.ahead.len())
    }

    /// Answers have come.
    ///
    /// # Errors
    /// They differ from the recorded ones.
    pub fn received(&mut self, connection: u32, bytes: &[u8]) -> Result<(), Difference> {
        let verify = self.verify;
        let number = self.entries;
        let known = self.known(connection, number)?;
        known.received += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if verify {
            known.ahead.extend(bytes);
        }
        known.compare(connection, verify)?;
        self.drop_ended();
        Ok(())
    }

    /// The service has ended the connection.
    ///
    /// # Errors
    /// It did so before it had given the answers that are awaited.
    pub fn ended(&mut self, connection: u32) -> Result<(), Difference> {
        let number = self.entries;
        let Some(known) = self.connections.get_mut(&connection) else {
            return Ok(());
        };
        known.has_ended = true;
        if let Some(first) = known.checkpoints.front() {
            let what = format!(
                "the service ended it after {} bytes of answers; the recording has {}{}",
                known.received,
                first.total,
                shown("beginning with", &first.head)
            );
            return Err(difference(number.min(first.entry), connection, what));
        }
        if known.must_end.is_some() {
            known.expect_no_more(connection)?;
        }
        self.drop_ended();
        Ok(())
    }

    /// The last piece could not be sent: the service has ended the connection. That is right if it did so in the
    /// recording too.
    pub fn lost(&mut self, connection: u32) {
        let number = self.entries.saturating_sub(1);
        if let Some(known) = self.connections.get_mut(&connection) {
            known.lost.get_or_insert(number);
        }
    }

    /// Connections that are neither ended by the service nor by the recording.
    pub fn open_connections(&self) -> Vec<u32> {
        let open = self
            .connections
            .iter()
            .filter(|(_, known)| !known.has_ended);
        open.map(|(&connection, _)| connection).collect()
    }

    /// The last judgement, once the service has ended all connections: no answer is missing, and none is too much.
    /// The connections are forgotten.
    ///
    /// # Errors
    /// The first connection whose answers differ.
    pub fn close(&mut self) -> Result<(), Difference> {
        for (connection, known) in std::mem::take(&mut self.connections) {
            if let Some(first) = known.checkpoints.front() {
                let what = format!(
                    "{} bytes of answers came, and {} in the recording",
                    known.received, first.total
                );
                return Err(difference(first.entry, connection, what));
            }
            match (known.must_end, known.lost) {
                (Some(_), _) => known.expect_no_more(connection)?,
                (None, Some(entry)) => {
                    let what = "the service ended it, and in the recording took more";
                    return Err(difference(entry, connection, what));
                }
                // The recorder was stopped before the service had given all answers.
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn drop_ended(&mut self) {
        let is_over = |known: &Connection| {
            known.has_ended && known.must_end.is_some() && known.checkpoints.is_empty()
        };
        self.connections.retain(|_, known| !is_over(known));
    }
}

impl Connection {
    /// Compares what has come with what was recorded, as far as both are known.
    fn compare(&mut self, connection: u32, verify: bool) -> Result<(), Difference> {
        while let Some(total) = self.checkpoints.front().map(|next| next.total) {
            if verify {
                self.consume(total);
            } else {
                self.compared = self.received.min(total);
            }
            if self.compared < total {
                return Ok(());
            }
            let Some(next) = self.checkpoints.pop_front() else {
                break;
            };
            if verify && self.checksum.clone().finalize() != next.checksum {
                let what = format!(
                    "answers differ before byte {}{}{}",
                    next.total,
                    shown("recorded", &next.head),
                    shown("replayed", &self.head)
                );
                return Err(difference(next.entry, connection, what));
            }
            self.head.clear();
        }
        match self.must_end {
            Some(_) => self.expect_no_more(connection),
            None => Ok(()),
        }
    }

    /// Adds bytes up to `total` to the checksum.
    fn consume(&mut self, total: u64) {
        let wanted = usize::try_from(total.saturating_sub(self.compared)).unwrap_or(usize::MAX);
        let count = wanted.min(self.ahead.len());
        let bytes: Vec<u8> = self.ahead.drain(..count).collect();
        self.checksum.update(&bytes);
        self.compared += u64::try_from(count).unwrap_or(u64::MAX);
        let room = REPLAY_HEAD_BYTES_MAX.saturating_sub(self.head.len());
        self.head.extend(bytes.iter().take(room));
    }

    fn expect_no_more(&self, connection: u32) -> Result<(), Difference> {
        if self.received <= self.recorded {
            return Ok(());
        }
        let what = format!(
            "{} bytes of answers came, and {} in the whole recording",
            self.received, self.recorded
        );
        let entry = self.must_end.unwrap_or_default();
        Err(difference(entry, connection, what))
    }
}

fn difference(entry: u64, connection: u32, what: impl Into<String>) -> Difference {
    Difference {
        entry,
        connection,
        what: what.into(),
    }
}

fn shown(title: &str, bytes: &[u8]) -> String {
    match bytes.is_empty() {
        true => String::new(),
        false => format!("; {title} \"{}\"", bytes.escape_ascii()),
    }
}
