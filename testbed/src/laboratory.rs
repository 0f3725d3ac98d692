//! A laboratory for userfaultfd: what this kernel's mechanisms cost, each for itself.
//!
//! ```text
//!   catalogue  all groups of mechanisms        faults         how a handler waits for faults
//!   report     samples, as text and as JSON    fills          COPY, ZEROPAGE, CONTINUE, MOVE, POISON by piece
//!   cpus       which CPU a thread runs on      write_protect  WP and WP_ASYNC by dirty share
//!                                              collapse       MADV_COLLAPSE
//! ```
//!
//! A mechanism is a function that makes its memory anew, measures one round and returns a figure for each metric of its
//! group. Mechanisms of a group take turns, and the first round is thrown away. What the kernel lacks ([`Unsupported`]) is a
//! result; any other error ends the measurement.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use pageferry::sys::laboratory;

mod catalogue;
mod collapse;
mod cpus;
mod faults;
mod fills;
mod report;
mod write_protect;

pub use report::{Args, GroupSamples, MechanismSamples, Samples, main};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Memory of one mechanism in one round, bytes: a multiple of 2 MiB.
    pub bytes: usize,
    /// Rounds that count, after one that does not.
    pub rounds: u32,
    /// Faults of one round, at most.
    pub faults: usize,
    /// No further fault of a round begins after this.
    pub time: Duration,
}

impl Scale {
    /// Enough for medians, in about a minute.
    pub const FULL: Scale = Scale {
        bytes: 64 << 20,
        rounds: 9,
        faults: 4096,
        time: Duration::from_millis(400),
    };

    /// Every mechanism once, in about a second: shows that all of them work, and no speed.
    pub const TINY: Scale = Scale {
        bytes: 2 << 20,
        rounds: 1,
        faults: 64,
        time: Duration::from_millis(10),
    };
}

/// What the kernel, or this process's rights, cannot do: said in the place of samples.
#[derive(Debug)]
pub struct Unsupported(pub String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsupported {}

/// One round of a mechanism: a figure for each metric of the group.
type Round = Box<dyn FnMut(&Scale) -> Result<Vec<f64>>>;

/// Something that is measured.
struct Mechanism {
    name: String,
    round: Round,
}

/// Mechanisms under the same conditions.
struct Group {
    name: String,
    /// The conditions by name, numbers and words.
    conditions: serde_json::Value,
    /// What a round tells, with the unit behind it. Smaller is better, but for what is `/s`.
    metrics: &'static [&'static str],
    mechanisms: Vec<Mechanism>,
}

/// Fails with [`Unsupported`] unless the kernel has the feature.
fn need(feature: u64, name: &str, since: &str) -> Result<()> {
    let has = laboratory::features()
        .map_err(|error| Unsupported(format!("no userfaultfd for this process: {error}")))?;
    if has & feature == feature {
        return Ok(());
    }
    Err(Unsupported(format!("the kernel has no {name} (Linux {since})")).into())
}

/// Measures the groups whose name, or one of whose mechanisms, contains `only`; tells `begun` each name before.
///
/// # Errors
/// A mechanism failed for another reason than that the kernel lacks it.
pub fn measure(scale: &Scale, only: &str, mut begun: impl FnMut(&str)) -> Result<Samples> {
    let mut groups = Vec::new();
    for mut group in catalogue::all() {
        if !group.name.contains(only) {
            group.mechanisms.retain(|one| one.name.contains(only));
        }
        if !group.mechanisms.is_empty() {
            begun(&group.name);
            groups.push(take(group, scale)?);
        }
    }
    Samples::of(scale, groups)
}

/// All rounds of a group: its mechanisms take turns, forwards and backwards.
fn take(group: Group, scale: &Scale) -> Result<GroupSamples> {
    let mut mechanisms = group.mechanisms;
    let mut samples: Vec<MechanismSamples> = mechanisms
        .iter()
        .map(|one| MechanismSamples::of(&one.name))
        .collect();
    for round in 0..=scale.rounds {
        let mut turns: Vec<usize> = (0..mechanisms.len()).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for at in turns {
            if samples[at].lacking.is_some() {
                continue;
            }
            match (mechanisms[at].round)(scale) {
                Ok(figures) if round > 0 => samples[at].rounds.push(figures),
                Ok(_) => {}
                Err(error) => match error.downcast_ref::<Unsupported>() {
                    Some(unsupported) => samples[at].lacking = Some(unsupported.0.clone()),
                    None => {
                        let what = format!("{}: {}", group.name, mechanisms[at].name);
                        return Err(error.context(what));
                    }
                },
            }
        }
    }
    Ok(GroupSamples {
        name: group.name,
        conditions: group.conditions,
        metrics: group.metrics.iter().map(|&name| name.to_owned()).collect(),
        mechanisms: samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    fn mechanism(name: &str, round: impl FnMut(&Scale) -> Result<Vec<f64>> + 'static) -> Mechanism {
        Mechanism {
            name: name.to_owned(),
            round: Box::new(round),
        }
    }

    fn group(mechanisms: Vec<Mechanism>) -> Group {
        Group {
            name: "group".to_owned(),
            conditions: serde_json::Value::Null,
            metrics: &["ns"],
            mechanisms,
        }
    }

    #[test]
    fn what_lacks_is_said_and_the_first_round_is_thrown_away() {
        let mut count = 0.0;
        let counts = mechanism("counts", move |_| {
            count += 1.0;
            Ok(vec![count])
        });
        let lacks = mechanism("lacks", |_| Err(Unsupported("too old".to_owned()).into()));
        let scale = Scale {
            rounds: 2,
            ..Scale::TINY
        };
        let taken = take(group(vec![counts, lacks]), &scale).unwrap();
        assert_eq!(taken.mechanisms[0].rounds, [[2.0], [3.0]]);
        assert_eq!(taken.mechanisms[1].lacking.as_deref(), Some("too old"));
        assert!(taken.mechanisms[1].rounds.is_empty());
    }

    #[test]
    fn what_fails_is_an_error_with_its_name() {
        let fails = mechanism("fails", |_| bail!("broken"));
        let error = take(group(vec![fails]), &Scale::TINY).unwrap_err();
        assert_eq!(format!("{error:#}"), "group: fails: broken");
    }
}
