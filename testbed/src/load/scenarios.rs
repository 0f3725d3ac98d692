//! What restored processes do while their memory is still missing.

use super::steps::{Advice, Order, Part, Pass, Step};

/// One look at everything, at random.
pub fn verifying() -> [Step; 1] {
    [Step::Verify(Pass::full(Order::Random))]
}

/// A pass by four threads at random, each visiting its share; then each of them everything.
pub fn reading() -> Vec<Step> {
    let random = Pass::full(Order::Random).threads(4);
    vec![Step::Verify(random), Step::Verify(random.overlapping())]
}

/// Everything that a process can do to its address space, and a look at all of it at the end.
///
/// Parts lie in the areas of [`LoadSpec::mixed`](super::spec::LoadSpec::mixed) with 64 MiB and
/// 4 KiB pages: 8192, 2048, 2048, 2048, 2048 pages.
pub fn reshaping() -> Vec<Step> {
    let random = Pass::full(Order::Random);
    vec![
        Step::Fork {
            depth: 2,
            pass: random,
        },
        Step::Move(Part::new(0, 1000, 2000)),
        Step::Drop {
            part: Part::new(1, 100, 900),
            advice: Advice::DontNeed,
        },
        Step::Drop {
            part: Part::new(4, 0, 700),
            advice: Advice::Free,
        },
        Step::Unmap {
            part: Part::new(0, 5000, 1000),
            map_again: false,
        },
        Step::Unmap {
            part: Part::new(4, 1000, 500),
            map_again: true,
        },
        Step::Grow {
            area: 1,
            pages: 300,
        },
        Step::Protect(Part::new(0, 7000, 500)),
        Step::Write {
            every: 5,
            order: Order::Random,
        },
        Step::Fork {
            depth: 1,
            pass: random,
        },
        Step::Verify(random.threads(4).overlapping()),
        Step::Verify(Pass::full(Order::Descending)),
    ]
}
