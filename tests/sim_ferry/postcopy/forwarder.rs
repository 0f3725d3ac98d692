//! The end that has a dump's memory: drains it, pushes it, answers faults, and lets the dump go when the
//! other end has everything, or fails.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;
use pageferry::criu::header::{Target, Wire};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{Encoder, PlainBatch, Verdicts};
use pageferry::ferry::frame::{Kind, OpenFrame};
use pageferry::ferry::hash::Fingerprint;
use pageferry::ferry::hello::{Fail, FailCode, Hello};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::{Answer, Fault, Open, StateId, encode_close};
use pageferry::ferry::push_planner::{self, Found, PUSH_BYTES, PushBatch, PushPlanner, Step};
use pageferry::ferry::sender::Sender;
use pageferry::lazy::drain::DrainPlan;
use pageferry::units::{PageCount, PageRange};

use super::Observed;
use crate::memory::{Memory, PAGE, Page, Pages};
use crate::parts::{Part, Status, StreamKey};
use crate::sender_protocol::{FrameOutcome, SenderProtocol};

/// What became of the dumped processes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dump {
    /// They wait.
    Frozen,
    /// Another host has them.
    Killed,
    /// They go on where they were.
    Resumed,
}

pub(super) struct Forwarder {
    rng: Rng,
    /// The pages by their numbers.
    held: Vec<Page>,
    plan: DrainPlan,
    drains_at: Duration,
    push_planner: PushPlanner,
    memory: PageMemory,
    encoder: Encoder,
    protocol: SenderProtocol,
    /// Whose pages are being pushed, and whether the receiver has an earlier version of them.
    open: Option<u32>,
    hashed: bool,
    batch: Option<(u32, PushBatch)>,
    pushed: u64,
    closed: bool,
    faults: VecDeque<(u64, Fault)>,
    dump: Dump,
    status: Status,
    failure: Option<Fail>,
    pub(super) seen: Observed,
}

/// Runs of neighbouring pages.
pub(super) fn runs(pages: &Pages) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for number in pages.keys() {
        let (start, end) = (number * PAGE.bytes(), (number + 1) * PAGE.bytes());
        match runs.last_mut() {
            Some(run) if run.end().get() == start => {
                *run = PageRange::new(run.start().get(), end);
            }
            _ => runs.push(PageRange::new(start, end)),
        }
    }
    runs
}

fn lazy_runs(source: &Memory) -> Vec<(Target, PageRange)> {
    let of_target = |(target, pages): (&Target, &Pages)| {
        let target = *target;
        runs(pages).into_iter().map(move |range| (target, range))
    };
    source.iter().flat_map(of_target).collect()
}

impl Forwarder {
    pub(super) fn new(rng: Rng, source: &Memory) -> Forwarder {
        let lazy = lazy_runs(source);
        let plan = DrainPlan::new(
            PAGE,
            lazy.iter().map(|(target, range)| match target {
                Target::Process(pid) => (*pid, *range),
                Target::Shmem(_) => panic!("shared memory is never lazy"),
            }),
        );
        Forwarder {
            rng,
            held: source.values().flat_map(Pages::values).cloned().collect(),
            push_planner: PushPlanner::new(PAGE, plan.pages()).repeating(0),
            plan,
            drains_at: Duration::ZERO,
            memory: PageMemory::for_hashes_of(PAGE, lazy),
            encoder: Encoder::new(PAGE).expect("zstd works"),
            protocol: SenderProtocol::default(),
            open: None,
            hashed: false,
            batch: None,
            pushed: 0,
            closed: false,
            faults: VecDeque::new(),
            dump: Dump::Frozen,
            status: Status::Going,
            failure: None,
            seen: Observed::default(),
        }
    }

    /// What became of the dump; its processes go on when this one crashes before it has let go of them.
    pub(super) fn dump(&self, crashed: bool) -> Dump {
        match self.dump {
            Dump::Frozen if crashed => Dump::Resumed,
            dump => dump,
        }
    }

    /// Whether a client has ever come.
    pub(super) fn was_visited(&self) -> bool {
        self.protocol.sender().is_some()
    }

    fn plain(&self, numbers: Range<u64>) -> Vec<u8> {
        let place = |number| usize::try_from(number).expect("a small dump");
        assert_eq!(
            self.plan.held_part(numbers.clone()),
            numbers,
            "they have come"
        );
        self.held[place(numbers.start)..place(numbers.end)].concat()
    }

    /// Submits what can be submitted now.
    fn advance(&mut self) {
        while self.dump == Dump::Frozen
            && self.failure.is_none()
            && !self.closed
            && self.protocol.may_submit()
            && let Some(sender) = self.protocol.sender()
        {
            if let Some((pid, batch)) = self.batch.take() {
                let below = sender.hashes_known_below(Target::Process(pid));
                let end = batch.runs.last().map(|run| run.range.end());
                if below.is_some_and(|below| end.is_some_and(|end| end > below)) {
                    self.batch = Some((pid, batch));
                    return;
                }
                self.push(pid, &batch);
                continue;
            }
            match self.push_planner.next_step(&self.plan) {
                Step::Done => {
                    let pages = PageCount(self.pushed);
                    self.protocol
                        .submit(Kind::Close, |out| encode_close(pages, out));
                    self.closed = true;
                }
                Step::Wait => return,
                Step::Push(pid) if self.open == Some(pid) => {
                    let most = PUSH_BYTES << self.rng.u32(0..3);
                    let batch = self.push_planner.take_batch(&self.plan, pid, most);
                    self.batch = Some((pid, batch));
                }
                Step::Push(pid) => {
                    let (target, wire) = (Target::Process(pid), Wire::V2);
                    self.protocol
                        .submit(Kind::Open, |out| Open { target, wire }.encode(out));
                    self.open = Some(pid);
                }
            }
        }
    }

    fn push(&mut self, pid: u32, batch: &PushBatch) {
        let numbers = batch.numbers.iter().cloned();
        let plain: Vec<u8> = numbers.flat_map(|numbers| self.plain(numbers)).collect();
        let Some(hasher) = self.protocol.hasher() else {
            return;
        };
        let pages = PlainBatch {
            target: Target::Process(pid),
            runs: &batch.runs,
            plain: &plain,
        };
        let print = |page| match self.hashed {
            true => hasher.fingerprint(page),
            false => Fingerprint::without_hash(page),
        };
        let prints: Vec<Fingerprint> = plain.chunks_exact(PAGE.as_usize()).map(print).collect();
        let mut verdicts = Verdicts::default();
        self.memory.judge(pages, &prints, hasher, &mut verdicts);
        verdicts.send_deltas_in_full();
        let mut body = Vec::new();
        let counters = self
            .encoder
            .encode(pages, &verdicts, hasher, Level::Zstd(1), &mut body)
            .expect("zstd works");
        self.seen.add("page pushed as the same", counters.same);
        self.pushed += batch.pages.get();
        self.protocol.submit(Kind::Pages, |out| out.extend(body));
    }

    fn answered(&mut self, answer: Answer) {
        let (Some(sender), Some(pid)) = (self.protocol.sender_mut(), self.open) else {
            return;
        };
        if self.closed {
            return;
        }
        let target = Target::Process(pid);
        self.hashed = answer.state != StateId::NONE;
        if self.hashed && self.memory.adopt(target, answer.state) {
            sender.ask_hashes(target);
        }
    }

    /// The answer to the question whose turn it is, if its pages have come.
    fn next_answer(&mut self) -> Option<Vec<u8>> {
        let (number, fault) = *self.faults.front()?;
        let (numbers, range) = match push_planner::find(&self.plan, PAGE, &fault) {
            Found::Nothing => (0..0, PageRange::new(0, 0)),
            Found::Pages(numbers, range) => (numbers, range),
            Found::Awaited(numbers) => {
                self.plan.want(numbers, true);
                self.seen.add("fault before its page was drained", 1);
                return None;
            }
        };
        self.faults.pop_front();
        let Some((numbers, range)) = self.answer(numbers, range, &fault) else {
            self.seen.add("fault on a page in the push", 1);
            let mut frame = Vec::new();
            OpenFrame::begin(&mut frame).finish(&mut frame, Kind::FaultInPush, number);
            return Some(frame);
        };
        let plain = self.plain(numbers);
        let hasher = self.protocol.hasher()?;
        let mut verdicts = Verdicts::default();
        let memory = &self.memory;
        push_planner::judge_answer(memory, hasher, PAGE, &fault, range, &plain, &mut verdicts);
        let run = push_planner::answer_run(range);
        let batch = PlainBatch {
            target: fault.target,
            runs: run.as_slice(),
            plain: &plain,
        };
        let mut frame = Vec::new();
        let open = OpenFrame::begin(&mut frame);
        let counters = self
            .encoder
            .encode(batch, &verdicts, hasher, Level::Zstd(1), &mut frame)
            .expect("zstd works");
        open.finish(&mut frame, Kind::FaultPages, number);
        self.seen.add("page answered as the same", counters.same);
        Some(frame)
    }

    /// What of the pages that were found for `fault` its answer brings.
    fn answer(
        &mut self,
        numbers: Range<u64>,
        range: PageRange,
        fault: &Fault,
    ) -> Option<(Range<u64>, PageRange)> {
        if range.is_empty() {
            return Some((numbers, range));
        }
        let (first, start) = (numbers.start, range.start().get());
        let awaited = first + ((fault.vaddr.get() - start) >> PAGE.shift());
        let numbers = self.push_planner.answer(numbers, awaited, fault, true)?;
        let address = |number: u64| start + ((number - first) << PAGE.shift());
        let range = PageRange::new(address(numbers.start), address(numbers.end));
        Some((numbers, range))
    }
}

impl Part for Forwarder {
    fn stream_up(&mut self, key: StreamKey, peer: &Hello) {
        if key.for_faults {
            self.faults.clear();
            return;
        }
        self.memory.use_key(peer.hash_key);
        self.protocol.stream_up(key.stream, peer);
    }

    fn stream_down(&mut self, key: StreamKey) {
        if key.for_faults {
            self.faults.clear();
        } else {
            self.protocol.stream_down(key.stream);
        }
    }

    fn frame(&mut self, key: StreamKey, kind: Kind, number: u64, body: &[u8]) -> bool {
        if key.for_faults {
            assert_eq!(kind, Kind::Fault, "faults only");
            let fault = Fault::decode(body, PAGE).expect("a client writes well");
            self.faults.push_back((number, fault));
            return true;
        }
        match self
            .protocol
            .handle(key.stream, kind, body, &mut self.memory)
        {
            None => return false,
            Some(FrameOutcome::Acked {
                answer, complete, ..
            }) => {
                if let Some(answer) = answer {
                    self.answered(answer);
                }
                if complete && self.dump == Dump::Frozen && self.failure.is_none() {
                    self.dump = Dump::Killed;
                    if let Some(sender) = self.protocol.sender_mut() {
                        sender.leave();
                    }
                }
            }
            Some(FrameOutcome::Hashes(learned)) => self.seen.add("learned hash", learned),
            Some(FrameOutcome::Failed(fail)) => self.lost(&fail.text),
        }
        true
    }

    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>> {
        if key.for_faults {
            return self.next_answer();
        }
        self.advance();
        self.protocol.poll(key.stream).map(|(frame, _)| frame)
    }

    fn lost(&mut self, why: &str) {
        if self.dump == Dump::Frozen {
            self.dump = Dump::Resumed;
            self.status = Status::Failed(why.to_owned());
        }
    }

    /// Somebody stops it: the dump is told to go on.
    fn abort(&mut self) {
        if self.dump == Dump::Frozen {
            self.dump = Dump::Resumed;
            let fail = Fail::new(FailCode::Sender, "stopped");
            if let Some(sender) = self.protocol.sender_mut() {
                sender.fail(fail.clone());
            }
            self.failure = Some(fail);
        }
    }

    fn failure(&self) -> Option<Fail> {
        self.failure.clone()
    }

    fn status(&self) -> Status {
        let told = self.protocol.sender().is_none_or(Sender::has_sent_end);
        match (&self.failure, self.dump) {
            (Some(fail), _) if told => Status::Failed(fail.text.clone()),
            (None, Dump::Killed) if told => Status::Done,
            _ => self.status.clone(),
        }
    }

    /// The dump hands out more of its memory.
    fn tick(&mut self, now: Duration) {
        if now < self.drains_at || self.plan.is_complete() {
            return;
        }
        self.drains_at = now + Duration::from_millis(self.rng.u64(0..20));
        for _ in 0..self.rng.u32(1..4) {
            let most = PageCount(self.rng.u64(1..30));
            if let Some((pid, range)) = self.plan.next_request(most) {
                self.plan.arrived(pid, range);
            }
        }
    }

    fn next_tick(&self) -> Option<Duration> {
        (!self.plan.is_complete()).then_some(self.drains_at)
    }
}
