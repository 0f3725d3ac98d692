//! What memory must be: each mapped page, and what is known of it.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use anyhow::Result;
use testbed::load::content::mix;
use testbed::sys::{self, WINDOW, WORD_BYTES};

pub(crate) const PAGE: usize = 4096;
pub(crate) const WORDS: usize = PAGE / WORD_BYTES;

/// Where all mappings are: so little that what is unmapped is soon mapped again.
pub(crate) const ARENA: usize = WINDOW.start;
pub(crate) const ARENA_PAGES: usize = 16384;

/// Pages mapped at most.
pub(crate) const MOST_PAGES: usize = 5000;

/// The table of what shared pages hold lies behind the arena.
const TABLE: usize = ARENA + (ARENA_PAGES + 1024) * PAGE;
pub(crate) const TABLE_WORDS: usize = 16384;

/// A shared page is being written. No number of a content is even.
const IN_TRANSIT: u64 = 2;

/// Steps that are remembered, to be told if something is wrong.
const REMEMBERED: usize = 3000;

/// What backs a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Anonymous,
    SharedAnonymous,
    Memfd,
    MemfdPrivate,
    FilePrivate,
    FileShared,
}

impl Kind {
    pub(crate) fn is_shared(self) -> bool {
        matches!(self, Kind::SharedAnonymous | Kind::Memfd | Kind::FileShared)
    }
}

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Value {
    Zero,
    /// The content of a number, with one other word if that is not 0.
    Written(u64, u64),
    /// That, or zero: MADV_FREE.
    Freed(u64, u64),
    /// What the file or shared memory behind it holds.
    Backing,
}

/// A mapped page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) kind: Kind,
    /// Of shared memory: the word of the table. Of files: the number of its content.
    pub(crate) backing: u64,
    pub(crate) value: Value,
    /// PROT_*.
    pub(crate) prot: i32,
    pub(crate) locked: bool,
    pub(crate) wiped: bool,
    pub(crate) not_inherited: bool,
    pub(crate) guarded: bool,
}

impl Page {
    /// What is there once nothing of its own is.
    pub(crate) fn emptied(&self) -> Value {
        match self.kind {
            Kind::Anonymous => Value::Zero,
            _ => Value::Backing,
        }
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.prot & libc::PROT_READ != 0 && !self.guarded
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.prot & libc::PROT_WRITE != 0 && !self.guarded
    }
}

/// A source of numbers that a seed decides (SplitMix64).
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(mix(self.0) ^ 0x6d6d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number() % end.max(1) as u64).unwrap_or(0)
    }

    /// The number of a content: odd.
    pub(crate) fn content(&mut self) -> u64 {
        self.number() | 1
    }
}

/// A step that was done.
struct Note {
    address: usize,
    pages: usize,
    what: String,
}

/// All that is known.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) random: Random,
    pub(crate) dir: PathBuf,
    pub(crate) without: Vec<String>,
    /// By address.
    pub(crate) pages: BTreeMap<usize, Page>,
    /// Words of the table that are in use.
    pub(crate) table_used: usize,
    /// Whether pages may be missing, which somebody else fills.
    pub(crate) may_lack_pages: bool,
    /// Whether this is the process that writes shared memory.
    pub(crate) is_first: bool,
    /// Makes names of files.
    pub(crate) files: usize,
    pub(crate) name: String,
    notes: VecDeque<Note>,
}

impl Model {
    pub(crate) fn new(seed: u64, dir: &Path, without: Vec<String>) -> Result<Model> {
        sys::map(TABLE, TABLE_WORDS * WORD_BYTES, sys::Backing::SharedAnon)?;
        Ok(Model {
            random: Random(mix(seed)),
            dir: dir.to_owned(),
            without,
            is_first: true,
            name: "0".to_owned(),
            ..Model::default()
        })
    }

    pub(crate) fn leaves_out(&self, what: &str) -> bool {
        self.without.iter().any(|word| word == what)
    }

    /// This process is now a child called `name`.
    pub(crate) fn inherit(&mut self, name: &str) {
        let hash = |sum: u64, byte| mix(sum ^ u64::from(byte));
        self.random = Random(name.bytes().fold(self.random.0, hash));
        name.clone_into(&mut self.name);
        self.is_first = false;
        self.pages.retain(|_, page| !page.not_inherited);
        for page in self.pages.values_mut() {
            page.locked = false;
            if page.wiped {
                page.value = Value::Zero;
                page.guarded = false;
            }
        }
        self.note(0, 0, "is forked");
    }

    pub(crate) fn note(&mut self, address: usize, pages: usize, what: &str) {
        if self.notes.len() == REMEMBERED {
            self.notes.pop_front();
        }
        self.notes.push_back(Note {
            address,
            pages,
            what: what.to_owned(),
        });
    }

    /// What was done to a page, as far as it is remembered; forks always.
    pub(crate) fn history(&self, address: usize) -> String {
        let touches = |note: &&Note| {
            note.pages == 0 || (note.address..note.address + note.pages * PAGE).contains(&address)
        };
        let line = |note: &Note| format!("\n    {:#x}+{}: {}", note.address, note.pages, note.what);
        self.notes.iter().filter(touches).map(line).collect()
    }

    pub(crate) fn shared_number(word: u64) -> u64 {
        sys::read_word(TABLE + usize::try_from(word).unwrap_or_default() * WORD_BYTES)
    }

    /// Changes a shared page, whose content gets a number.
    pub(crate) fn change_shared(
        word: u64,
        number: u64,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let at = TABLE + usize::try_from(word).unwrap_or_default() * WORD_BYTES;
        sys::write_words(at, &[IN_TRANSIT]);
        change()?;
        sys::write_words(at, &[number]);
        Ok(())
    }

    /// The numbers that a page may hold now (0: zero), or none while its writer is at it.
    pub(crate) fn expected(page: &Page) -> Option<Vec<(u64, u64)>> {
        Some(match page.value {
            Value::Zero => vec![(0, 0)],
            Value::Written(number, patch) => vec![(number, patch)],
            Value::Freed(number, patch) => vec![(number, patch), (0, 0)],
            Value::Backing if page.kind.is_shared() => match Model::shared_number(page.backing) {
                IN_TRANSIT => return None,
                number => vec![(number, 0)],
            },
            Value::Backing => vec![(page.backing, 0)],
        })
    }
}

/// The word of a page that is written alone.
pub(crate) const PATCHED_WORD: usize = 100;

/// The content of a number: some compress, most do not.
pub(crate) fn content((number, patch): (u64, u64)) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    if number != 0 {
        for (word, n) in words.iter_mut().zip(0..) {
            *word = match number >> 60 {
                0..4 => number,
                _ => mix(number.wrapping_add(n << 1)),
            };
        }
    }
    if patch != 0 {
        words[PATCHED_WORD] = patch;
    }
    words
}
