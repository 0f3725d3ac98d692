//! Whose turn it is: faults go round between processes, the background between families.

use super::{Planner, Request};
use crate::lazy::answer::SpaceId;
use crate::lazy::extents::Piece;
use crate::lazy::space::Space;
use crate::units::PageRange;

/// Members of a family that get all that comes for one of them, the oldest. A younger one gets what its threads
/// wait for: most end before they need more, and each copy costs time.
const SHARING_MAX: usize = 16;

#[derive(Clone, Copy)]
enum Turn {
    Stream = 0,
    Local = 1,
}

impl Planner {
    /// `request` goes out: what it brings is on the way for those of the family that get all that comes.
    pub fn sent(&mut self, request: &Request) {
        let family = self.families.get(&request.pid).into_iter().flatten();
        for id in family.take(SHARING_MAX) {
            if *id != request.space
                && let Some(member) = self.spaces.get_mut(id)
            {
                member.space.pushed(request.image);
            }
        }
    }

    /// Whether `id` gets the pages `image`, which came for another one of its family: if a thread waits for one,
    /// or if it is one of the oldest. To others they are not on the way any more.
    pub fn shares(&mut self, id: SpaceId, image: PageRange) -> bool {
        let Some(member) = self.spaces.get_mut(&id) else {
            return false;
        };
        let family = self.families.get(&member.space.pid());
        let mut oldest = family.into_iter().flatten().take(SHARING_MAX);
        let shares = oldest.any(|one| *one == id) || member.space.awaits(image);
        match shares {
            true => member.space.pushed(image),
            false => member.space.give_back(image),
        }
        shares
    }

    /// The next request that a thread waits for, or that goes with one.
    pub fn next_urgent(&mut self) -> Option<Request> {
        for _ in 0..self.urgent_turn.len() {
            let id = self.urgent_turn.pop_front()?;
            self.urgent_turn.push_back(id);
            let Some(member) = self.spaces.get_mut(&id).filter(|member| !member.paused) else {
                continue;
            };
            if let Some(wanted) = member.space.next_urgent() {
                return Some(Request::new(id, &member.space, wanted));
            }
        }
        None
    }

    /// The next request of the background stream, of at most `chunk` bytes. Families with pages of a working set come
    /// before those without.
    pub fn next_stream(&mut self, chunk: u64, gap: u64) -> Option<Request> {
        let next = |id: SpaceId, space: &mut Space| {
            let wanted = space.next_stream(chunk, gap)?;
            Some(Request::new(id, space, wanted))
        };
        self.next_first(Turn::Stream, next)
            .or_else(|| self.next_in_turn(Turn::Stream, next))
    }

    /// The next request for pages of a working set, of at most `chunk` bytes. With policies that put it off it may be for
    /// others.
    pub fn next_of_working_set(&mut self, chunk: u64) -> Option<Request> {
        self.next_first(Turn::Stream, |id, space| {
            let wanted = space.next_stream(chunk, 0)?;
            Some(Request::new(id, space, wanted))
        })
    }

    /// What `next` finds in a family that has pages of a working set.
    fn next_first<T>(
        &mut self,
        turn: Turn,
        mut next: impl FnMut(SpaceId, &mut Space) -> Option<T>,
    ) -> Option<T> {
        if !self.has_first[turn as usize] {
            return None;
        }
        let mut any = false;
        let found = self.next_in_turn(turn, |id, space| {
            let has_first = space.has_first(matches!(turn, Turn::Local));
            any |= has_first;
            if has_first { next(id, space) } else { None }
        });
        // Paused members are not asked.
        self.has_first[turn as usize] = any || self.spaces.values().any(|member| member.paused);
        found
    }

    /// The next piece to install from local images, of at most `chunk` bytes.
    pub fn next_local(&mut self, chunk: u64) -> Option<(SpaceId, Piece)> {
        let next =
            |id: SpaceId, space: &mut Space| space.next_local(chunk).map(|piece| (id, piece));
        self.next_first(Turn::Local, next)
            .or_else(|| self.next_in_turn(Turn::Local, next))
    }

    /// The piece behind that of [`Planner::next_local`] which was for `id`, of at most `chunk` bytes.
    pub fn more_local(&mut self, id: SpaceId, chunk: u64) -> Option<Piece> {
        let member = self.spaces.get_mut(&id).filter(|member| !member.paused)?;
        member.space.next_local(chunk)
    }

    /// What `next` finds with the oldest member of the next family where it finds something.
    fn next_in_turn<T>(
        &mut self,
        turn: Turn,
        mut next: impl FnMut(SpaceId, &mut Space) -> Option<T>,
    ) -> Option<T> {
        let turns = &mut self.turns[turn as usize];
        for _ in 0..turns.len() {
            let pid = turns.pop_front()?;
            turns.push_back(pid);
            for id in self.families.get(&pid).into_iter().flatten() {
                let member = self.spaces.get_mut(id).filter(|member| !member.paused);
                if let Some(found) = member.and_then(|member| next(*id, &mut member.space)) {
                    return Some(found);
                }
            }
        }
        None
    }

    /// Nothing is asked for or installed for `id` until [`Planner::resume`]; its faults are remembered.
    pub fn pause(&mut self, id: SpaceId) {
        if let Some(member) = self.spaces.get_mut(&id) {
            member.paused = true;
        }
    }

    /// Takes [`Planner::pause`] back.
    pub fn resume(&mut self, id: SpaceId) {
        if let Some(member) = self.spaces.get_mut(&id) {
            member.paused = false;
        }
    }
}
