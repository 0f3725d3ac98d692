//! What a tree of files is: names, and what stands behind each. Pure.
//!
//! Several names may lead to one file. Contents are known by a hash of each block of [`BLOCK_BYTES`]. Both ends keep
//! an index of the destination's tree and change it by the same operations ([`Index::apply`]), so that the source
//! knows what the destination has without asking.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use pageferry::limits::{FILE_BLOCKS_MAX, FILE_NAMES_MAX};
use thiserror::Error;

use super::attributes::Attributes;
use super::operation::{Made, Operation};
use super::path::{BadPath, check, parent};

/// Contents are compared and sent in blocks of so many bytes. Databases write 4 to 16 KiB at once, and 16 bytes of
/// hash for each are a thousandth.
pub(super) const BLOCK_BYTES: u64 = 16 << 10;

/// The hash of a block without its trailing zeros. All zeros: the block is zeros. So a file can be made longer without
/// any change to its last block.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct BlockHash(pub(super) [u8; 16]);

impl BlockHash {
    /// A block of zeros.
    pub(super) const ZEROS: BlockHash = BlockHash([0; 16]);
    /// A block of which nothing is known; no hash is equal to it but by chance.
    pub(super) const UNKNOWN: BlockHash = BlockHash([0xff; 16]);
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What a name leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Directory,
    /// So many bytes, and the hash of each block.
    File(u64, Arc<Vec<BlockHash>>),
    Symlink(Vec<u8>),
    Fifo,
    Socket,
    /// The number of a device, as the kernel packs it.
    CharDevice(u64),
    BlockDevice(u64),
}

impl Kind {
    /// A file without contents.
    pub(super) fn empty_file() -> Kind {
        Kind::File(0, Arc::default())
    }

    pub(super) fn is_directory(&self) -> bool {
        *self == Kind::Directory
    }

    /// Whether one can become the other by a change of contents and attributes.
    pub(super) fn can_become(&self, other: &Kind) -> bool {
        match (self, other) {
            (Kind::File(..), Kind::File(..)) => true,
            _ => self == other,
        }
    }
}

/// A file of any kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Node {
    pub(super) kind: Kind,
    /// `None`: they have been disturbed, and are to be set again.
    pub(super) attributes: Option<Arc<Attributes>>,
}

/// Which file a name leads to: a number that has a meaning within one index alone.
pub(super) type Id = u64;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// Paths relative to the tree's root, which is the empty path. A directory stands before what is in it.
    names: BTreeMap<Vec<u8>, Id>,
    nodes: BTreeMap<Id, Node>,
    /// Files that have lost their names for a while.
    parked: BTreeMap<u32, Id>,
    next: Id,
    /// Blocks of all files, those without a name included.
    blocks: u64,
}

/// An operation that cannot be carried out on this tree.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub(super) enum BadOperation {
    #[error("{0}")]
    Path(#[from] BadPath),
    #[error("{0} does not exist")]
    Missing(String),
    #[error("{0} exists already")]
    Exists(String),
    #[error("{0} is not what the operation is for")]
    Kind(String),
    #[error("{0} lies beyond the end of the file")]
    Range(String),
    #[error("the directory {0} is not empty")]
    NotEmpty(String),
    #[error("the parking place {0} is free or taken")]
    Slot(u32),
    #[error(
        "the tree has more than {FILE_NAMES_MAX} names or {FILE_BLOCKS_MAX} blocks of {BLOCK_BYTES} bytes"
    )]
    TooMuch,
}

/// A path for people.
pub(super) fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

fn blocks_in(node: &Node) -> u64 {
    match &node.kind {
        Kind::File(_, blocks) => blocks.len() as u64,
        _ => 0,
    }
}

/// Blocks of a file of `size` bytes.
pub(super) fn blocks_of(size: u64) -> usize {
    usize::try_from(size.div_ceil(BLOCK_BYTES)).unwrap_or(usize::MAX)
}

impl Index {
    /// A tree that is an empty directory.
    #[cfg(test)]
    pub(super) fn empty() -> Index {
        let mut index = Index::default();
        index.add(Vec::new(), Kind::Directory, None);
        index
    }

    /// Adds a name of a new file, whatever stands around it.
    pub(super) fn add(
        &mut self,
        path: Vec<u8>,
        kind: Kind,
        attributes: Option<Arc<Attributes>>,
    ) -> Id {
        let id = self.next;
        self.add_as(id, path, Node { kind, attributes });
        id
    }

    /// Adds a name of the file `id`, which is `node`.
    pub(super) fn add_as(&mut self, id: Id, path: Vec<u8>, node: Node) {
        self.next = self.next.max(id.saturating_add(1));
        self.blocks += blocks_in(&node);
        if let Some(before) = self.nodes.insert(id, node) {
            self.blocks -= blocks_in(&before);
        }
        self.names.insert(path, id);
    }

    /// Adds a further name of a file.
    pub(super) fn add_name(&mut self, path: Vec<u8>, id: Id) {
        self.names.insert(path, id);
    }

    /// Whether both are one tree: the same names, of the same files.
    pub(super) fn is_same(&self, other: &Index) -> bool {
        let (mut there, mut here) = (BTreeMap::new(), BTreeMap::new());
        let mut pairs = self.names.iter().zip(&other.names);
        self.names.len() == other.names.len()
            && pairs.all(|((name, a), (other_name, b))| {
                name == other_name
                    && *there.entry(*a).or_insert(*b) == *b
                    && *here.entry(*b).or_insert(*a) == *a
                    && self.nodes.get(a) == other.nodes.get(b)
            })
    }

    /// Fails if the tree is larger than one may be.
    pub(super) fn expect_size(&self) -> Result<(), BadOperation> {
        match self.names.len() <= FILE_NAMES_MAX && self.blocks <= FILE_BLOCKS_MAX {
            true => Ok(()),
            false => Err(BadOperation::TooMuch),
        }
    }

    /// Names in order, with the files that they lead to.
    pub(super) fn names(&self) -> impl DoubleEndedIterator<Item = (&[u8], Id)> {
        self.names.iter().map(|(path, id)| (path.as_slice(), *id))
    }

    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn id(&self, path: &[u8]) -> Option<Id> {
        self.names.get(path).copied()
    }

    pub(super) fn node(&self, id: Id) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// What `path` leads to.
    pub(super) fn at(&self, path: &[u8]) -> Option<&Node> {
        self.node(self.id(path)?)
    }

    /// Carries an operation out; the index is unchanged if that cannot be.
    pub(super) fn apply(
        &mut self,
        operation: &Operation,
        hash: &dyn Fn(&[u8]) -> BlockHash,
    ) -> Result<(), BadOperation> {
        match operation {
            Operation::Park { path, slot } => self.park(path, *slot),
            Operation::Place { slot, path } => {
                self.expect_room(path)?;
                let id = self.parked.remove(slot).ok_or(BadOperation::Slot(*slot))?;
                self.names.insert(path.clone(), id);
                self.disturb_parent(path);
                Ok(())
            }
            Operation::Remove { path } => self.remove(path),
            Operation::Make { path, made } => {
                self.expect_room(path)?;
                self.add(path.clone(), made.kind(), None);
                self.disturb_parent(path);
                Ok(())
            }
            Operation::Link { from, path } => {
                let id = self.plain(from)?;
                self.expect_room(path)?;
                self.names.insert(path.clone(), id);
                self.disturb_parent(path);
                Ok(())
            }
            Operation::Size { path, size } => self.resize(path, *size),
            Operation::Data { path, first, data } => {
                let bytes = usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX);
                let hashes: Vec<BlockHash> = data.chunks(bytes).map(hash).collect();
                self.expect_whole(path, *first, data.len())?;
                self.set_blocks(path, *first, &hashes)
            }
            Operation::Zeros {
                path,
                first,
                blocks,
            } => {
                let count = usize::try_from(*blocks).unwrap_or(usize::MAX);
                let room = self.blocks(path)?.len();
                if count > room {
                    return Err(BadOperation::Range(shown(path)));
                }
                self.set_blocks(path, *first, &vec![BlockHash::ZEROS; count])
            }
            Operation::Attributes { path, attributes } => {
                let id = self.found(path)?;
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.attributes = Some(Arc::new(attributes.clone()));
                }
                Ok(())
            }
        }
    }

    fn found(&self, path: &[u8]) -> Result<Id, BadOperation> {
        check(path)?;
        self.id(path)
            .ok_or_else(|| BadOperation::Missing(shown(path)))
    }

    /// The file behind a name, which is no directory.
    fn plain(&self, path: &[u8]) -> Result<Id, BadOperation> {
        let id = self.found(path)?;
        match self.node(id) {
            Some(node) if !node.kind.is_directory() => Ok(id),
            _ => Err(BadOperation::Kind(shown(path))),
        }
    }

    /// Checks that `path` can be made: its directory is there, and it is not.
    fn expect_room(&self, path: &[u8]) -> Result<(), BadOperation> {
        check(path)?;
        if self.names.contains_key(path) {
            return Err(BadOperation::Exists(shown(path)));
        }
        if self.names.len() >= FILE_NAMES_MAX {
            return Err(BadOperation::TooMuch);
        }
        let dir = parent(path).unwrap_or_default();
        match self.at(dir) {
            None => Err(BadOperation::Missing(shown(dir))),
            Some(node) if node.kind.is_directory() => Ok(()),
            Some(_) => Err(BadOperation::Kind(shown(dir))),
        }
    }

    fn disturb(&mut self, id: Id) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.attributes = None;
        }
    }

    fn disturb_parent(&mut self, path: &[u8]) {
        let id = parent(path).and_then(|dir| self.id(dir));
        if let Some(id) = id {
            self.disturb(id);
        }
    }

    fn park(&mut self, path: &[u8], slot: u32) -> Result<(), BadOperation> {
        let id = self.plain(path)?;
        if self.parked.contains_key(&slot) {
            return Err(BadOperation::Slot(slot));
        }
        self.names.remove(path);
        self.parked.insert(slot, id);
        self.disturb_parent(path);
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), BadOperation> {
        let id = self.found(path)?;
        if path.is_empty() {
            return Err(BadOperation::Kind(shown(path)));
        }
        let is_directory = self.node(id).is_some_and(|node| node.kind.is_directory());
        if is_directory {
            let inside = [path, b"/"].concat();
            let mut behind = self.names.range(inside.clone()..);
            if behind
                .next()
                .is_some_and(|(next, _)| next.starts_with(&inside))
            {
                return Err(BadOperation::NotEmpty(shown(path)));
            }
        }
        self.names.remove(path);
        // Whether other names are left is not looked for at each removal: see `forget_nameless`.
        if is_directory {
            self.nodes.remove(&id);
        }
        self.disturb_parent(path);
        Ok(())
    }

    /// Forgets files without a name.
    pub(super) fn forget_nameless(&mut self) {
        let mut named: Vec<Id> = self
            .names
            .values()
            .chain(self.parked.values())
            .copied()
            .collect();
        named.sort_unstable();
        self.nodes.retain(|id, _| named.binary_search(id).is_ok());
        self.blocks = self.nodes.values().map(blocks_in).sum();
    }

    /// Hashes of a file's blocks.
    pub(super) fn blocks(&self, path: &[u8]) -> Result<&[BlockHash], BadOperation> {
        match self.node(self.found(path)?) {
            Some(Node {
                kind: Kind::File(_, blocks),
                ..
            }) => Ok(blocks),
            _ => Err(BadOperation::Kind(shown(path))),
        }
    }

    fn file(&mut self, path: &[u8]) -> Result<(&mut u64, &mut Vec<BlockHash>), BadOperation> {
        let id = self.found(path)?;
        match self.nodes.get_mut(&id) {
            Some(Node {
                kind: Kind::File(size, blocks),
                attributes,
            }) => {
                *attributes = None;
                Ok((size, Arc::make_mut(blocks)))
            }
            _ => Err(BadOperation::Kind(shown(path))),
        }
    }

    fn resize(&mut self, path: &[u8], new: u64) -> Result<(), BadOperation> {
        let rest = self.blocks - self.blocks(path)?.len() as u64;
        let total = rest.saturating_add(new.div_ceil(BLOCK_BYTES));
        if total > FILE_BLOCKS_MAX {
            return Err(BadOperation::TooMuch);
        }
        self.blocks = total;
        let (size, blocks) = self.file(path)?;
        let is_cut = new < *size && !new.is_multiple_of(BLOCK_BYTES);
        *size = new;
        blocks.resize(blocks_of(new), BlockHash::ZEROS);
        match blocks.last_mut() {
            // A part of it is gone. Zeros stay zeros.
            Some(last) if is_cut && *last != BlockHash::ZEROS => *last = BlockHash::UNKNOWN,
            _ => {}
        }
        Ok(())
    }

    /// Whether data of so many bytes are whole blocks, or end where the file ends.
    fn expect_whole(&self, path: &[u8], first: u64, length: usize) -> Result<(), BadOperation> {
        let range = || BadOperation::Range(shown(path));
        let Some(Node {
            kind: Kind::File(size, _),
            ..
        }) = self.at(path)
        else {
            return Err(BadOperation::Kind(shown(path)));
        };
        let start = first.checked_mul(BLOCK_BYTES).ok_or_else(range)?;
        let end = start.checked_add(length as u64).ok_or_else(range)?;
        match end == *size || (end < *size && end.is_multiple_of(BLOCK_BYTES)) {
            true => Ok(()),
            false => Err(range()),
        }
    }

    /// Notes what blocks hold from `first` on.
    pub(super) fn set_blocks(
        &mut self,
        path: &[u8],
        first: u64,
        hashes: &[BlockHash],
    ) -> Result<(), BadOperation> {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        if first
            .checked_add(hashes.len())
            .is_none_or(|end| self.blocks(path).is_ok_and(|blocks| end > blocks.len()))
        {
            return Err(BadOperation::Range(shown(path)));
        }
        let (_, blocks) = self.file(path)?;
        let end = first + hashes.len();
        if let Some(part) = blocks.get_mut(first..end) {
            part.copy_from_slice(hashes);
        }
        Ok(())
    }
}

impl Made {
    fn kind(&self) -> Kind {
        match self {
            Made::Directory => Kind::Directory,
            Made::File => Kind::empty_file(),
            Made::Symlink(target) => Kind::Symlink(target.clone()),
            Made::Fifo => Kind::Fifo,
            Made::Socket => Kind::Socket,
            Made::CharDevice(number) => Kind::CharDevice(*number),
            Made::BlockDevice(number) => Kind::BlockDevice(*number),
        }
    }
}

#[cfg(test)]
mod tests;
