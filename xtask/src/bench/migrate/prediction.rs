//! Predicted against measured downtimes, in migrations of mixed load.

use std::time::Duration;

use anyhow::Result;
use fastrand::Rng;
use testbed::criu::Criu;

use super::super::table::Table;
use super::{Case, Contender, LinkKind, warm_for};

/// Sizes of memory, MiB.
const SIZES_MIB: [u32; 4] = [32, 64, 128, 256];
/// Shares that are written in a second, percent.
const PERCENTS: [u32; 4] = [1, 2, 10, 30];
const MODES: [Contender; 4] = [
    Contender::Cold,
    Contender::PreCopy,
    Contender::PostCopy,
    Contender::Hybrid,
];
/// `--max-downtime`, ms.
const PROMISES_MS: std::ops::Range<u64> = 200..1500;

/// A prediction is right within this share, or this time.
const SHARE: f64 = 0.2;
const TIME_MS: f64 = 30.0;
/// A promise is kept below so many times it.
const PROMISE: f64 = 1.2;
/// Of so many, as many must be right.
const RIGHT_OF_FIFTY: f64 = 45.0 / 50.0;

/// Moves so many processes, and judges. A promise binds modes with rounds; the others have no decision.
pub(super) fn run(criu: &Criu, migrations: u32, seed: u64) -> Result<()> {
    let largest = SIZES_MIB.into_iter().max().unwrap_or_default();
    warm_for(largest);
    let mut rng = Rng::with_seed(seed);
    let (mut right, mut kept, mut promised) = (0_u32, 0_u32, 0_u32);
    let mut table = Table::new(["migration", "predicted ms", "pause ms", "promised ms", ""]);
    for number in 0..migrations {
        let case = Case {
            mib: SIZES_MIB[rng.usize(0..SIZES_MIB.len())],
            percent: PERCENTS[rng.usize(0..PERCENTS.len())],
            link: LinkKind::ALL[rng.usize(0..LinkKind::ALL.len())],
        };
        let who = MODES[rng.usize(0..MODES.len())];
        let promise = Duration::from_millis(rng.u64(PROMISES_MS));
        let has_rounds = matches!(who, Contender::PreCopy | Contender::Hybrid);
        let promise_ms = format!("{}ms", promise.as_millis());
        let options = ["--max-downtime", &promise_ms, "--on-missed", "post-copy"];
        let options = if has_rounds { &options[..] } else { &[] };
        let moved = super::run::run(criu, &case, who, options)?;
        let predicted = moved.reported("predicted_downtime_ms").unwrap_or_default();
        let off = (moved.pause_ms - predicted).abs();
        let is_right = off <= TIME_MS.max(SHARE * predicted);
        right += u32::from(is_right);
        let promise = promise.as_secs_f64() * 1e3;
        // Where the promise was out of reach the mode was changed, and nothing promised.
        let proceeded = has_rounds && predicted <= promise;
        let is_kept = moved.pause_ms <= PROMISE * promise;
        promised += u32::from(proceeded);
        kept += u32::from(proceeded && is_kept);
        let mode = who.mode().unwrap_or_default();
        table.row(
            &format!("{number}: {mode}, {}", case.describe()),
            [
                format!("{predicted:.0}"),
                format!("{:.0}", moved.pause_ms),
                if proceeded {
                    format!("{promise:.0}")
                } else {
                    "-".to_owned()
                },
                if is_right { "right" } else { "off" }.to_owned(),
            ],
        );
    }
    println!("{table}");
    let verdict = |count: u32, of: u32| match f64::from(count) >= RIGHT_OF_FIFTY * f64::from(of) {
        true => "pass",
        false => "FAIL",
    };
    println!(
        "right within 20 % or 30 ms   {right} of {migrations}   {}",
        verdict(right, migrations)
    );
    println!(
        "under 1.2 times the promise  {kept} of {promised}   {}",
        verdict(kept, promised)
    );
    Ok(())
}
