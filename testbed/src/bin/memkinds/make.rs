//! Makes one mapping of each kind, and says what it must hold.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::load::content::mix;
use testbed::load::page_words;
use testbed::sys::WORD_BYTES;
use testbed::sys::mappings::{self, MADV_GUARD_INSTALL, MAP_DROPPABLE};

/// What a run of pages must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expect {
    /// Page by page its content.
    Content,
    /// Zero.
    Zero,
    /// Either: the kernel may drop it.
    ContentOrZero,
    /// A guard: it cannot be read.
    Guard,
    /// Not mapped.
    Gone,
    /// Its content once it is made readable.
    Hidden,
}

/// A run of pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) address: usize,
    pub(crate) pages: usize,
    /// Number of its first page, which decides the content.
    pub(crate) first: u64,
    pub(crate) expect: Expect,
    /// What a child finds there.
    pub(crate) in_child: Expect,
}

impl Span {
    pub(crate) fn new(address: usize, pages: usize, first: u64, expect: Expect) -> Span {
        Span {
            address,
            pages,
            first,
            expect,
            in_child: expect,
        }
    }

    /// The same, of which a child finds something else.
    pub(crate) fn in_child(self, in_child: Expect) -> Span {
        Span { in_child, ..self }
    }
}

/// A kind of memory that was made.
#[derive(Default, Debug)]
pub(crate) struct Made {
    pub(crate) spans: Vec<Span>,
    /// An AIO context that must work.
    pub(crate) aio: Option<usize>,
    /// What keeps the memory, and is dumped with the process.
    pub(crate) _open: Option<OwnedFd>,
}

/// Kinds that a living child has as well: they are made first.
pub(crate) const HAVE_PARTNERS: &[&str] = &[
    "cow",
    "shared-tree",
    "shared-grandchild",
    "child-none",
    "child-moved",
    "child-guard",
    "parent-guard",
    "child-wipe",
    "hugetlb-cow",
];

pub(crate) const HUGE_BYTES: usize = 2 << 20;
pub(crate) const PAGES: usize = 64;
const MANY: usize = 10_000;
const RESERVED_BYTES: usize = 400 << 30;

pub(crate) fn page_bytes() -> usize {
    page_words() * WORD_BYTES
}

/// Content of page `number`: a third random, the rest compressible.
pub(crate) fn content(number: u64) -> Vec<u8> {
    let word = |n: u64| match n % 3 {
        0 => mix(number << 16 | n),
        1 => number,
        _ => 0x0102_0304_0506_0708,
    };
    (0..page_words() as u64)
        .flat_map(|n| word(n).to_ne_bytes())
        .collect()
}

pub(crate) fn fill(address: usize, pages: usize, first: u64) -> Result<()> {
    for n in 0..pages {
        mappings::write(address + n * page_bytes(), &content(first + n as u64))?;
    }
    Ok(())
}

impl Made {
    pub(crate) fn add(&mut self, address: usize, pages: usize, first: u64, expect: Expect) {
        self.spans.push(Span::new(address, pages, first, expect));
    }

    pub(crate) fn filled(address: usize, pages: usize, first: u64) -> Result<Made> {
        fill(address, pages, first)?;
        let mut made = Made::default();
        made.add(address, pages, first, Expect::Content);
        Ok(made)
    }

    /// Fills all but the last quarter, which nobody has touched.
    pub(crate) fn nearly_filled(address: usize, pages: usize, first: u64) -> Result<Made> {
        let filled = pages - pages / 4;
        let mut made = Made::filled(address, filled, first)?;
        let rest = address + filled * page_bytes();
        made.add(rest, pages - filled, first + filled as u64, Expect::Zero);
        Ok(made)
    }

    pub(crate) fn in_child(mut self, expect: Expect) -> Made {
        self.spans
            .iter_mut()
            .for_each(|span| span.in_child = expect);
        self
    }
}

/// The same, which keeps `open`.
pub(crate) fn keeping(made: Made, open: OwnedFd) -> Made {
    Made {
        _open: Some(open),
        ..made
    }
}

pub(crate) const PRIVATE: i32 = libc::MAP_PRIVATE;
pub(crate) const SHARED: i32 = libc::MAP_SHARED;

pub(crate) fn anonymous(flags: i32, pages: usize) -> Result<usize> {
    Ok(mappings::map(pages * page_bytes(), true, flags, None)?)
}

/// Private memory with content, about which `advice` is given.
pub(crate) fn advised(first: u64, advice: i32) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    mappings::advise(at, PAGES * page_bytes(), advice)?;
    Made::nearly_filled(at, PAGES, first)
}

/// Number of the first page of a kind: contents of different kinds differ.
pub(crate) fn first_of(kind: &str) -> u64 {
    let hash = |sum: u64, byte| sum.wrapping_mul(131) + u64::from(byte);
    kind.bytes().fold(7, hash) << 20 >> 12
}

/// Maps a kind, fills it, and says what it must hold.
pub(crate) fn make(kind: &str, dir: &Path) -> Result<Made> {
    let first = first_of(kind);
    match kind {
        "private" => Made::nearly_filled(anonymous(PRIVATE, 4 * PAGES)?, 4 * PAGES, first),
        "shared" => Made::filled(anonymous(SHARED, PAGES)?, PAGES, first),
        "sparse" => sparse(first),
        "guard" => guard(first),
        "hugetlb-private" => huge(PRIVATE, None, first),
        "hugetlb-shared" => huge(SHARED, None, first),
        "hugetlb-memfd" => huge_memfd(first),
        "hugetlb-sysv" => sysv(2 * HUGE_BYTES, libc::SHM_HUGETLB, first),
        "sysv" => sysv(PAGES * page_bytes(), 0, first),
        "thp" => thp(first),
        "mlock" | "mlock-on-fault" => locked(kind == "mlock-on-fault", first),
        "wipe" => Ok(advised(first, libc::MADV_WIPEONFORK)?.in_child(Expect::Zero)),
        "dontfork" => Ok(advised(first, libc::MADV_DONTFORK)?.in_child(Expect::Gone)),
        "ksm" => advised(first, libc::MADV_MERGEABLE),
        "droppable" => droppable(first),
        "growsdown" => Made::nearly_filled(
            anonymous(PRIVATE | libc::MAP_GROWSDOWN, PAGES)?,
            PAGES,
            first,
        ),
        "prot-none" => hidden(first),
        "file-private" | "file-shared" => file(kind, dir, first),
        "dev-zero" => zero_device(first),
        "memfd" | "memfd-private" => memfd(kind == "memfd-private", first),
        "mseal" => {
            let made = Made::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)?;
            mappings::seal(made.spans[0].address, PAGES * page_bytes())?;
            Ok(made)
        }
        "aio" => Ok(Made {
            aio: Some(mappings::aio_setup()?),
            ..Made::default()
        }),
        "reservation" => reservation(first),
        "many" => many(first),
        other => bail!("no kind {other}"),
    }
}

fn huge_memfd(first: u64) -> Result<Made> {
    let memfd = memfd_create(c"huge", MFdFlags::MFD_HUGETLB)?;
    nix::unistd::ftruncate(&memfd, 2 * HUGE_BYTES as i64)?;
    let made = huge(SHARED, Some(memfd.as_fd()), first)?;
    Ok(Made {
        _open: Some(memfd),
        ..made
    })
}

fn droppable(first: u64) -> Result<Made> {
    let mut made = Made::nearly_filled(anonymous(MAP_DROPPABLE, PAGES)?, PAGES, first)?;
    made.spans[0].expect = Expect::ContentOrZero;
    Ok(made.in_child(Expect::Zero))
}

/// Memory that nobody may read.
fn hidden(first: u64) -> Result<Made> {
    let mut made = Made::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)?;
    mappings::protect(made.spans[0].address, PAGES * page_bytes(), libc::PROT_NONE)?;
    made.spans[0].expect = Expect::Hidden;
    Ok(made.in_child(Expect::Hidden))
}

fn file(kind: &str, dir: &Path, first: u64) -> Result<Made> {
    let path = dir.join(kind);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    fs::write(&path, of_file(first))?;
    of(file.as_fd(), kind == "file-private", first)
}

/// Private memory that is a mapping of /dev/zero.
fn zero_device(first: u64) -> Result<Made> {
    let zero = File::options().read(true).write(true).open("/dev/zero")?;
    let at = mappings::map(PAGES * page_bytes(), true, PRIVATE, Some(zero.as_fd()))?;
    Made::nearly_filled(at, PAGES, first)
}

fn memfd(private: bool, first: u64) -> Result<Made> {
    let memfd = memfd_create(c"kinds", MFdFlags::empty())?;
    nix::unistd::write(&memfd, &of_file(first))?;
    let made = of(memfd.as_fd(), private, first)?;
    Ok(Made {
        _open: Some(memfd),
        ..made
    })
}

pub(crate) fn of_file(first: u64) -> Vec<u8> {
    (0..PAGES as u64).flat_map(|n| content(first + n)).collect()
}

/// A mapped file; a private one has every second page written: with the contents behind the file's.
pub(crate) fn of(file: BorrowedFd<'_>, private: bool, first: u64) -> Result<Made> {
    let flags = if private { PRIVATE } else { SHARED };
    let at = mappings::map(PAGES * page_bytes(), true, flags, Some(file))?;
    let mut made = Made::default();
    for n in 0..PAGES {
        let address = at + n * page_bytes();
        let own = first + n as u64;
        let number = if private && n % 2 == 0 {
            own + PAGES as u64
        } else {
            own
        };
        if number != own {
            fill(address, 1, number)?;
        }
        made.add(address, 1, number, Expect::Content);
    }
    Ok(made)
}

fn sparse(first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, 4 * PAGES)?;
    let mut made = Made::default();
    for n in 0..4 * PAGES {
        let address = at + n * page_bytes();
        let touched = n % 2 == 1;
        if touched {
            fill(address, 1, first + n as u64)?;
        }
        let expect = if touched {
            Expect::Content
        } else {
            Expect::Zero
        };
        made.add(address, 1, first + n as u64, expect);
    }
    Ok(made)
}

/// Guards at the begin, in the middle and at the end, and one that covers a whole mapping.
fn guard(first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    let whole = anonymous(PRIVATE, 4)?;
    let mut made = Made::default();
    let parts = [
        (0, 2, true),
        (2, 14, false),
        (16, 4, true),
        (20, 42, false),
        (62, 2, true),
    ];
    for (from, pages, guards) in parts {
        let address = at + from * page_bytes();
        let expect = if guards {
            Expect::Guard
        } else {
            Expect::Content
        };
        made.add(address, pages, first + from as u64, expect);
    }
    made.add(whole, 4, first, Expect::Guard);
    for span in made
        .spans
        .iter()
        .filter(|span| span.expect == Expect::Guard)
    {
        mappings::advise(span.address, span.pages * page_bytes(), MADV_GUARD_INSTALL)?;
    }
    Ok(made)
}

pub(crate) fn huge(flags: i32, file: Option<BorrowedFd<'_>>, first: u64) -> Result<Made> {
    let flags = if file.is_some() {
        flags
    } else {
        flags | libc::MAP_HUGETLB
    };
    let at = mappings::map(2 * HUGE_BYTES, true, flags, file)?;
    Made::filled(at, 2 * HUGE_BYTES / page_bytes(), first)
}

/// From now on segments are of a namespace of this process and its children, of which the first has number 0.
pub(crate) fn own_segments() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWIPC).context("unshare")
}

fn sysv(bytes: usize, flags: i32, first: u64) -> Result<Made> {
    let at = mappings::attach_sysv(bytes, flags)?;
    Made::filled(at, bytes / page_bytes(), first)
}

fn thp(first: u64) -> Result<Made> {
    let pages = 3 * HUGE_BYTES / page_bytes();
    let at = anonymous(PRIVATE, pages)?;
    mappings::advise(at, pages * page_bytes(), libc::MADV_HUGEPAGE)?;
    Made::nearly_filled(at, pages, first)
}

/// Half of the pages are touched; on fault only they are locked.
fn locked(on_fault: bool, first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    mappings::lock(at, PAGES * page_bytes(), on_fault)?;
    let mut made = Made::filled(at, PAGES / 2, first)?;
    made.add(at + PAGES / 2 * page_bytes(), PAGES / 2, 0, Expect::Zero);
    Ok(made)
}

fn reservation(first: u64) -> Result<Made> {
    let flags = PRIVATE | libc::MAP_NORESERVE;
    let at = mappings::map(RESERVED_BYTES, true, flags, None)?;
    let mut made = Made::default();
    for (n, offset) in [0, RESERVED_BYTES / 2, RESERVED_BYTES - page_bytes()]
        .into_iter()
        .enumerate()
    {
        fill(at + offset, 1, first + n as u64)?;
        made.add(at + offset, 1, first + n as u64, Expect::Content);
    }
    made.add(at + RESERVED_BYTES / 4, 4, first + 3, Expect::Zero);
    Ok(made)
}

/// Every second page is read-only, which makes a mapping of each.
fn many(first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, MANY)?;
    let made = Made::filled(at, MANY, first)?;
    for n in (0..MANY).step_by(2) {
        mappings::protect(at + n * page_bytes(), page_bytes(), libc::PROT_READ)?;
    }
    Ok(made)
}
