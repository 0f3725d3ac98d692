//! What a power cut may leave of directories that a program writes to: made of its steps ([`crate::recording`]).
//!
//! ```text
//! step      make, rename, unlink, mkdir, symlink -> a change of names: safe once the directory is waited for
//!           write                                -> contents: safe once the file is waited for
//! states()  the safe names, with any part of the changes since; each file whole, half or empty that is not safe
//! ```
//!
//! A disk may take names in any order until the directory that has them is waited for. A rename to another directory is
//! one change, which that directory makes safe. Links are safe with their names.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::recording::Step;

/// Names that wait for the disk, of which every part is tried: each doubles the states. Of more names, all beginnings
/// are tried, and all parts that have at most two of them, or lack at most two.
const EVERY_PART_MAX: usize = 10;

/// How many names may wait for the disk at most.
const PENDING_MAX: usize = 31;

/// A name in a directory, which has a number.
type Name = (usize, OsString);

/// What a file holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Contents {
    Whole,
    Half,
    Nothing,
}

/// What a name leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Node {
    File,
    Directory,
    Link(PathBuf),
}

#[derive(Clone, Debug)]
enum Change {
    Given(Name, usize),
    Moved(Name, Name, usize),
    Taken(Name),
}

impl Change {
    /// The directory that makes it safe.
    fn directory(&self) -> usize {
        match self {
            Change::Given((directory, _), _)
            | Change::Moved(_, (directory, _), _)
            | Change::Taken((directory, _)) => *directory,
        }
    }

    fn apply(&self, names: &mut BTreeMap<Name, usize>) {
        match self {
            Change::Given(name, node) => drop(names.insert(name.clone(), *node)),
            Change::Taken(name) => drop(names.remove(name)),
            Change::Moved(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
        }
    }
}

/// What a power cut has left: names, what they lead to, and how much of it is there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct State(BTreeMap<Name, (usize, Contents)>);

/// Directories as a program sees them, and what of them is on the disk. See the module's text.
#[derive(Debug)]
pub struct Disk {
    roots: Vec<PathBuf>,
    /// By their numbers; the roots come first.
    nodes: Vec<Node>,
    names: BTreeMap<Name, usize>,
    safe_names: BTreeMap<Name, usize>,
    pending: Vec<Change>,
    unsafe_files: BTreeSet<usize>,
    contents: BTreeMap<usize, Vec<u8>>,
}

impl Disk {
    /// With all that is in these directories now.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn of(roots: &[&Path]) -> Result<Disk> {
        let mut disk = Disk {
            roots: roots.iter().map(|root| root.to_path_buf()).collect(),
            nodes: vec![Node::Directory; roots.len()],
            names: BTreeMap::new(),
            safe_names: BTreeMap::new(),
            pending: Vec::new(),
            unsafe_files: BTreeSet::new(),
            contents: BTreeMap::new(),
        };
        for (number, root) in roots.iter().enumerate() {
            disk.read_in(number, root)?;
        }
        disk.safe_names = disk.names.clone();
        disk.read_contents()?;
        Ok(disk)
    }

    fn read_in(&mut self, directory: usize, path: &Path) -> Result<()> {
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let node = if kind.is_dir() {
                Node::Directory
            } else if kind.is_symlink() {
                Node::Link(fs::read_link(entry.path())?)
            } else {
                Node::File
            };
            let number = self.add(node);
            self.names.insert((directory, entry.file_name()), number);
            if kind.is_dir() {
                self.read_in(number, &entry.path())?;
            }
        }
        Ok(())
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The number of what is at `path`.
    fn find(&self, path: &Path) -> Option<usize> {
        let (root, rest) = self
            .roots
            .iter()
            .enumerate()
            .find_map(|(number, root)| Some((number, path.strip_prefix(root).ok()?)))?;
        rest.components().try_fold(root, |directory, name| {
            let name = (directory, name.as_os_str().to_owned());
            self.names.get(&name).copied()
        })
    }

    fn name(&self, path: &Path) -> Option<Name> {
        Some((self.find(path.parent()?)?, path.file_name()?.to_owned()))
    }

    fn change(&mut self, change: Change) -> bool {
        change.apply(&mut self.names);
        self.pending.push(change);
        true
    }

    fn give(&mut self, path: &Path, node: Node) -> bool {
        let Some(name) = self
            .name(path)
            .filter(|name| !self.names.contains_key(name))
        else {
            return false;
        };
        let number = self.add(node);
        self.change(Change::Given(name, number))
    }

    /// Takes a step. False if nothing that a cut may leave is new.
    pub fn take(&mut self, step: &Step) -> bool {
        match step {
            Step::Make(path) => self.give(path, Node::File),
            Step::MakeDir(path) => self.give(path, Node::Directory),
            Step::Link(path, target) => self.give(path, Node::Link(target.clone())),
            Step::Write(path) => match self.find(path) {
                Some(file) => self.unsafe_files.insert(file),
                None => false,
            },
            Step::Sync(path) => match self.find(path) {
                Some(node) if self.nodes[node] == Node::Directory => {
                    self.sync_names(node);
                    true
                }
                Some(file) => self.unsafe_files.remove(&file),
                None => false,
            },
            Step::Rename(from, to) => {
                let (Some(from), Some(to)) = (self.name(from), self.name(to)) else {
                    return false;
                };
                match self.names.get(&from) {
                    Some(node) => self.change(Change::Moved(from, to, *node)),
                    None => false,
                }
            }
            Step::Unlink(path) => match self.name(path) {
                Some(name) if self.names.contains_key(&name) => self.change(Change::Taken(name)),
                _ => false,
            },
        }
    }

    fn sync_names(&mut self, directory: usize) {
        let (safe, pending) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|change| change.directory() == directory);
        self.pending = pending;
        let safe: Vec<Change> = safe;
        for change in safe {
            change.apply(&mut self.safe_names);
        }
    }

    /// Everything that a cut may leave now.
    ///
    /// # Panics
    /// Too many names wait for the disk.
    pub fn states(&self, states: &mut BTreeSet<State>) {
        let pending = self.pending.len();
        assert!(pending <= PENDING_MAX, "{:?}", self.pending);
        for part in parts(pending) {
            let mut names = self.safe_names.clone();
            for (bit, change) in self.pending.iter().enumerate() {
                if part >> bit & 1 == 1 {
                    change.apply(&mut names);
                }
            }
            for contents in [Contents::Whole, Contents::Half, Contents::Nothing] {
                states.insert(self.state(&names, contents));
            }
        }
    }

    /// The names that can be reached, in a moment when files that are not safe hold `contents`.
    fn state(&self, names: &BTreeMap<Name, usize>, contents: Contents) -> State {
        let mut state = BTreeMap::new();
        let mut directories: Vec<usize> = (0..self.roots.len()).collect();
        while let Some(directory) = directories.pop() {
            let first = (directory, OsString::new());
            let behind = (directory + 1, OsString::new());
            for (name, node) in names.range(first..behind) {
                let held = match self.unsafe_files.contains(node) {
                    true => contents,
                    false => Contents::Whole,
                };
                state.insert(name.clone(), (*node, held));
                if self.nodes[*node] == Node::Directory {
                    directories.push(*node);
                }
            }
        }
        State(state)
    }

    /// Reads what the files hold now, and checks that all names are known. To be called at the beginning and the end:
    /// a file is written once.
    ///
    /// # Errors
    /// There is a name that no step has made, or none that a step has made.
    pub fn read_contents(&mut self) -> Result<()> {
        for number in 0..self.roots.len() {
            let path = self.roots[number].clone();
            self.read_files(number, &path)?;
        }
        Ok(())
    }

    fn read_files(&mut self, directory: usize, path: &Path) -> Result<()> {
        let mut there = BTreeSet::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = (directory, entry.file_name());
            let node = self.names.get(&name).copied();
            let at = entry.path();
            let node = node.with_context(|| format!("no step has made {}", at.display()))?;
            match self.nodes[node] {
                Node::Directory => self.read_files(node, &at)?,
                Node::File => drop(self.contents.insert(node, fs::read(&at)?)),
                Node::Link(_) => {}
            }
            there.insert(name);
        }
        for name in self.names.keys().filter(|(number, _)| *number == directory) {
            ensure!(there.contains(name), "{name:?} is not there");
        }
        Ok(())
    }

    /// Writes a state out: what was below the first root goes to the first of `to`, and so on.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_out(&self, state: &State, to: &[&Path]) -> Result<()> {
        for (root, to) in to.iter().enumerate() {
            self.write_directory(state, root, to)?;
        }
        Ok(())
    }

    fn write_directory(&self, state: &State, directory: usize, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        let first = (directory, OsString::new());
        let behind = (directory + 1, OsString::new());
        for ((_, name), (node, contents)) in state.0.range(first..behind) {
            let path = to.join(name);
            match &self.nodes[*node] {
                Node::Directory => self.write_directory(state, *node, &path)?,
                Node::Link(target) => symlink(target, &path)?,
                Node::File => {
                    // What was removed in the end has never held anything that is looked at.
                    let bytes = self.contents.get(node).map_or(&[][..], Vec::as_slice);
                    let length = match contents {
                        Contents::Whole => bytes.len(),
                        Contents::Half => bytes.len() / 2,
                        Contents::Nothing => 0,
                    };
                    fs::write(&path, &bytes[..length])?;
                }
            }
        }
        Ok(())
    }
}

/// Parts of so many changes, a bit for each.
fn parts(changes: usize) -> BTreeSet<u32> {
    let all = (1_u32 << changes) - 1;
    if changes <= EVERY_PART_MAX {
        return (0..=all).collect();
    }
    let mut parts = BTreeSet::new();
    for one in 0..changes {
        parts.insert((1 << one) - 1);
        for other in 0..changes {
            let few = 1 << one | 1 << other;
            parts.extend([few, 1 << one, 0, all & !few, all & !(1 << one), all]);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(disk: &Disk) -> usize {
        let mut states = BTreeSet::new();
        disk.states(&mut states);
        states.len()
    }

    #[test]
    fn what_is_not_waited_for_may_be_lost() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        let (part, name) = (root.join("x.part"), root.join("x"));
        let mut disk = Disk::of(&[root]).unwrap();
        assert!(disk.take(&Step::Make(part.clone())));
        // Absent, or empty.
        assert_eq!(states(&disk), 2);
        assert!(disk.take(&Step::Write(part.clone())));
        assert_eq!(states(&disk), 4);
        assert!(disk.take(&Step::Sync(part.clone())));
        assert_eq!(states(&disk), 2);
        assert!(disk.take(&Step::Rename(part.clone(), name.clone())));
        // Absent, or under either name.
        assert_eq!(states(&disk), 3);
        assert!(disk.take(&Step::Sync(root.to_owned())));
        assert_eq!(states(&disk), 1);
        fs::write(&name, "1234").unwrap();
        disk.read_contents().unwrap();
        let mut all = BTreeSet::new();
        disk.states(&mut all);
        let to = tmp.path().join("to");
        disk.write_out(all.first().unwrap(), &[&to]).unwrap();
        assert_eq!(fs::read(to.join("x")).unwrap(), b"1234");
    }

    #[test]
    fn a_directory_moves_with_all_that_is_in_it() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        let (part, dir) = (root.join("d.part"), root.join("d"));
        let mut disk = Disk::of(&[root]).unwrap();
        for step in [
            Step::MakeDir(part.clone()),
            Step::Make(part.join("x")),
            Step::Link(part.join("parent"), "../y".into()),
            Step::Sync(part.clone()),
            Step::Rename(part.clone(), dir.clone()),
        ] {
            assert!(disk.take(&step), "{step:?}");
        }
        // Nothing, or the directory with both, under either name.
        assert_eq!(states(&disk), 3);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("x"), "").unwrap();
        disk.read_contents().unwrap_err();
        symlink("../y", dir.join("parent")).unwrap();
        disk.read_contents().unwrap();
    }

    #[test]
    fn of_many_changes_some_parts_are_tried() {
        assert_eq!(parts(3).len(), 8);
        let some = parts(20);
        assert!(some.len() < 500);
        for part in [0, 1, 0b11, 0b1_1111, (1 << 20) - 1, (1 << 20) - 6] {
            assert!(some.contains(&part), "{part:b}");
        }
    }
}
