//! The end that has the pages: a round as CRIU would send it, through judge and encoder.

use std::collections::VecDeque;

use fastrand::Rng;
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::frame::Kind;
use pageferry::ferry::gather::{Gathered, Run};
use pageferry::ferry::hash::Fingerprint;
use pageferry::ferry::hello::{Fail, FailCode, Hello, SessionId};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::{Answer, Open, StateId, encode_close};
use pageferry::units::{PageCount, PageRange};

use crate::memory::{Memory, PAGE, Pages};
use crate::parts::{Part, Status, StreamKey};
use crate::sender_protocol::{FrameOutcome, SenderProtocol};
use crate::stats::Stats;

enum Step {
    Open(Target),
    Batch(Target, Vec<Run>, Vec<u8>),
    Close(u64),
}

/// One round on its way. `memory` outlives it, as in a process that serves round after round.
pub(crate) struct SendingEnd {
    session: SessionId,
    steps: VecDeque<Step>,
    pub(crate) memory: PageMemory,
    encoder: Encoder,
    protocol: SenderProtocol,
    asked: Option<Target>,
    status: Status,
    failure: Option<Fail>,
    pub(crate) stats: Stats,
}

/// The steps of a round over `memory`. Pages that are the same in `parent` may be left out as
/// holes.
fn script(rng: &mut Rng, memory: &Memory, parent: Option<&Memory>) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    let mut sent = 0;
    for (target, pages) in memory {
        let in_parent = parent.and_then(|parent| parent.get(target));
        steps.push_back(Step::Open(*target));
        sent += batches(rng, *target, pages, in_parent, &mut steps);
    }
    steps.push_back(Step::Close(sent));
    steps
}

fn batches(
    rng: &mut Rng,
    target: Target,
    pages: &Pages,
    parent: Option<&Pages>,
    steps: &mut VecDeque<Step>,
) -> u64 {
    let mut gathered = Gathered::new(PAGE);
    let (mut plain, mut sent) = (Vec::new(), 0);
    let mut flush = |gathered: &mut Gathered, plain: &mut Vec<u8>| {
        let batch = Step::Batch(target, gathered.runs().to_vec(), std::mem::take(plain));
        steps.push_back(batch);
        gathered.clear();
    };
    let uses_holes = rng.u8(0..4) == 0;
    for (number, page) in pages {
        let start = number * PAGE.bytes();
        let same = parent.and_then(|parent| parent.get(number)) == Some(page);
        let hole = uses_holes && same && rng.bool();
        let run = Run {
            range: PageRange::new(start, start + PAGE.bytes()),
            flags: if hole {
                PageFlags::PARENT
            } else {
                PageFlags::PRESENT
            },
        };
        if rng.u8(0..12) == 0 {
            flush(&mut gathered, &mut plain);
        }
        if gathered.push(run).is_some() {
            flush(&mut gathered, &mut plain);
            assert_eq!(gathered.push(run), None, "a page fits into an empty batch");
        }
        if !hole {
            plain.extend_from_slice(page);
            sent += 1;
        }
    }
    flush(&mut gathered, &mut plain);
    sent
}

impl SendingEnd {
    pub(crate) fn new(
        rng: &mut Rng,
        session: SessionId,
        source: &Memory,
        parent: Option<&Memory>,
        mut memory: PageMemory,
    ) -> SendingEnd {
        memory.begin_session(true, true);
        SendingEnd {
            session,
            steps: script(rng, source, parent),
            memory,
            encoder: Encoder::new(PAGE).expect("zstd works"),
            protocol: SenderProtocol::default(),
            asked: None,
            status: Status::Going,
            failure: None,
            stats: Stats::default(),
        }
    }

    /// Submits what can be submitted now.
    fn advance(&mut self) {
        while self.status == Status::Going
            && self.failure.is_none()
            && self.protocol.may_submit()
            && let Some((kind, body)) = self.next_frame()
        {
            self.protocol.submit(kind, |frame| frame.extend(body));
            if kind == Kind::Open || kind == Kind::Close {
                // Stays in front until its answer has come.
                return;
            }
            self.steps.pop_front();
        }
    }

    /// Kind and body of the next step's frame, unless it must wait for the receiver's hashes.
    fn next_frame(&mut self) -> Option<(Kind, Vec<u8>)> {
        let (sender, hasher) = (self.protocol.sender()?, self.protocol.hasher()?);
        let mut frame = Vec::new();
        let kind = match self.steps.front()? {
            Step::Open(target) => {
                self.asked = Some(*target);
                let (target, wire) = (*target, Wire::V2);
                Open { target, wire }.encode(&mut frame);
                Kind::Open
            }
            Step::Batch(target, runs, plain) => {
                if let Some(below) = sender.hashes_known_below(*target)
                    && runs.last().is_some_and(|run| run.range.end() > below)
                {
                    return None;
                }
                let batch = PlainBatch {
                    target: *target,
                    runs,
                    plain,
                };
                let pages = plain.chunks_exact(PAGE.as_usize());
                let prints: Vec<Fingerprint> = pages.map(|page| hasher.fingerprint(page)).collect();
                let mut verdicts = Verdicts::default();
                self.memory.judge(batch, &prints, hasher, &mut verdicts);
                let level = Level::Zstd(1);
                let counters = self
                    .encoder
                    .encode(batch, &verdicts, hasher, level, &mut frame)
                    .expect("zstd works");
                self.stats.same_pages += counters.same;
                self.stats.delta_pages += counters.delta;
                self.stats.shared_pages += counters.shared;
                Kind::Pages
            }
            Step::Close(pages) => {
                encode_close(PageCount(*pages), &mut frame);
                Kind::Close
            }
        };
        Some((kind, frame))
    }

    fn answered(&mut self, answer: Answer) {
        let Some(sender) = self.protocol.sender_mut() else {
            return;
        };
        match self.steps.front() {
            Some(Step::Open(target)) if self.asked == Some(*target) => {
                assert_eq!(answer.state != StateId::NONE, answer.value == 1);
                if self.memory.adopt(*target, answer.state) {
                    sender.ask_hashes(*target);
                }
                self.asked = None;
                self.steps.pop_front();
            }
            Some(Step::Close(_)) => {
                self.steps.pop_front();
                self.memory.commit(self.session.into());
                sender.leave();
            }
            // PARENT: its answer goes to CRIU.
            _ => {}
        }
    }

    fn fail(&mut self, code: FailCode, why: &str) {
        if self.steps.is_empty() || self.failure.is_some() {
            return;
        }
        self.memory.forget();
        let fail = Fail::new(code, why);
        if let Some(sender) = self.protocol.sender_mut() {
            sender.fail(fail.clone());
        }
        self.failure = Some(fail);
    }
}

impl Part for SendingEnd {
    fn stream_up(&mut self, key: StreamKey, peer: &Hello) {
        self.memory.use_key(peer.hash_key);
        self.protocol.stream_up(key.stream, peer);
    }

    fn stream_down(&mut self, key: StreamKey) {
        self.protocol.stream_down(key.stream);
    }

    fn frame(&mut self, key: StreamKey, kind: Kind, _number: u64, body: &[u8]) -> bool {
        match self
            .protocol
            .handle(key.stream, kind, body, &mut self.memory)
        {
            Some(FrameOutcome::Acked {
                answer, progress, ..
            }) => {
                if let Some(answer) = answer {
                    self.answered(answer);
                }
                progress
            }
            Some(FrameOutcome::Hashes(learned)) => {
                self.stats.learned_hashes += learned;
                true
            }
            Some(FrameOutcome::Failed(fail)) => {
                self.lost(&fail.text);
                false
            }
            None => false,
        }
    }

    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>> {
        self.advance();
        let (frame, numbered) = self.protocol.poll(key.stream)?;
        self.stats.sent_frames += u64::from(numbered);
        Some(frame)
    }

    fn lost(&mut self, why: &str) {
        if self.status() == Status::Going && !self.steps.is_empty() {
            self.memory.forget();
            self.status = Status::Failed(why.to_owned());
        }
    }

    /// CRIU's side has gone away in the middle of the round.
    fn abort(&mut self) {
        self.fail(FailCode::Sender, "the dump was ended");
    }

    fn failure(&self) -> Option<Fail> {
        self.failure.clone()
    }

    fn status(&self) -> Status {
        // Nobody to tell it to is as good as told.
        let told = match self.protocol.sender() {
            Some(sender) => sender.has_sent_end(),
            None => self.failure.is_some(),
        };
        match (&self.failure, told) {
            (Some(fail), true) => Status::Failed(fail.text.clone()),
            (None, true) => Status::Done,
            _ => self.status.clone(),
        }
    }
}

impl SendingEnd {
    /// Whether the round is safe at the receiver: what CRIU would be told.
    pub(crate) fn has_succeeded(&self) -> bool {
        self.steps.is_empty()
    }
}
