//! The end that wants the pages: applies frames to an image, publishes it whole or not at all.

use std::collections::{BTreeMap, VecDeque};

use fastrand::Rng;
use pageferry::criu::header::{PageFlags, Target};
use pageferry::ferry::batch::{Batch, BatchError, PageKind, Place};
use pageferry::ferry::frame::Kind;
use pageferry::ferry::hash::{PageHash, PageHasher};
use pageferry::ferry::hello::{Fail, FailCode, Hello, SessionId, Window};
use pageferry::ferry::message::{Hashes, StateId, WantHashes};
use pageferry::ferry::receiver::{Arrival, Message, Receiver, ReceiverEvent};
use pageferry::ferry::unpack::Unpacker;
use pageferry::units::{PageRange, Vaddr};

use crate::memory::{Memory, PAGE, Page, number_of};
use crate::parts::{Part, Status, StreamKey};
use crate::stats::Stats;

#[derive(Clone, Debug)]
pub(crate) enum Entry {
    Data(Page),
    InParent,
}

pub(crate) type Image = BTreeMap<Target, BTreeMap<u64, Entry>>;

/// Everything under a final name, oldest first; each image's parent is the one before it.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) images: Vec<Image>,
}

impl Store {
    pub(crate) fn page(&self, image: usize, target: Target, number: u64) -> Option<Page> {
        match self.images.get(image)?.get(&target)?.get(&number)? {
            Entry::Data(page) => Some(page.clone()),
            Entry::InParent => self.page(image.checked_sub(1)?, target, number),
        }
    }

    /// Somebody writes to some pages of the last image, which keeps its name. Returns whether there is
    /// one.
    pub(crate) fn tamper(&mut self, rng: &mut Rng) -> bool {
        let Some(image) = self.images.last_mut() else {
            return false;
        };
        for entry in image.values_mut().flat_map(BTreeMap::values_mut) {
            if rng.u8(0..4) == 0 {
                *entry = Entry::Data(vec![rng.u8(..); PAGE.as_usize()].into());
            }
        }
        true
    }

    /// What a restore of `image` would give. Panics if a hole has no page below it.
    pub(crate) fn restored(&self, image: usize) -> Memory {
        let targets = self.images[image].iter().map(|(target, pages)| {
            let restored = |number: &u64| {
                let page = self.page(image, *target, *number);
                (*number, page.expect("a hole stands on a page"))
            };
            (*target, pages.keys().map(restored).collect())
        });
        targets.collect()
    }
}

/// A session on the receiving side. `store` and `states` outlive it.
pub(crate) struct ReceivingEnd {
    session: Option<SessionId>,
    pub(crate) store: Store,
    /// Names of the images that this process knows of, as its own or by looking.
    pub(crate) states: BTreeMap<usize, StateId>,
    hasher: PageHasher,
    receiver: Receiver,
    held: BTreeMap<u64, (Kind, Vec<u8>)>,
    unpacker: Unpacker,
    building: Image,
    /// The targets of the session, in the order in which they were opened.
    opened: Vec<Target>,
    published: bool,
    replies: BTreeMap<u16, VecDeque<Vec<u8>>>,
    status: Status,
    failure: Option<Fail>,
    pub(crate) stats: Stats,
}

impl ReceivingEnd {
    pub(crate) fn new(
        store: Store,
        states: BTreeMap<usize, StateId>,
        streams: u16,
        window: Window,
        hasher: PageHasher,
    ) -> ReceivingEnd {
        ReceivingEnd {
            session: None,
            store,
            states,
            hasher,
            receiver: Receiver::new(PAGE, streams, window).taking_shared(true),
            held: BTreeMap::new(),
            unpacker: Unpacker::default(),
            building: Image::new(),
            opened: Vec::new(),
            published: false,
            replies: BTreeMap::new(),
            status: Status::Going,
            failure: None,
            stats: Stats::default(),
        }
    }

    fn parent(&self) -> Option<usize> {
        let images = self.store.images.len() - usize::from(self.published);
        images.checked_sub(1)
    }

    fn base(&self, target: Target, vaddr: Vaddr) -> Option<Page> {
        let number = number_of(vaddr);
        self.store.page(self.parent()?, target, number)
    }

    fn parent_state(&mut self, target: Target) -> StateId {
        let Some(parent) = self.parent() else {
            return StateId::NONE;
        };
        if !self.store.images[parent].contains_key(&target) {
            return StateId::NONE;
        }
        // A name for an image that another process wrote: nobody else can know it.
        let fresh = StateId([u8::try_from(parent).map_or(0xff, |n| 0xf0 + n); 16]);
        *self.states.entry(parent).or_insert(fresh)
    }

    fn apply(&mut self, number: u64, kind: Kind, body: &[u8]) {
        match self.receiver.read(kind, body) {
            Ok(Message::Open(open)) => {
                self.building.entry(open.target).or_default();
                self.opened.push(open.target);
                let state = self.parent_state(open.target);
                let has_parent = i32::from(state != StateId::NONE);
                self.receiver.answer(number, has_parent, state);
            }
            Ok(Message::Pages(batch)) => {
                if let Err(error) = self.store_pages(&batch, body) {
                    self.stats.disagreements += 1;
                    self.fail(FailCode::Disagreement, &error.to_string());
                    return;
                }
            }
            Ok(Message::Close(_)) => {
                let image = std::mem::take(&mut self.building);
                self.store.images.push(image);
                self.published = true;
                let session = self.session.expect("a session has come");
                self.states
                    .insert(self.store.images.len() - 1, session.into());
                self.receiver.answer(number, 0, StateId::NONE);
            }
            Err(error) => panic!("the sender broke the protocol: {error}"),
        }
        self.receiver.applied(number);
    }

    fn store_pages(&mut self, batch: &Batch<'_>, body: &[u8]) -> Result<(), BatchError> {
        let target = batch.target;
        let mut bases = Vec::new();
        let mut hashes = Vec::new();
        let mut shared = Vec::new();
        let mut names = batch.shared();
        for (vaddr, kind) in batch.bases() {
            if kind == PageKind::Shared {
                let (_, of) = names.next().expect("a name for every shared page");
                let other = &self.building[&self.opened[usize::from(of)]];
                let Entry::Data(page) = &other[&number_of(vaddr)] else {
                    panic!("a page is named that did not come in this session");
                };
                hashes.push(self.hasher.hash(page));
                shared.extend_from_slice(page);
                continue;
            }
            let base = self.base(target, vaddr);
            hashes.push(
                base.as_ref()
                    .map_or(PageHash::default(), |b| self.hasher.hash(b)),
            );
            if kind == PageKind::Delta {
                bases.extend_from_slice(&base.unwrap_or_else(|| vec![0; PAGE.as_usize()].into()));
            }
        }
        batch.agree(&self.hasher, hashes)?;
        let mut unpacked = Vec::new();
        self.unpacker.unpack(batch, &bases, &mut unpacked)?;
        let image = self.building.entry(target).or_default();
        for (vaddr, place) in batch.places() {
            let entry = match place {
                Place::Zero => Entry::Data(vec![0; PAGE.as_usize()].into()),
                Place::Same => Entry::InParent,
                Place::Body(range) => Entry::Data(body[range].into()),
                Place::Unpacked(range) => Entry::Data(unpacked[range].into()),
                Place::Shared(range) => Entry::Data(shared[range].into()),
            };
            image.insert(number_of(vaddr), entry);
        }
        for run in batch.runs() {
            if run.flags.has(PageFlags::PARENT) {
                let (start, end) = (run.range.start().get(), run.range.end().get());
                for number in start / PAGE.bytes()..end / PAGE.bytes() {
                    image.insert(number, Entry::InParent);
                }
            }
        }
        Ok(())
    }

    /// Hashes of the parent's pages, a few to a frame.
    fn answer_hashes(&mut self, stream: u16, wanted: WantHashes) {
        let parent = self.parent();
        let pages = parent.and_then(|parent| self.store.images[parent].get(&wanted.target));
        let from = number_of(wanted.from);
        let numbers: Vec<u64> = pages
            .map(|pages| pages.range(from..).map(|(number, _)| *number).collect())
            .unwrap_or_default();
        let groups: Vec<&[u64]> = numbers.chunks(11).collect();
        let replies = self.replies.entry(stream).or_default();
        for (at, group) in groups.iter().enumerate() {
            let last = at + 1 == groups.len();
            let mut runs: Vec<PageRange> = Vec::new();
            let mut hashes = Vec::new();
            for number in *group {
                let start = number * PAGE.bytes();
                match runs.last_mut() {
                    Some(run) if run.end().get() == start => {
                        *run = PageRange::new(run.start().get(), start + PAGE.bytes());
                    }
                    _ => runs.push(PageRange::new(start, start + PAGE.bytes())),
                }
                let page = self
                    .store
                    .page(parent.expect("it has pages"), wanted.target, *number);
                hashes.push(self.hasher.hash(&page.expect("a hole stands on a page")));
            }
            let mut frame = Vec::new();
            Hashes::encode(wanted.target, PAGE, &runs, &hashes, last, &mut frame);
            replies.push_back(frame);
        }
        if groups.is_empty() {
            let mut frame = Vec::new();
            Hashes::encode(wanted.target, PAGE, &[], &[], true, &mut frame);
            replies.push_back(frame);
        }
    }

    fn fail(&mut self, code: FailCode, why: &str) {
        let fail = Fail::new(code, why);
        self.receiver.fail(fail.clone());
        self.failure = Some(fail);
    }
}

impl Part for ReceivingEnd {
    fn stream_up(&mut self, key: StreamKey, peer: &Hello) {
        self.session = Some(peer.session);
        self.replies.remove(&key.stream);
        self.receiver.stream_up(key.stream);
    }

    fn stream_down(&mut self, key: StreamKey) {
        self.replies.remove(&key.stream);
        self.receiver.stream_down(key.stream);
    }

    fn frame(&mut self, key: StreamKey, kind: Kind, number: u64, body: &[u8]) -> bool {
        if self.failure.is_some() {
            return false;
        }
        if !kind.is_numbered() {
            match self.receiver.handle(kind, body) {
                Ok(ReceiverEvent::WantHashes(wanted)) => self.answer_hashes(key.stream, wanted),
                Ok(ReceiverEvent::Failed(fail)) => self.lost(&fail.text),
                Ok(ReceiverEvent::Bye) => self.status = Status::Done,
                Err(error) => panic!("the sender broke the protocol: {error}"),
            }
            return true;
        }
        match self.receiver.handle_numbered(number, body.len() as u64) {
            Ok(Arrival::Next) => self.apply(number, kind, body),
            Ok(Arrival::Held) => {
                self.stats.held_frames += 1;
                self.held.insert(number, (kind, body.to_vec()));
            }
            Ok(Arrival::Again) => {
                self.stats.repeated_frames += 1;
                return false;
            }
            Err(error) => panic!("the sender broke the protocol: {error}"),
        }
        while self.failure.is_none()
            && let Some(number) = self.receiver.next_held()
        {
            let (kind, body) = self.held.remove(&number).expect("held frames are kept");
            self.apply(number, kind, &body);
        }
        true
    }

    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>> {
        if let Some(reply) = self.receiver.poll(key.stream, 0) {
            let mut frame = Vec::new();
            reply.encode(&mut frame);
            return Some(frame);
        }
        self.replies.get_mut(&key.stream)?.pop_front()
    }

    fn lost(&mut self, why: &str) {
        if self.status() == Status::Going {
            self.status = if self.published {
                Status::Done
            } else {
                Status::Failed(why.to_owned())
            };
        }
    }

    /// The disk is full.
    fn abort(&mut self) {
        if !self.published {
            self.fail(FailCode::Receiver, "no space left on device");
        }
    }

    fn failure(&self) -> Option<Fail> {
        self.failure.clone()
    }

    fn status(&self) -> Status {
        match &self.failure {
            Some(fail) if self.receiver.has_sent_failure() => Status::Failed(fail.text.clone()),
            _ => self.status.clone(),
        }
    }
}
