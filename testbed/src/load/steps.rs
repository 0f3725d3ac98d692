//! What a load can be told to do.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The order in which a pass visits pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Ascending.
    Ascending,
    /// Descending.
    Descending,
    /// Each page once, shuffled.
    Random,
    /// Every so-manieth page, then those between.
    Strided(u32),
    /// As many visits as pages, 90 % of them in 10 % of the pages.
    HotCold,
}

/// How closely a visited page is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The first 64 bytes: cheap enough not to hide the transport.
    Quick,
    /// Every byte; the report carries a digest.
    Full,
}

/// How memory is given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Advice {
    /// `MADV_DONTNEED`: reads as zero from now on.
    DontNeed,
    /// `MADV_FREE`: reads as zero or as before.
    Free,
}

/// A run of pages of one area: its number, the first page, how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Part {
    /// Number of the area.
    pub area: u32,
    /// First page.
    pub first: u32,
    /// Number of pages.
    pub pages: u32,
}

impl Part {
    /// `pages` pages of `area` from `first` on.
    pub fn new(area: u32, first: u32, pages: u32) -> Part {
        Part { area, first, pages }
    }
}

/// A pass over all pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// In which order.
    pub order: Order,
    /// By how many threads.
    pub threads: u32,
    /// Every thread visits every page, instead of its share.
    pub overlap: bool,
    /// How closely.
    pub check: Check,
    /// Ended after this long, wherever it is then, ms; `None`: when every page was visited.
    pub limit_ms: Option<u64>,
}

impl Pass {
    /// One thread, every byte.
    pub fn full(order: Order) -> Pass {
        Pass {
            order,
            threads: 1,
            overlap: false,
            check: Check::Full,
            limit_ms: None,
        }
    }

    /// One thread, the beginning of each page.
    pub fn quick(order: Order) -> Pass {
        Pass {
            check: Check::Quick,
            ..Pass::full(order)
        }
    }

    /// The same by `threads` threads.
    pub fn threads(self, threads: u32) -> Pass {
        Pass { threads, ..self }
    }

    /// The same, ended after `limit`.
    pub fn within(self, limit: Duration) -> Pass {
        Pass {
            limit_ms: Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            ..self
        }
    }

    /// The same with every thread visiting every page.
    pub fn overlapping(self) -> Pass {
        Pass {
            overlap: true,
            ..self
        }
    }
}

/// One thing to do. Steps of one command follow each other without a pause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Nothing: the report tells the counter.
    Status,
    /// Visit and compare all pages.
    Verify(Pass),
    /// Fork, and the child again, `depth` times; each verifies all pages while the others do.
    Fork {
        /// Generations of children.
        depth: u32,
        /// What each of them does.
        pass: Pass,
    },
    /// Fork `children` one after the other, so many a second; each compares a page of its own choice and
    /// ends after a moment. Counts those whose page was right as checked.
    ForkOften {
        /// Children a second.
        per_s: u32,
        /// How many in all.
        children: u32,
        /// How long each lives, ms.
        lifetime_ms: u32,
    },
    /// Move a part to another address.
    Move(Part),
    /// Make an area longer, moving it; the new pages read as zero.
    Grow {
        /// Number of the area.
        area: u32,
        /// New pages.
        pages: u32,
    },
    /// Unmap a part; with `map_again` new memory takes its place, and must stay what it is.
    Unmap {
        /// What to unmap.
        part: Part,
        /// Map anonymous memory there, and write every second page.
        map_again: bool,
    },
    /// Give the content of a part back.
    Drop {
        /// What to give back.
        part: Part,
        /// How.
        advice: Advice,
    },
    /// Make a part read-only, check it, make it writable again: splits the mapping.
    Protect(Part),
    /// Give every `every`th page of the private areas its next generation.
    Write {
        /// Stride in pages.
        every: u32,
        /// In which order.
        order: Order,
    },
    /// From now on rewrite so many pages a second, in the background (0: stop).
    Dirty {
        /// Pages a second.
        pages_per_s: u32,
    },
    /// Exit at once.
    Exit {
        /// With this code.
        code: i32,
    },
}

/// Name of the file for commands to `process` in a PID namespace (as `/proc/PID/ns/pid` names it),
/// or to whoever runs if none is given. The dumped and the restored process may both run, and are
/// told apart by their namespaces alone.
pub fn command_file(process: u32, namespace: Option<&Path>) -> String {
    match namespace {
        None => format!("command-{process}.json"),
        Some(namespace) => format!("command-{process}-{}.json", namespace.display()),
    }
}

/// What the harness writes into a command file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    /// Number of the command; its report carries the same.
    pub seq: u64,
    /// What to do.
    pub steps: Vec<Step>,
}
