//! What an end that sends has to do with its connections, whatever it sends: numbers, frames until they are
//! safe, hashes that the receiver tells.

use std::collections::BTreeMap;

use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::frame::{Kind, OpenFrame};
use pageferry::ferry::hash::PageHasher;
use pageferry::ferry::hello::{Fail, Hello};
use pageferry::ferry::message::Answer;
use pageferry::ferry::sender::{Sender, SenderEvent, Transmit};

use crate::memory::PAGE;

#[derive(Default)]
pub(crate) struct SenderProtocol {
    /// Made when the receiver's hello has come.
    agreed: Option<(Sender, PageHasher)>,
    /// Frames that are not safe yet, by their numbers.
    frames: BTreeMap<u64, Vec<u8>>,
}

/// What a frame from the receiver has told.
pub(crate) enum FrameOutcome {
    Acked {
        answer: Option<Answer>,
        /// The receiver has everything that it wants.
        complete: bool,
        /// The session has come forward.
        progress: bool,
    },
    /// So many hashes have gone into the memory.
    Hashes(u64),
    Failed(Fail),
}

impl SenderProtocol {
    pub(crate) fn stream_up(&mut self, stream: u16, peer: &Hello) {
        let (sender, _) = self.agreed.get_or_insert_with(|| {
            let hasher = PageHasher::new(peer.hash_key, PAGE);
            (Sender::new(PAGE, peer.streams, peer.window), hasher)
        });
        sender.stream_up(stream);
    }

    pub(crate) fn stream_down(&mut self, stream: u16) {
        if let Some(sender) = self.sender_mut() {
            sender.stream_down(stream);
        }
    }

    pub(crate) fn sender(&self) -> Option<&Sender> {
        self.agreed.as_ref().map(|(sender, _)| sender)
    }

    pub(crate) fn sender_mut(&mut self) -> Option<&mut Sender> {
        self.agreed.as_mut().map(|(sender, _)| sender)
    }

    pub(crate) fn hasher(&self) -> Option<&PageHasher> {
        self.agreed.as_ref().map(|(_, hasher)| hasher)
    }

    /// Whether there is room for another frame, and no question is open.
    pub(crate) fn may_submit(&self) -> bool {
        let sender = self.sender();
        sender.is_some_and(|sender| !sender.has_question() && sender.has_room_for(1 << 19))
    }

    /// Numbers a frame of this body and keeps it until it is safe.
    pub(crate) fn submit(&mut self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) {
        let Some((sender, _)) = &mut self.agreed else {
            return;
        };
        let mut frame = Vec::new();
        let open = OpenFrame::begin(&mut frame);
        write(&mut frame);
        let number = sender.submit(kind, frame.len() as u64);
        open.finish(&mut frame, kind, number);
        self.frames.insert(number, frame);
    }

    /// A frame came. Hashes go into `memory`.
    pub(crate) fn handle(
        &mut self,
        stream: u16,
        kind: Kind,
        body: &[u8],
        memory: &mut PageMemory,
    ) -> Option<FrameOutcome> {
        let (sender, _) = self.agreed.as_mut()?;
        Some(match sender.handle(stream, kind, body) {
            Ok(SenderEvent::Acked {
                safe,
                answer,
                complete,
                progress,
                ..
            }) => {
                self.frames.retain(|number, _| *number > safe);
                FrameOutcome::Acked {
                    answer,
                    complete,
                    progress,
                }
            }
            Ok(SenderEvent::Hashes(hashes)) => {
                let mut learned = 0;
                for (run, hashes_of_run) in hashes.runs(PAGE) {
                    memory.learn(hashes.target, run, hashes_of_run);
                    learned += hashes_of_run.len() as u64;
                }
                FrameOutcome::Hashes(learned)
            }
            Ok(SenderEvent::Failed(fail)) => FrameOutcome::Failed(fail),
            Err(error) => panic!("the receiver broke the protocol: {error}"),
        })
    }

    /// The next frame for `stream`, and whether it is a numbered one.
    pub(crate) fn poll(&mut self, stream: u16) -> Option<(Vec<u8>, bool)> {
        let transmit = self.sender_mut()?.poll(stream)?;
        if let Transmit::Numbered(number) = transmit {
            return Some((self.frames[&number].clone(), true));
        }
        let mut frame = Vec::new();
        transmit.encode(&mut frame);
        Some((frame, false))
    }
}
