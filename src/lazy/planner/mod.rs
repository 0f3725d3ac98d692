//! The post-copy brain: every process's missing memory, and who is served next.
//!
//! The engine tells it what happens (faults, the kernel's events, answers) and asks what to do:
//!
//! ```text
//! handle_fault, handle_remap, ... -> Space -> next_urgent   (faults: first, round robin)
//! settle, gone, give_back         ->       -> next_stream   (background: when the window has room)
//!                                          -> next_local    (background from local images)
//! ```
//!
//! `turns` decides whose turn it is, `account` counts pages by their outcome.
//!
//! Nothing is lost: a page is asked for, on the way, installed or gone, and a page that was asked
//! for and did not come is asked for again.
//!
//! A process and the children that it forked since are a family: what its source or its images have,
//! they have for all of them. The background serves the oldest that lacks something, and what comes is
//! for every one that lacks it ([`Planner::next_sibling`]), so that children who live for a
//! moment cost nothing. Pages are counted once, for the process that the images know; when that
//! ends, its oldest living child is counted in its place.

mod account;
mod turns;

use std::collections::{BTreeMap, VecDeque};

pub use self::account::{Counts, PageOutcome};
pub use super::answer::SpaceId;
use super::extents::Piece;
use super::policy::{ADAPTIVE, Policy};
use super::space::{Class, FaultAnswer, FetchLimits, Served, Space, Wanted};
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages to ask the source for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Who needs them.
    pub space: SpaceId,
    /// Whose they were in the dump.
    pub pid: u32,
    /// Their addresses in the dump.
    pub image: PageRange,
    /// Why.
    pub class: Class,
}

impl Request {
    fn new(id: SpaceId, space: &Space, wanted: Wanted) -> Request {
        Request {
            space: id,
            pid: space.pid(),
            image: wanted.image,
            class: wanted.class,
        }
    }
}

/// One process and how it is treated.
#[derive(Debug)]
struct Member {
    space: Space,
    /// Its pages are counted.
    counted: bool,
    /// Nothing is asked for or installed for it now.
    paused: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Planner {
    page: PageSize,
    policy: &'static dyn Policy,
    spaces: BTreeMap<SpaceId, Member>,
    /// The living members of each family, the oldest first, by the pid in the images.
    families: BTreeMap<u32, Vec<SpaceId>>,
    next_id: u32,
    /// Whose fault is next.
    urgent_turn: VecDeque<SpaceId>,
    /// Whose background is next: the stream, local images.
    turns: [VecDeque<u32>; 2],
    /// Some family may have pages that come before all others, for the same two.
    has_first: [bool; 2],
    counts: Counts,
    /// What nobody needs of the local images any more, by the images' pids and addresses in the dump.
    unneeded: Vec<(u32, PageRange)>,
    /// Pages of the dump that are counted.
    total_pages: u64,
}

impl Planner {
    /// A planner without processes.
    pub fn new(page: PageSize) -> Planner {
        Planner::with_policy(page, &ADAPTIVE)
    }

    /// A planner without processes, for which `policy` decides.
    pub fn with_policy(page: PageSize, policy: &'static dyn Policy) -> Planner {
        Planner {
            page,
            policy,
            spaces: BTreeMap::new(),
            families: BTreeMap::new(),
            next_id: 0,
            urgent_turn: VecDeque::new(),
            turns: Default::default(),
            has_first: [false; 2],
            counts: Counts::default(),
            unneeded: Vec::new(),
            total_pages: 0,
        }
    }

    /// Who decides what faults bring and in what order the stream runs.
    pub fn policy(&self) -> &'static dyn Policy {
        self.policy
    }

    /// Lets `policy` decide from now on, of all processes.
    pub fn set_policy(&mut self, policy: &'static dyn Policy) {
        self.policy = policy;
        self.spaces_mut().for_each(|space| space.set_policy(policy));
    }

    /// A process to care for.
    pub fn add(&mut self, space: Space) -> SpaceId {
        self.total_pages += space.missing_bytes() >> self.page.shift();
        self.add_member(space, true)
    }

    /// The next process or child gets the number `id`, unless that was given already.
    pub fn number_from(&mut self, id: SpaceId) {
        self.next_id = self.next_id.max(id.0);
    }

    fn add_member(&mut self, mut space: Space, counted: bool) -> SpaceId {
        space.set_policy(self.policy);
        note_first(&mut self.has_first, &mut space);
        let id = SpaceId(self.next_id);
        self.next_id += 1;
        let family = self.families.entry(space.pid()).or_default();
        if family.is_empty() {
            let pid = space.pid();
            self.turns.iter_mut().for_each(|turn| turn.push_back(pid));
        }
        family.push(id);
        self.urgent_turn.push_back(id);
        let member = Member {
            space,
            counted,
            paused: false,
        };
        self.spaces.insert(id, member);
        id
    }

    /// See [`Space::stream_first`].
    pub fn stream_first(&mut self, id: SpaceId, order: Vec<PageRange>) -> u64 {
        let Some(member) = self.spaces.get_mut(&id) else {
            return 0;
        };
        let missing = member.space.stream_first(order);
        note_first(&mut self.has_first, &mut member.space);
        missing
    }

    /// The process of `id`, as long as it lives.
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(&id).map(|member| &member.space)
    }

    fn space_mut(&mut self, id: SpaceId) -> Option<&mut Space> {
        self.spaces.get_mut(&id).map(|member| &mut member.space)
    }

    fn spaces_mut(&mut self) -> impl Iterator<Item = &mut Space> {
        self.spaces.values_mut().map(|member| &mut member.space)
    }

    /// The process that the images call `pid`, and the children that it forked since.
    pub fn ids_of(&self, pid: u32) -> Vec<SpaceId> {
        self.families.get(&pid).cloned().unwrap_or_default()
    }

    /// The next member of the family of `pid` behind `after` in age, or the oldest one.
    pub fn next_sibling(&self, pid: u32, after: Option<SpaceId>) -> Option<SpaceId> {
        let family = self.families.get(&pid)?;
        let next = after.map_or(0, |after| family.partition_point(|id| *id <= after));
        family.get(next).copied()
    }

    /// All processes.
    pub fn spaces(&self) -> impl Iterator<Item = (SpaceId, &Space)> {
        self.spaces.iter().map(|(id, member)| (*id, &member.space))
    }

    /// What only the source had at the start, by the images' pids.
    pub fn origins(&self) -> BTreeMap<u32, Vec<PageRange>> {
        self.spaces()
            .map(|(_, space)| (space.pid(), space.origins().to_vec()))
            .collect()
    }

    /// Whether every page of every process is installed or gone.
    pub fn is_complete(&self) -> bool {
        self.spaces().all(|(_, space)| space.is_complete())
    }

    /// How many processes there have been.
    pub fn added(&self) -> u64 {
        u64::from(self.next_id)
    }

    /// A thread of `id` touched `addr`.
    pub fn handle_fault(
        &mut self,
        id: SpaceId,
        addr: Vaddr,
        limits: FetchLimits,
        now_us: u64,
    ) -> FaultAnswer {
        self.space_mut(id)
            .map_or(FaultAnswer::Zero, |space| space.fault(addr, limits, now_us))
    }

    /// See [`Space::fetch_ahead`].
    pub fn fetch_ahead(&mut self, id: SpaceId, addr: Vaddr) -> Option<Piece> {
        self.space_mut(id)?.fetch_ahead(addr)
    }

    /// `parent` forked.
    pub fn handle_fork(&mut self, parent: SpaceId) -> Option<SpaceId> {
        let child = self.space(parent)?.fork();
        Some(self.add_member(child, false))
    }

    /// Memory moved. `served` sees the threads that must be woken.
    pub fn handle_remap(
        &mut self,
        id: SpaceId,
        from: PageRange,
        to: Vaddr,
        served: impl FnMut(Served),
    ) {
        if let Some(space) = self.space_mut(id) {
            space.remap(from, to, served);
        }
    }

    /// The process ended.
    pub fn handle_exit(&mut self, id: SpaceId) {
        let Some(member) = self.spaces.remove(&id) else {
            return;
        };
        let Member {
            mut space, counted, ..
        } = member;
        self.urgent_turn.retain(|other| *other != id);
        let pid = space.pid();
        let family = self.families.entry(pid).or_default();
        family.retain(|other| *other != id);
        if family.is_empty() {
            self.families.remove(&pid);
            self.turns
                .iter_mut()
                .for_each(|turn| turn.retain(|other| *other != pid));
        }
        if counted {
            self.count_inherited(pid, space.missing_bytes() >> self.page.shift());
        }
        space.leave_local();
        self.note_unneeded(pid, &space.take_unneeded());
    }

    /// Whether this process was forked by one of the images, and its pages are not counted.
    pub fn is_child(&self, id: SpaceId) -> bool {
        self.spaces.get(&id).is_some_and(|member| !member.counted)
    }

    /// Whether this process was forked by one of the images, and has nothing missing any more.
    pub fn is_filled_child(&self, id: SpaceId) -> bool {
        let member = self.spaces.get(&id);
        member.is_some_and(|member| !member.counted && member.space.is_complete())
    }

    /// Where the first of the pages `image`, fetched for `id`, is to be installed now; `None` when
    /// all of them are there or gone.
    pub fn arrived(&self, id: SpaceId, image: PageRange) -> Option<Piece> {
        self.space(id)?.arrived(image)
    }

    /// The first of the pages `image` that is on its way to `id`.
    pub fn on_the_way(&self, id: SpaceId, image: PageRange) -> Option<Piece> {
        self.space(id)?.on_the_way(image)
    }

    /// The source sends the pages `image` to `id` without having been asked.
    pub fn pushed(&mut self, id: SpaceId, image: PageRange) {
        if let Some(space) = self.space_mut(id) {
            space.pushed(image);
        }
    }

    /// An answer for the family of `pid` ended before `image`, the rest of its request.
    pub fn give_back(&mut self, pid: u32, image: PageRange) {
        for id in self.ids_of(pid) {
            self.give_back_for(id, image);
        }
    }

    /// The pages `image` came and could not be kept for `id`.
    pub fn give_back_for(&mut self, id: SpaceId, image: PageRange) {
        if let Some(space) = self.space_mut(id) {
            space.give_back(image);
        }
    }

    /// Neither the local images nor the source, which was asked for them, can give the pages at `range` of `id` now.
    pub fn set_unreadable(&mut self, id: SpaceId, range: PageRange) {
        if let Some(space) = self.space_mut(id) {
            space.set_unreadable(range);
        }
    }

    /// The first page of `image` that the local images could not give and that somebody in the family of
    /// `pid` still lacks: who, and where it is now.
    pub fn first_unreadable(&self, pid: u32, image: PageRange) -> Option<(SpaceId, Piece)> {
        let family = self.families.get(&pid)?.iter();
        let mut found = family.filter_map(|id| {
            let piece = self.space(*id)?.first_unreadable(image)?;
            Some((*id, piece))
        });
        found.next()
    }

    /// The pages `image`, which were asked for, come with the push.
    pub fn await_push(&mut self, id: SpaceId, image: PageRange) {
        if let Some(space) = self.space_mut(id) {
            space.await_push(image);
        }
    }

    /// What threads of the family of `pid` wait for of the pages `image` is asked for, unless it is on the way.
    pub fn ask_again(&mut self, pid: u32, image: PageRange) {
        let family = self.spaces_mut().filter(|space| space.pid() == pid);
        family.for_each(|space| space.ask_again(image));
    }

    /// What threads wait for is asked for, unless it is on the way.
    pub fn ask_for_all_again(&mut self) {
        let everywhere = PageRange::new(0, u64::MAX);
        self.spaces_mut()
            .for_each(|space| space.ask_again(everywhere));
    }

    /// The connection is gone with everything on the way.
    pub fn give_back_all(&mut self) {
        self.spaces_mut().for_each(Space::give_back_all);
    }

    /// The source is gone for good: what only it had stays missing until it is settled.
    pub fn lose(&mut self) {
        self.spaces_mut().for_each(Space::lose);
    }

    /// The source is back after all.
    pub fn recover(&mut self) {
        self.spaces_mut().for_each(Space::recover);
    }
}

fn note_first(has_first: &mut [bool; 2], space: &mut Space) {
    has_first[0] |= space.has_first(false);
    has_first[1] |= space.has_first(true);
}

#[cfg(test)]
mod tests;
