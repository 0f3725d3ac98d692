//! The destination's side of one tree.

use std::fs::File;
use std::io::Read;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pageferry::error::{Error, Kind, Result};
use tokio::sync::watch;

use super::hash::BlockHasher;
use super::sender::pack_index;
use super::staging::StagingDir;
use super::stream::receive;
use super::table;
use super::writer::Writer;

/// See the module's text. All calls block.
#[derive(Debug)]
pub(crate) struct ReceivedTree {
    staging: StagingDir,
    hasher: BlockHasher,
    state: Mutex<State>,
    /// Counts whoever came for the tree: the newest one alone has its attention.
    turn: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    writer: Option<Writer>,
    is_whole: bool,
    /// Why nothing more can be done.
    over: Option<String>,
    /// Keeps others from the staging directory.
    lock: Option<File>,
}

impl ReceivedTree {
    /// Of a staging directory that is prepared.
    pub(crate) fn new(staging: StagingDir) -> Result<ReceivedTree> {
        let lock = staging.lock()?;
        Ok(ReceivedTree {
            staging,
            hasher: BlockHasher::random(),
            state: Mutex::new(State {
                writer: None,
                is_whole: false,
                over: None,
                lock: Some(lock),
            }),
            turn: watch::Sender::new(0),
        })
    }

    pub(crate) fn staging(&self) -> &StagingDir {
        &self.staging
    }

    /// Replaces the request that receives the tree now; that one is notified by a change.
    pub(crate) fn take_turn(&self) -> watch::Receiver<u64> {
        self.turn.send_modify(|count| *count += 1);
        self.turn.subscribe()
    }

    fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.over {
            Some(why) => Err(Error::new(Kind::Usage, why.clone())),
            None => Ok(state),
        }
    }

    /// Tells what the tree holds by now.
    pub(crate) fn index(&self) -> Result<Vec<u8>> {
        let mut state = self.state()?;
        let known = state.writer.take();
        let writer = match known.filter(|writer| writer.index().is_some()) {
            Some(writer) => writer,
            None => self.staging.writer(&self.hasher)?,
        };
        let writer = state.writer.insert(writer);
        writer.settle();
        let Some(index) = writer.index() else {
            return Err(unknown());
        };
        pack_index(index, &self.hasher)
            .map_err(|error| Error::wrap(Kind::Io, "cannot send the index of files", error))
    }

    /// Carries the operations of a stream out.
    pub(crate) fn store(&self, from: impl Read) -> Result<()> {
        let mut state = self.state()?;
        state.is_whole = false;
        let Some(writer) = &mut state.writer else {
            return Err(unknown());
        };
        let stored = receive(from, &mut |operation| writer.apply(&operation));
        writer.settle();
        stored
    }

    /// Brings what was stored to the disk, for the next time that this is waited for.
    pub(crate) fn flush(&self) {
        // By a descriptor of its own: an error is told once for each, and must be told to the one that counts.
        if let Err(error) = self.staging.flush() {
            tracing::warn!("{error}");
        }
    }

    /// Ends the arrival: the tree is what the source has, by this digest, and it is on the disk.
    pub(crate) fn seal(&self, digest: &str) -> Result<()> {
        let mut state = self.state()?;
        let Some(writer) = &state.writer else {
            return Err(unknown());
        };
        let Some(index) = writer.index() else {
            return Err(unknown());
        };
        if table::digest(index) != digest {
            // Whatever went wrong, the disk knows.
            state.writer = None;
            let text = format!(
                "the files in {} are not those of the source",
                self.staging.target().display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        if let Err(error) = writer.sync() {
            // A second attempt would succeed, without what was lost.
            state.over = Some(error.to_string());
            return Err(error);
        }
        state.is_whole = true;
        Ok(())
    }

    /// Whether all has arrived.
    pub(crate) fn is_whole(&self) -> bool {
        self.state().is_ok_and(|state| state.is_whole)
    }

    /// Lets go of the tree: nothing is stored from here on.
    pub(crate) fn end(&self) {
        self.take_turn();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.writer = None;
        state.lock = None;
        state
            .over
            .get_or_insert_with(|| "no more files are taken: the migration is decided".to_owned());
    }
}

fn unknown() -> Error {
    let text = "files cannot be taken before their index was asked for";
    Error::new(Kind::Usage, text)
}
