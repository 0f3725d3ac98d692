//! Rules of `pageferry watch` under any course of their conditions, and under restarts.

#[path = "common/seeds.rs"]
mod seeds;

use pageferry::watch::{Level, SavedState, Timing, Trigger};
use proptest::prelude::*;

use seeds::for_each;

/// Courses of one run.
const SEEDS: u64 = 100;

#[derive(Clone, Copy, Debug)]
enum Step {
    Look(u64, Level),
    Wait(u64),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let level = prop_oneof![
        3 => Just(Level::High),
        1 => Just(Level::Between),
        1 => Just(Level::Low),
    ];
    let step = prop_oneof![
        6 => (1..400_u64, level).prop_map(|(time, level)| Step::Look(time, level)),
        2 => (1..2_000_u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..60)
}

fn timing() -> impl Strategy<Value = Timing> {
    (0..1_000_u64, 0..3_000_u64).prop_map(|(hold_ms, cool_down_ms)| Timing {
        hold_ms,
        cool_down_ms,
    })
}

/// Carries steps out, and fires whenever the rule is due. Returns the times of all looks and firings.
fn run(timing: Timing, steps: &[Step]) -> (Vec<(u64, Level)>, Vec<u64>, Vec<u64>) {
    let mut trigger = Trigger::new(timing, SavedState::default());
    let (mut now, mut looks, mut fired, mut restarts) = (0, Vec::new(), Vec::new(), Vec::new());
    for step in steps {
        match *step {
            Step::Look(time, level) => {
                now += time;
                trigger.observe(now, level);
                looks.push((now, level));
            }
            Step::Wait(time) => now += time,
            Step::Restart => {
                trigger = Trigger::new(timing, trigger.saved());
                restarts.push(now);
            }
        }
        if trigger.is_due(now) {
            trigger.fire(now);
            fired.push(now);
            assert!(!trigger.is_due(now), "it fires once");
        }
    }
    (looks, fired, restarts)
}

#[test]
fn a_firing_follows_a_condition_that_has_held() {
    for_each(SEEDS, &(timing(), steps()), |(timing, steps)| {
        let (looks, fired, restarts) = run(timing, &steps);
        for at in fired {
            // The last High that nothing has interrupted began so long before.
            let mut since = None;
            for &(time, level) in looks.iter().filter(|look| look.0 <= at) {
                if restarts
                    .iter()
                    .any(|&restart| since.is_some_and(|s| s <= restart) && restart < time)
                {
                    since = None;
                }
                match level {
                    Level::High => since = since.or(Some(time)),
                    Level::Between => {}
                    Level::Low => since = None,
                }
            }
            let since = since.expect("it fires while its condition holds");
            prop_assert!(since + timing.hold_ms <= at);
        }
        Ok(())
    });
}

#[test]
fn between_two_firings_lie_the_cool_down_and_an_end() {
    for_each(SEEDS, &(timing(), steps()), |(timing, steps)| {
        let (looks, fired, _) = run(timing, &steps);
        for pair in fired.windows(2) {
            prop_assert!(pair[0] + timing.cool_down_ms <= pair[1]);
            let over = looks
                .iter()
                .any(|&(at, level)| level == Level::Low && pair[0] <= at && at <= pair[1]);
            prop_assert!(over, "{fired:?}");
        }
        Ok(())
    });
}

#[test]
fn a_condition_that_holds_fires() {
    for_each(SEEDS, &(timing(), steps()), |(timing, steps)| {
        let (_, before, _) = run(timing, &steps);
        let calm = timing.hold_ms.max(timing.cool_down_ms).max(1);
        let more = [
            Step::Look(1, Level::Low),
            Step::Look(1, Level::High),
            Step::Wait(calm),
        ];
        let (_, after, _) = run(timing, &[&steps[..], &more[..]].concat());
        prop_assert_eq!(after.len(), before.len() + 1);
        Ok(())
    });
}

#[test]
fn values_between_the_thresholds_change_nothing() {
    for_each(SEEDS, &(timing(), steps()), |(timing, steps)| {
        let without: Vec<Step> = steps
            .iter()
            .map(|step| match *step {
                Step::Look(time, Level::Between) => Step::Wait(time),
                other => other,
            })
            .collect();
        prop_assert_eq!(run(timing, &steps).1, run(timing, &without).1);
        Ok(())
    });
}
