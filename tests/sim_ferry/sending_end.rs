//! The end that has the pages: a round as CRIU would send it, through judge and encoder.

use std::collections::{BTreeMap, VecDeque};

use fastrand::Rng;
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::frame::{Kind, OpenFrame};
use pageferry::ferry::gather::{Gathered, Run};
use pageferry::ferry::hash::{Fingerprint, PageHasher};
use pageferry::ferry::hello::{Fail, FailCode, Hello, SessionId};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::{Answer, Open, StateId, encode_close};
use pageferry::ferry::sender::{Sender, SenderEvent, Transmit};
use pageferry::units::{PageCount, PageRange};

use crate::memory::{Memory, PAGE, Pages};
use crate::parts::{Part, Standing, StreamKey};
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
    /// Made when the receiver's hello has come.
    talk: Option<(Sender, PageHasher)>,
    frames: BTreeMap<u64, Vec<u8>>,
    asked: Option<Target>,
    standing: Standing,
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
        memory: PageMemory,
    ) -> SendingEnd {
        SendingEnd {
            session,
            steps: script(rng, source, parent),
            memory,
            encoder: Encoder::new(PAGE).expect("zstd works"),
            talk: None,
            frames: BTreeMap::new(),
            asked: None,
            standing: Standing::Going,
            failure: None,
            stats: Stats::default(),
        }
    }

    /// Submits what can be submitted now.
    fn advance(&mut self) {
        let Some((sender, hasher)) = &mut self.talk else {
            return;
        };
        while self.standing == Standing::Going
            && self.failure.is_none()
            && !sender.has_question()
            && sender.has_room_for(1 << 19)
            && let Some(step) = self.steps.front()
        {
            if let Step::Batch(target, runs, _) = step
                && let Some(below) = sender.hashes_known_below(*target)
                && runs.last().is_some_and(|run| run.range.end() > below)
            {
                return;
            }
            let mut frame = Vec::new();
            let open = OpenFrame::begin(&mut frame);
            let kind = match step {
                Step::Open(target) => {
                    self.asked = Some(*target);
                    let (target, wire) = (*target, Wire::V2);
                    Open { target, wire }.encode(&mut frame);
                    Kind::Open
                }
                Step::Batch(target, runs, plain) => {
                    let batch = PlainBatch {
                        target: *target,
                        runs,
                        plain,
                    };
                    let pages = plain.chunks_exact(PAGE.as_usize());
                    let prints: Vec<Fingerprint> =
                        pages.map(|page| hasher.fingerprint(page)).collect();
                    let mut verdicts = Verdicts::default();
                    self.memory.judge(batch, &prints, hasher, &mut verdicts);
                    let level = Level::Zstd(1);
                    let counters = self
                        .encoder
                        .encode(batch, &verdicts, hasher, level, &mut frame)
                        .expect("zstd works");
                    self.stats.same_pages += counters.same;
                    self.stats.delta_pages += counters.delta;
                    Kind::Pages
                }
                Step::Close(pages) => {
                    encode_close(PageCount(*pages), &mut frame);
                    Kind::Close
                }
            };
            let number = sender.submit(kind, frame.len() as u64);
            open.finish(&mut frame, kind, number);
            self.frames.insert(number, frame);
            if kind == Kind::Open || kind == Kind::Close {
                // Stays in front until its answer has come.
                return;
            }
            self.steps.pop_front();
        }
    }

    fn answered(&mut self, answer: Answer) {
        let Some((sender, _)) = &mut self.talk else {
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
        if let Some((sender, _)) = &mut self.talk {
            sender.fail(fail.clone());
        }
        self.failure = Some(fail);
    }
}

impl Part for SendingEnd {
    fn stream_up(&mut self, key: StreamKey, peer: &Hello) {
        self.memory.use_key(peer.hash_key);
        let (sender, _) = self.talk.get_or_insert_with(|| {
            (
                Sender::new(PAGE, peer.streams, peer.window),
                PageHasher::new(peer.hash_key, PAGE),
            )
        });
        sender.stream_up(key.stream);
    }

    fn stream_down(&mut self, key: StreamKey) {
        if let Some((sender, _)) = &mut self.talk {
            sender.stream_down(key.stream);
        }
    }

    fn frame(&mut self, key: StreamKey, kind: Kind, _number: u64, body: &[u8]) -> bool {
        let Some((sender, _)) = &mut self.talk else {
            return false;
        };
        match sender.handle(key.stream, kind, body) {
            Ok(SenderEvent::Acked {
                safe,
                answer,
                progress,
                ..
            }) => {
                self.frames.retain(|number, _| *number > safe);
                if let Some(answer) = answer {
                    self.answered(answer);
                }
                progress
            }
            Ok(SenderEvent::Hashes(hashes)) => {
                for (run, hashes_of_run) in hashes.runs(PAGE) {
                    self.memory.learn(hashes.target, run, hashes_of_run);
                    self.stats.learned_hashes += hashes_of_run.len() as u64;
                }
                true
            }
            Ok(SenderEvent::Failed(fail)) => {
                self.lost(&fail.text);
                false
            }
            Err(error) => panic!("the receiver broke the protocol: {error}"),
        }
    }

    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>> {
        self.advance();
        let (sender, _) = self.talk.as_mut()?;
        let transmit = sender.poll(key.stream)?;
        if let Transmit::Numbered(number) = transmit {
            self.stats.sent_frames += 1;
            return Some(self.frames[&number].clone());
        }
        let mut frame = Vec::new();
        transmit.encode(&mut frame);
        Some(frame)
    }

    fn lost(&mut self, why: &str) {
        if self.standing() == Standing::Going && !self.steps.is_empty() {
            self.memory.forget();
            self.standing = Standing::Failed(why.to_owned());
        }
    }

    /// CRIU's side has gone away in the middle of the round.
    fn abort(&mut self) {
        self.fail(FailCode::Sender, "the dump was ended");
    }

    fn failure(&self) -> Option<Fail> {
        self.failure.clone()
    }

    fn standing(&self) -> Standing {
        // Nobody to tell it to is as good as told.
        let told = match &self.talk {
            Some((sender, _)) => sender.has_told_end(),
            None => self.failure.is_some(),
        };
        match (&self.failure, told) {
            (Some(fail), true) => Standing::Failed(fail.text.clone()),
            (None, true) => Standing::Done,
            _ => self.standing.clone(),
        }
    }
}

impl SendingEnd {
    /// Whether the round is safe at the receiver: what CRIU would be told.
    pub(crate) fn has_succeeded(&self) -> bool {
        self.steps.is_empty()
    }
}
