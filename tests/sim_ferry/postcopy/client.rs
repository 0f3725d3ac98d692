//! The end that restores: processes that run while their memory comes, and what is here of an earlier
//! round, to which somebody may write at any time.

mod part;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use pageferry::criu::header::Target;
use pageferry::ferry::frame::HEADER_BYTES;
use pageferry::ferry::hash::{HashKey, HashStep, PageHasher};
use pageferry::ferry::hello::{SessionId, Window};
use pageferry::ferry::message::{Fault, WantHashes};
use pageferry::ferry::postcopy_receiver::{
    Delivery, Event, Part as Piece, PostcopyReceiver, UnverifiedDelivery,
};
use pageferry::lazy::planner::{PageOutcome, Planner, Request, SpaceId};
use pageferry::lazy::space::{Class, FaultAnswer, FetchLimits, Space};
use pageferry::lazy::window::RateLimit;
use pageferry::units::PageRange;

use super::Observed;
use super::forwarder::runs;
use crate::memory::{Memory, PAGE, number_of, numbers, page_range};

/// Questions that are open at most.
const QUESTIONS_MAX: usize = 64;

/// What the push has left out is asked for up to here, pages.
const LEFT_OUT_MAX: u64 = 64;

const LIMITS: FetchLimits = FetchLimits {
    alone_bytes: 16 << 10,
    sequential_bytes: 256 << 10,
};

/// How long the source may take to confirm the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Hashed at a time, pages; and told at a time, hashes.
const HASH_STEP: usize = 5;
const HASHES_A_FRAME: usize = 12;

/// How the restore has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// Everything is here, and the source has let go.
    Success,
    /// Everything is here, but the source did not say that it has let go.
    Unconfirmed,
    /// The processes have lost memory, or were never restored: they do not run here.
    Failed(String),
}

/// A process. Each page is missing, and then which page of the dump belongs there, or it is there.
type ProcessPages = BTreeMap<u64, Option<u64>>;

pub(super) struct Client {
    rng: Rng,
    source: Memory,
    /// The images of an earlier round.
    pub(super) local: Memory,
    hasher: PageHasher,
    receiver: PostcopyReceiver<Request>,
    /// The push was over when something was last heard.
    was_closed: bool,
    planner: Planner,
    processes: BTreeMap<SpaceId, ProcessPages>,
    /// Threads that wait, by their process and page.
    waiting: BTreeSet<(SpaceId, u64)>,
    now: Duration,
    restored_at: Duration,
    acts_at: Duration,
    attached: bool,
    questions: VecDeque<Vec<u8>>,
    /// Of each open question, whether it asks for pages in full.
    open_in_full: VecDeque<bool>,
    /// Pages of the earlier round have changed behind their hashes.
    distrusts: bool,
    /// What the push is held to, if anything.
    limit: Option<RateLimit>,
    /// When to stop waiting for the source's last word.
    closes_at: Option<Duration>,
    said_failure: bool,
    aborted: bool,
    end: Option<End>,
    pub(super) seen: Observed,
}

impl Client {
    pub(super) fn new(
        mut rng: Rng,
        source: &Memory,
        local: Memory,
        session: SessionId,
        hash_key: HashKey,
        window: Window,
    ) -> Client {
        let hasher = PageHasher::new(hash_key, PAGE);
        let mut receiver = PostcopyReceiver::new(PAGE, window, hasher.clone(), session.into());
        let limit = (rng.u8(0..3) == 0).then(|| RateLimit::new(rng.u64(1..64) << 20));
        if limit.is_some() {
            receiver.throttle();
        }
        let mut planner = Planner::new(PAGE);
        let mut processes = BTreeMap::new();
        for (target, pages) in source {
            let Target::Process(pid) = *target else {
                panic!("shared memory is never lazy");
            };
            let id = planner.add(Space::new(pid, PAGE, runs(pages), []));
            let process = pages.keys().map(|number| (*number, Some(*number)));
            processes.insert(id, process.collect());
            if local.contains_key(target) {
                receiver.build_on(pid);
            }
        }
        Client {
            restored_at: Duration::from_millis(rng.u64(0..2000)),
            rng,
            source: source.clone(),
            local,
            hasher,
            receiver,
            was_closed: false,
            planner,
            processes,
            waiting: BTreeSet::new(),
            now: Duration::ZERO,
            acts_at: Duration::ZERO,
            attached: false,
            questions: VecDeque::new(),
            open_in_full: VecDeque::new(),
            distrusts: false,
            limit,
            closes_at: None,
            said_failure: false,
            aborted: false,
            end: None,
            seen: Observed::default(),
        }
    }

    /// Whether every page is here, so that the processes do not need the source any more.
    pub(super) fn is_complete(&self) -> bool {
        !self.aborted && self.planner.is_complete()
    }

    /// Whether only the source's last word is awaited.
    pub(super) fn is_through(&self) -> bool {
        self.receiver.is_through()
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    pub(super) fn stream_up_both(&mut self) {
        self.attached = true;
        self.receiver.attach();
        self.ask();
    }

    /// Somebody writes to some pages of the earlier round's images, or cuts them.
    pub(super) fn tamper(&mut self) {
        for pages in self.local.values_mut() {
            for page in pages.values_mut() {
                if self.rng.u8(0..8) == 0 {
                    let mut changed = page.to_vec();
                    changed[self.rng.usize(0..PAGE.as_usize())] ^= 1 << self.rng.u8(0..8);
                    *page = changed.into();
                }
            }
            if self.rng.u8(0..4) == 0 {
                let start = self.rng.u64(0..3000);
                pages.retain(|number, _| !(start..start + 200).contains(number));
            }
        }
    }

    /// Asks for what threads wait for, then for what the push has left out.
    fn ask(&mut self) {
        if !self.attached || self.closes_at.is_some() || self.aborted {
            return;
        }
        while self.receiver.questions() < QUESTIONS_MAX
            && let Some(request) = self.next_request()
        {
            let words = self
                .receiver
                .ask(request.pid, request.image, request, self.now);
            let fault = Fault::decode(&words[HEADER_BYTES..], PAGE).expect("a question");
            assert_eq!(
                fault.in_full, self.distrusts,
                "who asks for what is in full"
            );
            self.open_in_full.push_back(fault.in_full);
            self.questions.push_back(words);
            self.seen.add("question", 1);
        }
        if self.receiver.questions() > 0 || !self.is_complete() || self.now < self.restored_at {
            return;
        }
        self.receiver.may_install();
        self.receiver.note_complete();
        self.closes_at = Some(self.now + CLOSE_TIMEOUT);
    }

    fn next_request(&mut self) -> Option<Request> {
        let urgent = self.planner.next_urgent();
        if urgent.is_some() || !self.receiver.is_closed() {
            return urgent;
        }
        let few = self.receiver.asked_pages() < LEFT_OUT_MAX;
        let left_out = few.then(|| self.planner.next_stream(256 << 10, 0));
        left_out.flatten()
    }

    /// Lets the push go on as far as the limit has earned it.
    fn acknowledge(&mut self, now: Duration) {
        let now_us = u64::try_from(now.as_micros()).expect("less than an age");
        if let Some(limit) = &mut self.limit {
            self.receiver.acknowledge(limit, now_us);
            self.seen.add("step under a rate limit", 1);
        }
    }

    fn handle(&mut self, event: Event<Request>) {
        if self.receiver.is_closed() && !self.was_closed {
            self.was_closed = true;
            // What was to come with the push and did not.
            self.planner.ask_for_all_again();
        }
        match event {
            Event::Other => {}
            Event::InPush(request) => {
                let in_full = self.open_in_full.pop_front().expect("a question");
                assert!(!in_full, "what is asked for in full is not waited for");
                self.planner.await_push(request.space, request.image);
                self.seen.add("question that the push answers", 1);
            }
            Event::Bye => {
                assert!(self.is_complete(), "the source lets go of what is not here");
                self.end = Some(End::Success);
            }
            Event::Pushed(unverified) => {
                let delivery = self.complete(unverified);
                if self.closes_at.is_none() {
                    self.install_pushed(&delivery);
                }
                self.receiver.settle(delivery.plain);
            }
            Event::Answer(request, mut unverified) => {
                let in_full = self.open_in_full.pop_front().expect("a question");
                assert!(
                    !in_full || unverified.local().next().is_none(),
                    "not in full"
                );
                self.seen.add("answer in full", u64::from(in_full));
                let delivery = self.complete(unverified);
                if self.closes_at.is_none() {
                    self.install_answer(&request, &delivery);
                }
            }
        }
    }

    /// Reads what is local of `unverified`.
    fn complete(&mut self, mut unverified: UnverifiedDelivery) -> Delivery {
        let pages = self.local.get(&Target::Process(unverified.pid()));
        let mut read = true;
        for (range, bytes) in unverified.local() {
            let places = bytes.chunks_exact_mut(PAGE.as_usize());
            for (number, place) in numbers(range).zip(places) {
                match pages.and_then(|pages| pages.get(&number)) {
                    Some(page) => place.copy_from_slice(page),
                    None => read = false,
                }
            }
        }
        let (delivery, usable) = self.receiver.complete(unverified, read);
        self.distrusts |= !usable;
        let what = match usable {
            true => "delivery as it was meant",
            false => "delivery with local pages that had changed",
        };
        self.seen.add(what, 1);
        delivery
    }

    fn install_pushed(&mut self, delivery: &Delivery) {
        for id in self.planner.ids_of(delivery.pid) {
            for part in &delivery.parts {
                self.planner.pushed(id, part.image);
                self.install(id, delivery, part, Class::Stream);
            }
        }
        for range in &delivery.absent {
            self.planner.ask_again(delivery.pid, *range);
        }
    }

    fn install_answer(&mut self, request: &Request, delivery: &Delivery) {
        assert_eq!(delivery.pid, request.pid, "the answer to another question");
        let first = request.image.start();
        assert!(delivery.covers(first), "the source has no page at {first}");
        for part in &delivery.parts {
            for id in self.planner.ids_of(request.pid) {
                self.planner.pushed(id, part.image);
                self.install(id, delivery, part, request.class);
            }
        }
        // What the answer has left out is asked for once more, also for others who counted on it.
        self.planner.give_back(request.pid, request.image);
        self.planner.ask_again(request.pid, request.image);
    }

    /// Installs pages, each of which must be what the source has there.
    fn install(&mut self, id: SpaceId, delivery: &Delivery, part: &Piece, class: Class) {
        let pages = &self.source[&Target::Process(delivery.pid)];
        let bytes = &delivery.plain[part.bytes.clone()];
        let first = number_of(part.image.start());
        for (number, page) in numbers(part.image).zip(bytes.chunks_exact(PAGE.as_usize())) {
            assert!(pages[&number][..] == *page, "page {number} is another");
        }
        while let Some(piece) = self.planner.arrived(id, part.image) {
            let process = self.processes.get_mut(&id).expect("it lives");
            for (at, number) in numbers(piece.at).zip(number_of(piece.image)..) {
                assert!(number >= first && number < first + numbers(part.image).count() as u64);
                let missing = process.insert(at, None).flatten();
                assert_eq!(missing, Some(number), "what is missing at {at}");
            }
            let outcome = match part.local {
                true => PageOutcome::Local,
                false => PageOutcome::Fetched(class),
            };
            let waiting = &mut self.waiting;
            self.planner.settle(id, piece.at, outcome, |served| {
                waiting.remove(&(id, number_of(served.page)));
            });
            let what = match (part.local, class) {
                (true, _) => "page from the earlier round",
                (false, Class::Stream) => "page from the stream",
                (false, _) => "page for a fault",
            };
            self.seen.add(what, numbers(piece.at).count() as u64);
        }
    }

    /// The next few hashes of the earlier round for the question `wanted`.
    fn hash(&self, wanted: WantHashes) -> HashStep {
        let mut step = HashStep::default();
        let (Some(pages), Some(lazy)) = (
            self.local.get(&wanted.target),
            self.source.get(&wanted.target),
        ) else {
            return step;
        };
        let is_lazy = |number: &&u64| lazy.contains_key(number);
        let rest = pages
            .range(number_of(wanted.from)..)
            .map(|(number, _)| number);
        let mut rest = rest.filter(is_lazy).copied().peekable();
        for number in rest.by_ref().take(HASH_STEP) {
            step.add_run(page_range(number));
            step.hashes.push(self.hasher.hash(&pages[&number]));
        }
        step.next = rest.peek().map(|number| page_range(*number).start());
        step
    }

    /// A thread or a process does something.
    fn act(&mut self) {
        let ids: Vec<SpaceId> = self.processes.keys().copied().collect();
        let Some(id) = self.rng.choice(ids) else {
            return;
        };
        let process = &self.processes[&id];
        let pages: Vec<(u64, Option<u64>)> =
            process.iter().map(|(at, page)| (*at, *page)).collect();
        let Some((at, missing)) = self.rng.choice(pages) else {
            return;
        };
        match self.rng.u8(0..60) {
            0 if self.processes.len() < 5 && self.now >= self.restored_at => {
                let child = self.planner.handle_fork(id).expect("it lives");
                self.processes.insert(child, self.processes[&id].clone());
                self.seen.add("fork", 1);
            }
            1 if self.now >= self.restored_at => {
                let end = at + self.rng.u64(1..20);
                let range = PageRange::new(at * PAGE.bytes(), end * PAGE.bytes());
                let process = self.processes.get_mut(&id).expect("it lives");
                process.retain(|number, _| !(at..end).contains(number));
                let waiting = &mut self.waiting;
                waiting.retain(|(of, number)| *of != id || !(at..end).contains(number));
                self.planner.settle(id, range, PageOutcome::Gone, |_| {});
                self.seen.add("unmapped range", 1);
            }
            _ if missing.is_some() && self.waiting.len() < 8 => {
                let now_us = u64::try_from(self.now.as_micros()).expect("a short run");
                let addr = page_range(at).start();
                let answer = self.planner.handle_fault(id, addr, LIMITS, now_us);
                assert_eq!(answer, FaultAnswer::Wait, "page {at} is a hole");
                self.waiting.insert((id, at));
            }
            _ => {}
        }
    }
}
