//! What is to be done to the destination's tree so that it becomes the source's. Pure.
//!
//! ```text
//! park     files that are elsewhere in the source lose their old names
//! remove   names that are not wanted, from the leaves to the root
//! make     directories, files, further names, from the root to the leaves
//! contents of files: length, blocks whose hashes differ
//! attributes of files, then of directories: making names changes their times
//! ```

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::index::{BadOperation, BlockHash, Id, Index, Kind, Node};
use super::operation::{Made, Operation};

/// Most blocks of one step: 256 KiB.
const STEP_BLOCKS: usize = 16;

/// One step. What it reads of a file is read when it is carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Do(Operation),
    /// Send these blocks of the source's file of this path.
    Send {
        path: Vec<u8>,
        first: u64,
        blocks: u64,
    },
}

/// Makes `have` into `want`. `before` is what `want` was the last time: a file that it had elsewhere was renamed.
pub(super) fn plan(
    have: &Index,
    want: &Index,
    before: Option<&Index>,
) -> Result<Vec<Step>, BadOperation> {
    let mut planner = Planner {
        state: have.clone(),
        steps: Vec::new(),
    };
    let matched = Matched::find(have, want, before);
    let parked = planner.park(have, want, &matched)?;
    planner.remove(have, want, &matched)?;
    planner.make(want, &matched, parked)?;
    planner.contents(want)?;
    planner.attributes(want)?;
    Ok(planner.steps)
}

/// Which file of the destination becomes which of the source.
struct Matched {
    /// By the source's.
    files: HashMap<Id, Id>,
    /// Where those are that have none of their names at the destination.
    elsewhere: Vec<(Id, Vec<u8>)>,
}

impl Matched {
    fn find(have: &Index, want: &Index, before: Option<&Index>) -> Matched {
        let mut matched = Matched {
            files: HashMap::new(),
            elsewhere: Vec::new(),
        };
        let mut taken = HashSet::new();
        // The same file under the same name.
        matched.by_name(have, want, &mut taken, &|path, id| {
            before.is_none_or(|before| before.id(path) == Some(id))
        });
        let is_file =
            |node: Option<&Node>| node.is_some_and(|node| matches!(node.kind, Kind::File(..)));
        for (path, id) in before.into_iter().flat_map(Index::names) {
            let Some(old) = have.id(path) else { continue };
            let is_renamed = is_file(want.node(id)) && !matched.files.contains_key(&id);
            if is_renamed && is_file(have.node(old)) && taken.insert(old) {
                matched.files.insert(id, old);
                matched.elsewhere.push((id, path.to_vec()));
            }
        }
        // Another file under the name of one that is gone.
        matched.by_name(have, want, &mut taken, &|_, _| true);
        matched
    }

    /// Matches files that have a name in common, where `fits` says so.
    fn by_name(
        &mut self,
        have: &Index,
        want: &Index,
        taken: &mut HashSet<Id>,
        fits: &dyn Fn(&[u8], Id) -> bool,
    ) {
        for (path, id) in want.names() {
            let wanted = want.node(id).filter(|node| !node.kind.is_directory());
            let old = have.id(path).filter(|old| !taken.contains(old));
            let (Some(wanted), Some(old)) = (wanted, old) else {
                continue;
            };
            let can = have
                .node(old)
                .is_some_and(|node| node.kind.can_become(&wanted.kind));
            if can && !self.files.contains_key(&id) && fits(path, id) {
                self.files.insert(id, old);
                taken.insert(old);
            }
        }
    }

    /// Whether the destination's name stays as it is.
    fn keeps(&self, have: &Index, want: &Index, path: &[u8]) -> bool {
        let (Some(old), Some(new)) = (have.id(path), want.id(path)) else {
            return false;
        };
        let is_directory = |node: Option<&Node>| node.is_some_and(|node| node.kind.is_directory());
        match (is_directory(have.node(old)), is_directory(want.node(new))) {
            (true, true) => true,
            (false, false) => self.files.get(&new) == Some(&old),
            _ => false,
        }
    }
}

struct Planner {
    /// The destination's tree after the steps so far.
    state: Index,
    steps: Vec<Step>,
}

impl Planner {
    fn push(&mut self, operation: Operation) -> Result<(), BadOperation> {
        self.state.apply(&operation, &|_| BlockHash::UNKNOWN)?;
        self.steps.push(Step::Do(operation));
        Ok(())
    }

    /// Parks renamed files; the parking place of each, by the source's file.
    fn park(
        &mut self,
        have: &Index,
        want: &Index,
        matched: &Matched,
    ) -> Result<HashMap<Id, u32>, BadOperation> {
        let mut parked = HashMap::new();
        for (slot, (id, path)) in (0_u32..).zip(&matched.elsewhere) {
            if matched.keeps(have, want, path) {
                continue;
            }
            self.push(Operation::Park {
                path: path.clone(),
                slot,
            })?;
            parked.insert(*id, slot);
        }
        Ok(parked)
    }

    fn remove(
        &mut self,
        have: &Index,
        want: &Index,
        matched: &Matched,
    ) -> Result<(), BadOperation> {
        for (path, _) in have.names().rev() {
            let is_there = self.state.id(path).is_some();
            if is_there && !path.is_empty() && !matched.keeps(have, want, path) {
                self.push(Operation::Remove {
                    path: path.to_vec(),
                })?;
            }
        }
        Ok(())
    }

    fn make(
        &mut self,
        want: &Index,
        matched: &Matched,
        parked: HashMap<Id, u32>,
    ) -> Result<(), BadOperation> {
        let mut parked = parked;
        // A name under which each file is to be had by now.
        let mut named: HashMap<Id, Vec<u8>> = HashMap::new();
        for (path, id) in want.names() {
            if let (Some(old), Some(now)) = (matched.files.get(&id), self.state.id(path))
                && *old == now
            {
                named.entry(id).or_insert_with(|| path.to_vec());
            }
        }
        for (path, id) in want.names() {
            // Whatever is there by now is what stays.
            if self.state.id(path).is_some() {
                continue;
            }
            let Some(node) = want.node(id) else { continue };
            let path = path.to_vec();
            if let Some(slot) = parked.remove(&id) {
                named.insert(id, path.clone());
                self.push(Operation::Place { slot, path })?;
            } else if let Some(from) = named.get(&id) {
                let from = from.clone();
                self.push(Operation::Link { from, path })?;
            } else {
                if !node.kind.is_directory() {
                    named.insert(id, path.clone());
                }
                let made = made(&node.kind);
                self.push(Operation::Make { path, made })?;
            }
        }
        Ok(())
    }

    fn contents(&mut self, want: &Index) -> Result<(), BadOperation> {
        let mut done = HashSet::new();
        for (path, id) in want.names() {
            let Some(Kind::File(size, wanted)) = want.node(id).map(|node| &node.kind) else {
                continue;
            };
            if !done.insert(id) {
                continue;
            }
            let Some(Kind::File(now, blocks)) = self.state.at(path).map(|node| &node.kind) else {
                continue;
            };
            if now == size && blocks == wanted {
                continue;
            }
            if now != size {
                self.push(Operation::Size {
                    path: path.to_vec(),
                    size: *size,
                })?;
            }
            self.blocks(path, wanted)?;
        }
        Ok(())
    }

    /// Sends the blocks of one file that differ.
    fn blocks(&mut self, path: &[u8], wanted: &Arc<Vec<BlockHash>>) -> Result<(), BadOperation> {
        let now = self.state.blocks(path)?.to_vec();
        let kind = |at: usize| match (now.get(at), wanted.get(at)) {
            (_, None) => None,
            (now, wanted) if now == wanted => None,
            (_, Some(wanted)) => Some(*wanted == BlockHash::ZEROS),
        };
        let mut at = 0;
        while at < wanted.len() {
            let Some(zeros) = kind(at) else {
                at += 1;
                continue;
            };
            let most = if zeros { wanted.len() } else { STEP_BLOCKS };
            let run = (at..wanted.len())
                .take(most)
                .take_while(|at| kind(*at) == Some(zeros))
                .count();
            let (first, blocks) = (at as u64, run as u64);
            let path = path.to_vec();
            match zeros {
                true => self.push(Operation::Zeros {
                    path,
                    first,
                    blocks,
                })?,
                false => {
                    let hashes = wanted.get(at..at + run).unwrap_or_default();
                    self.state.set_blocks(&path, first, hashes)?;
                    self.steps.push(Step::Send {
                        path,
                        first,
                        blocks,
                    });
                }
            }
            at += run;
        }
        Ok(())
    }

    fn attributes(&mut self, want: &Index) -> Result<(), BadOperation> {
        let is_directory = |node: &Node| node.kind.is_directory();
        let files = want
            .names()
            .filter(|(_, id)| !want.node(*id).is_some_and(is_directory));
        let dirs = want
            .names()
            .rev()
            .filter(|(_, id)| want.node(*id).is_some_and(is_directory));
        for (path, id) in files.chain(dirs) {
            let wanted = want.node(id).and_then(|node| node.attributes.clone());
            let now = self.state.at(path).and_then(|node| node.attributes.clone());
            if let Some(wanted) = wanted
                && now.as_ref() != Some(&wanted)
            {
                self.push(Operation::Attributes {
                    path: path.to_vec(),
                    attributes: Arc::unwrap_or_clone(wanted),
                })?;
            }
        }
        Ok(())
    }
}

fn made(kind: &Kind) -> Made {
    match kind {
        Kind::Directory => Made::Directory,
        Kind::File(..) => Made::File,
        Kind::Symlink(target) => Made::Symlink(target.clone()),
        Kind::Fifo => Made::Fifo,
        Kind::Socket => Made::Socket,
        Kind::CharDevice(number) => Made::CharDevice(*number),
        Kind::BlockDevice(number) => Made::BlockDevice(*number),
    }
}

#[cfg(test)]
mod tests;
