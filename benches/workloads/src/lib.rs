//! Pure hot paths as pieces of work that are the same each time: no clock, no randomness without a seed.
//!
//! ```text
//!   benches/hot_paths.rs               times them (Criterion)
//!   src/main.rs                        runs one a given number of times
//!     └─ cargo xtask bench instructions    counts its instructions, in this build and in another revision
//! ```
//!
//! These sources are also compiled against other revisions of pageferry. So they use as little of its interface as
//! they can.

pub mod codec;
mod criu;
mod ferry;
mod images;
mod lazy;

/// A piece of work that is ready to be done. What it returns depends on its results, so that no work can be left out.
pub type Run = Box<dyn FnMut() -> u64>;

/// A hot path with its input.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name, one word.
    pub name: &'static str,
    /// How often it is done when instructions are counted: a fraction of a second without valgrind.
    pub times: u32,
    /// How often it can be done before it has to be prepared anew.
    pub lasts: u32,
    /// Makes the input.
    pub prepare: fn() -> Run,
}

/// How often work can be done that leaves its input as it was.
const FOR_EVER: u32 = u32::MAX;

/// All of them.
pub const ALL: [Workload; 13] = [
    Workload {
        name: "deframer",
        times: 8,
        lasts: FOR_EVER,
        prepare: criu::deframer,
    },
    Workload {
        name: "pagemap-encode",
        times: 4,
        lasts: FOR_EVER,
        prepare: images::pagemap_encode,
    },
    Workload {
        name: "pagemap-decode",
        times: 4,
        lasts: FOR_EVER,
        prepare: images::pagemap_decode,
    },
    Workload {
        name: "chain-open",
        times: 2,
        lasts: FOR_EVER,
        prepare: images::chain_open,
    },
    Workload {
        name: "chain-find",
        times: 8,
        lasts: FOR_EVER,
        prepare: images::chain_find,
    },
    Workload {
        name: "planner-build",
        times: 1,
        lasts: FOR_EVER,
        prepare: lazy::planner_build,
    },
    Workload {
        name: "planner-faults",
        times: 8,
        lasts: 32,
        prepare: lazy::planner_faults,
    },
    Workload {
        name: "planner-stream",
        times: 8,
        lasts: 32,
        prepare: lazy::planner_stream,
    },
    Workload {
        name: "window",
        times: 8,
        lasts: FOR_EVER,
        prepare: lazy::window,
    },
    Workload {
        name: "ferry-hash",
        times: 4,
        lasts: FOR_EVER,
        prepare: ferry::hash,
    },
    Workload {
        name: "ferry-encode",
        times: 1,
        lasts: FOR_EVER,
        prepare: ferry::encode,
    },
    Workload {
        name: "ferry-later-round",
        times: 2,
        lasts: FOR_EVER,
        prepare: ferry::later_round,
    },
    Workload {
        name: "ferry-decode",
        times: 4,
        lasts: FOR_EVER,
        prepare: ferry::decode,
    },
];

/// The one of this name.
pub fn named(name: &str) -> Option<Workload> {
    ALL.into_iter().find(|workload| workload.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_the_same_each_time_it_is_prepared() {
        // Those that are quick without optimisation.
        for name in ["deframer", "pagemap-decode", "chain-find", "window"] {
            let workload = named(name).expect("there is one");
            let first = (workload.prepare)()();
            assert_eq!(first, (workload.prepare)()(), "{name}");
            assert_ne!(first, 0, "{name}");
        }
    }
}
