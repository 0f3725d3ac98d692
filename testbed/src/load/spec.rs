//! What a load is made of, handed to `testload` as JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::content::{Content, PageId, digest};

/// How an area is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// Private and anonymous: what post-copy leaves behind.
    Private,
    /// Private, and read-only once it is filled.
    ReadOnly,
    /// Private, of a file in the load's directory; every second page is written.
    PrivateFile,
    /// Shared and anonymous, by all processes of the tree.
    SharedAnon,
    /// A mapped memfd, shared by all processes of the tree.
    Memfd,
    /// A System V segment, shared by all processes of the tree, which then has an IPC namespace of its
    /// own: the first of these areas is its segment 0.
    SysV,
    /// Private, and locked: CRIU never restores it lazily.
    Locked,
    /// Private, of ordinary pages, with the advice to make huge ones (MADV_HUGEPAGE).
    Advised,
    /// Private huge pages.
    HugePrivate,
    /// A memfd of huge pages, mapped privately.
    HugeMemfd,
}

impl Mapping {
    /// Whether all processes of the tree see the same pages.
    pub fn is_shared(self) -> bool {
        matches!(self, Mapping::SharedAnon | Mapping::Memfd | Mapping::SysV)
    }

    /// Whether its pages are huge ones, of which its length must be a multiple.
    pub fn is_huge(self) -> bool {
        matches!(self, Mapping::HugePrivate | Mapping::HugeMemfd)
    }
}

/// One run of pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AreaSpec {
    /// How it is mapped.
    pub mapping: Mapping,
    /// Its length in pages.
    pub pages: u32,
    /// What fills it.
    pub content: Content,
    /// Every so-manieth page is never touched (0: none), and reads as zero.
    pub untouched_every: u32,
    /// The mapping is so many times as long, with the pages scattered evenly and never a touch
    /// between them: large, and cheap. For private areas that are neither moved nor cut.
    pub scattered_over: u32,
    /// Each page is a mapping of its own, with nothing before and behind it. For private areas that are neither
    /// moved nor cut.
    pub apart: bool,
}

impl AreaSpec {
    /// An area without untouched pages.
    pub fn new(mapping: Mapping, pages: u32, content: Content) -> AreaSpec {
        AreaSpec {
            mapping,
            pages,
            content,
            untouched_every: 0,
            scattered_over: 1,
            apart: false,
        }
    }

    /// The same pages, each in a mapping of its own.
    pub fn each_apart(self) -> AreaSpec {
        AreaSpec {
            scattered_over: 2,
            apart: true,
            ..self
        }
    }

    /// The same pages in a mapping that is `times` as long.
    pub fn scattered_over(self, times: u32) -> AreaSpec {
        AreaSpec {
            scattered_over: times,
            ..self
        }
    }

    /// The same area with every `n`th page untouched.
    pub fn untouched_every(self, n: u32) -> AreaSpec {
        AreaSpec {
            untouched_every: n,
            ..self
        }
    }

    /// Whether page `index` is written when the area is filled.
    pub fn fills(&self, index: u32) -> bool {
        let hole = self.untouched_every != 0 && index.is_multiple_of(self.untouched_every);
        let from_file = self.mapping == Mapping::PrivateFile && index % 2 == 1;
        !hole && !from_file
    }

    /// The content of page `index` as it stands after filling, in `words`.
    pub fn initial(&self, id: PageId, words: &mut [u64]) {
        if self.mapping == Mapping::PrivateFile {
            // Pages that are not written show the file, which has generation 0.
            let generation = u32::from(self.fills(id.index));
            PageId { generation, ..id }.fill(self.content, words);
        } else if self.fills(id.index) {
            id.fill(self.content, words);
        } else {
            words.fill(0);
        }
    }
}

/// What happens when a page raises SIGBUS, because it was lost for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnLostPage {
    /// The process dies of the signal.
    #[default]
    Die,
    /// The page is counted as poisoned, and the pass goes on.
    Count,
}

/// A load: a tree of processes and their memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadSpec {
    /// Where commands and reports are exchanged, as the load sees it.
    pub dir: PathBuf,
    /// Decides all contents.
    pub seed: u64,
    /// Areas of every process. Private ones are inherited by fork and partly rewritten by each
    /// child, so that copies on write exist.
    pub areas: Vec<AreaSpec>,
    /// Processes in the tree, the first included: process k is a child of (k - 1) / 2.
    pub processes: u32,
    /// Children of the first process that have exited and are not waited for.
    pub zombies: u32,
    /// Idle threads of the first process, each with a counter on its stack.
    pub threads: u32,
    /// What happens on SIGBUS.
    pub on_lost_page: OnLostPage,
    /// Keeps everything but the areas locked, and so out of the post-copy (CRIU transfers locked
    /// mappings before it resumes): for measurements, and for tests that lose pages on purpose.
    pub pin_own_memory: bool,
    /// The first process holds both ends of a TCP connection over loopback, and passes bytes through it at each
    /// command.
    pub connected: bool,
    /// The first process has a thread that wakes each millisecond and notes its longest pause, and one that answers
    /// datagrams at this port of all addresses.
    #[serde(default)]
    pub probed_at: Option<u16>,
    /// After so many seconds the kernel ends the process, whatever became of the test.
    pub lifetime_s: u32,
}

impl LoadSpec {
    /// One process with `areas`, exchanging files in `dir`.
    pub fn new(dir: impl Into<PathBuf>, areas: Vec<AreaSpec>) -> LoadSpec {
        LoadSpec {
            dir: dir.into(),
            seed: 1,
            areas,
            processes: 1,
            zombies: 0,
            threads: 0,
            on_lost_page: OnLostPage::Die,
            pin_own_memory: false,
            connected: false,
            probed_at: None,
            lifetime_s: 900,
        }
    }

    /// A process that counts lost pages instead of dying of them.
    #[must_use]
    pub fn careful(self) -> LoadSpec {
        LoadSpec {
            on_lost_page: OnLostPage::Count,
            pin_own_memory: true,
            ..self
        }
    }

    /// `mib` MiB of private memory in several areas: all kinds of content, untouched pages, a
    /// read-only area, and one that is mapped from a file.
    pub fn mixed(dir: impl Into<PathBuf>, mib: u32) -> LoadSpec {
        let share = mib * 256 / 8;
        let area = AreaSpec::new;
        LoadSpec::new(
            dir,
            vec![
                area(Mapping::Private, share * 4, Content::Mixed),
                area(Mapping::Private, share, Content::Text).untouched_every(3),
                area(Mapping::ReadOnly, share, Content::Mixed),
                area(Mapping::PrivateFile, share, Content::Random),
                area(Mapping::Private, share, Content::Random).untouched_every(7),
            ],
        )
    }

    /// The first process as a tree of `processes`, with shared memory of both kinds.
    pub fn tree(dir: impl Into<PathBuf>, mib: u32, processes: u32) -> LoadSpec {
        let share = mib * 256 / 8;
        let area = AreaSpec::new;
        LoadSpec {
            processes,
            zombies: 1,
            threads: 3,
            ..LoadSpec::new(
                dir,
                vec![
                    area(Mapping::Private, share * 3, Content::Mixed),
                    area(Mapping::SharedAnon, share * 2, Content::Mixed).untouched_every(5),
                    area(Mapping::Memfd, share * 2, Content::Random),
                    area(Mapping::ReadOnly, share, Content::Text),
                ],
            )
        }
    }

    /// The generation that process `process` gives to page `index` of a private area right after
    /// the fork, or `None` where it keeps what it inherited.
    pub fn forked_generation(process: u32, mapping: Mapping, index: u32) -> Option<u32> {
        let rewrites = process != 0 && mapping == Mapping::Private && index.is_multiple_of(3);
        rewrites.then_some(1000 + process)
    }

    /// The digest of everything that process `process` holds before any step rewrote a page:
    /// computed here, by whoever asks, from the description alone.
    pub fn initial_digest(&self, process: u32) -> u64 {
        let mut words = vec![0; super::page_words()];
        let mut sum = 0u64;
        for (area, spec) in (0u32..).zip(&self.areas) {
            for index in 0..spec.pages {
                let id = PageId {
                    seed: self.seed,
                    area,
                    index,
                    generation: 0,
                };
                match Self::forked_generation(process, spec.mapping, index) {
                    Some(generation) => PageId { generation, ..id }.fill(spec.content, &mut words),
                    None => spec.initial(id, &mut words),
                }
                sum = sum.wrapping_add(digest(area, index, &words));
            }
        }
        sum
    }
}
