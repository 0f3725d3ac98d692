//! A pass over all pages: visit, time the first touch, compare.

use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use testbed::load::content::{POISON_MARK, digest, mix};
use testbed::load::report::{FAULT_NS, Latency, StepReport, WRONG_PAGES_TOLD, WrongPage};
use testbed::load::steps::{Check, Order, Pass};
use testbed::sys::{self, WORD_BYTES};

use crate::memory::{Cell, Expect, Memory, to_u32};

/// Words that a quick check compares: 64 bytes.
const QUICK_WORDS: usize = 8;
/// Longest latency that is told apart, nanoseconds.
const LATENCY_MAX_NS: u64 = 600_000_000_000;

/// A page: its area, its index.
type Visit = (u32, u32);

/// Carries out `pass` over all mapped pages.
pub(crate) fn verify(memory: &Memory, pass: Pass) -> Result<StepReport> {
    let threads = pass.threads.max(1);
    let order = visits(memory, pass.order, 0);
    let started = Instant::now();
    let passes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let order = &order;
                scope.spawn(move || match (pass.overlap, thread) {
                    (true, 1..) => {
                        let own = visits(memory, pass.order, u64::from(thread));
                        visit_all(memory, own.into_iter(), pass)
                    }
                    (true, 0) => visit_all(memory, order.iter().copied(), pass),
                    (false, _) => {
                        let share = order.iter().skip(thread as usize).step_by(threads as usize);
                        visit_all(memory, share.copied(), pass)
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a pass does not panic"))
            .collect()
    });
    let mut report = PassCounters::sum(passes)?;
    report.wall_us = u64::try_from(started.elapsed().as_micros())?;
    report.step = format!("{pass:?}");
    Ok(report)
}

/// The pages in the order in which to visit them.
pub(crate) fn visits(memory: &Memory, order: Order, salt: u64) -> Vec<Visit> {
    let mut all: Vec<Visit> = Vec::new();
    for (area, pages) in (0u32..).zip(&memory.areas) {
        all.extend((0..to_u32(pages.cells.len())).map(|index| (area, index)));
    }
    let mut random = mix(memory.seed ^ mix(salt));
    let mut below = |limit: usize| {
        random = mix(random);
        usize::try_from(random % limit as u64).expect("a remainder of a usize")
    };
    match order {
        Order::Ascending => {}
        Order::Descending => all.reverse(),
        Order::Random => {
            for last in (1..all.len()).rev() {
                all.swap(last, below(last + 1));
            }
        }
        Order::Strided(stride) => {
            let stride = (stride as usize).max(1);
            all = (0..stride)
                .flat_map(|first| all.iter().skip(first).step_by(stride))
                .copied()
                .collect();
        }
        Order::HotCold => {
            let hot = (all.len() / 10).max(1);
            let cold = all.len() - hot;
            all = (0..all.len())
                .map(|_| match below(10) {
                    0 if cold > 0 => all[hot + below(cold)],
                    _ => all[below(hot)],
                })
                .collect();
        }
    }
    all
}

/// Whether a page holds what it should.
pub(crate) fn is_right(memory: &Memory, (area, index): Visit) -> bool {
    let cell = memory.areas[area as usize].cells[index as usize];
    if cell.expect == Expect::Gone {
        return true;
    }
    let words = memory.page_bytes / WORD_BYTES;
    let (mut got, mut want) = (vec![0; words], vec![0; words]);
    sys::read_words(cell.address, &mut got);
    memory.expected(area, index, cell.expect, &mut want);
    got == want
}

struct PassCounters {
    report: StepReport,
    touches: Histogram<u64>,
    faults: Histogram<u64>,
}

fn visit_all(
    memory: &Memory,
    order: impl Iterator<Item = Visit>,
    pass: Pass,
) -> Result<PassCounters> {
    let page_words = memory.page_bytes / WORD_BYTES;
    let words = if pass.check == Check::Full {
        page_words
    } else {
        QUICK_WORDS
    };
    let (mut got, mut want) = (vec![0; words], vec![0; words]);
    let mut counters = PassCounters {
        report: StepReport::default(),
        touches: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2)?,
        faults: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2)?,
    };
    let mut seen: Vec<Vec<bool>> = memory
        .areas
        .iter()
        .map(|area| vec![false; area.cells.len()])
        .collect();
    let (mut sum, mut expected_sum) = (0u64, 0u64);
    let limit = pass.limit_ms.map(Duration::from_millis);
    let started = Instant::now();
    for (area, index) in order {
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            counters.report.cut_short = true;
            break;
        }
        let cell = memory.areas[area as usize].cells[index as usize];
        if cell.expect == Expect::Gone {
            continue;
        }
        let touched = Instant::now();
        sys::read_word(cell.address);
        let took = u64::try_from(touched.elapsed().as_nanos())?.max(1);
        let first = !std::mem::replace(&mut seen[area as usize][index as usize], true);
        if first {
            counters.touches.saturating_record(took);
        }
        if first && took >= FAULT_NS {
            counters.faults.saturating_record(took);
        }
        sys::read_words(cell.address, &mut got);
        memory.expected(area, index, cell.expect, &mut want);
        if matches!(cell.expect, Expect::ZeroOr(_)) && got.iter().all(|&word| word == 0) {
            want.fill(0);
        }
        counters.compare((area, index), cell, &want, &got);
        if pass.check == Check::Full {
            sum = sum.wrapping_add(digest(area, index, &got));
            expected_sum = expected_sum.wrapping_add(digest(area, index, &want));
        }
    }
    if pass.check == Check::Full {
        counters.report.digest = Some(sum);
        counters.report.expected_digest = Some(expected_sum);
    }
    Ok(counters)
}

impl PassCounters {
    fn compare(&mut self, (area, index): Visit, cell: Cell, want: &[u64], got: &[u64]) {
        let report = &mut self.report;
        report.checked += 1;
        let Some(offset) = want.iter().zip(got).position(|(want, got)| want != got) else {
            return;
        };
        if got.starts_with(&POISON_MARK) {
            report.poisoned += 1;
            return;
        }
        let is_zero = got.iter().all(|&word| word == 0);
        report.wrong += 1;
        report.wrong_zero += u64::from(is_zero);
        if report.wrong_pages.len() < WRONG_PAGES_TOLD {
            report.wrong_pages.push(WrongPage {
                address: cell.address as u64,
                area,
                index,
                generation: match cell.expect {
                    Expect::Generation(generation) | Expect::ZeroOr(generation) => generation,
                    Expect::Zero | Expect::Gone => 0,
                },
                offset: to_u32(offset * WORD_BYTES),
                expected: want[offset],
                got: got[offset],
                is_zero,
            });
        }
    }

    /// One report of what all threads found.
    fn sum(passes: Vec<Result<PassCounters>>) -> Result<StepReport> {
        let mut all: Option<PassCounters> = None;
        for counters in passes {
            let counters = counters?;
            let Some(sum) = &mut all else {
                all = Some(counters);
                continue;
            };
            sum.touches.add(&counters.touches)?;
            sum.faults.add(&counters.faults)?;
            let (into, from) = (&mut sum.report, counters.report);
            into.checked += from.checked;
            into.wrong += from.wrong;
            into.wrong_zero += from.wrong_zero;
            into.poisoned += from.poisoned;
            into.cut_short |= from.cut_short;
            into.wrong_pages.extend(from.wrong_pages);
            into.wrong_pages.truncate(WRONG_PAGES_TOLD);
            let add = |a: Option<u64>, b: Option<u64>| Some(a?.wrapping_add(b?));
            into.digest = add(into.digest, from.digest);
            into.expected_digest = add(into.expected_digest, from.expected_digest);
        }
        let Some(counters) = all else {
            anyhow::bail!("a pass has at least one thread")
        };
        Ok(StepReport {
            touches: Latency::of(&counters.touches),
            faults: Latency::of(&counters.faults),
            ..counters.report
        })
    }
}
