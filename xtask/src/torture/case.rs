//! What happens to one migration, by chance.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use fastrand::Rng;
use testbed::proxy::{Direction, ImpairmentKind};

/// Values of `--mode`.
pub(super) const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// Who may be killed, by the words of its command line.
pub(super) const PARTICIPANTS: [(&str, &[&str]); 9] = [
    ("migrate", &["pageferry", "migrate"]),
    ("agent", &["pageferry", "agent"]),
    ("guard", &["pageferry", "guard"]),
    ("restore-hook", &["restore-hook"]),
    ("criu dump", &["criu", "dump"]),
    ("criu restore", &["criu", "restore"]),
    ("page-server", &["page-server"]),
    (
        "page-server of the memory",
        &["page-server", "--forward-lazy"],
    ),
    ("lazy-client", &["lazy-client"]),
];

/// The longest wait before a fault, ms: a migration takes about so long.
const MOMENT_MS_MAX: u64 = 1_500;

/// The longest wait behind a milestone, ms: what follows one soon is the most interesting.
const BEHIND_MS_MAX: u64 = 60;

/// The longest time without a link, ms.
const DOWN_MS_MAX: u64 = 2_000;

/// Rates at which the processes write, pages a second.
const DIRTY_RATES: [u32; 3] = [0, 500, 5_000];

/// One of the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Source,
    Destination,
}

/// What a migration has reached, told by files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Milestone {
    /// `criu dump` has begun.
    Dump,
    /// The second round has begun.
    SecondRound,
    /// `criu restore` has begun.
    Restore,
    /// The source has granted.
    Grant,
    /// The agent has decided.
    Decision,
}

const MILESTONES: [Milestone; 5] = [
    Milestone::Dump,
    Milestone::SecondRound,
    Milestone::Restore,
    Milestone::Grant,
    Milestone::Decision,
];

/// The moment of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FaultTime {
    /// So long after the command's start.
    After(Duration),
    /// So long after a milestone; never if it is not reached.
    Behind(Milestone, Duration),
}

/// One fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// SIGKILL to a participant; `chance` chooses among several of a kind.
    Kill { participant: usize, chance: u64 },
    /// SIGTERM to the command.
    Stop,
    /// All connections of one direction are cut.
    Cut(Side, ImpairmentKind),
    /// A bit is flipped in what comes next.
    Flip(Side, Direction, u64),
    /// The link is down for a while.
    LinkDown(Duration),
    /// The disk of a side is full, to the end of the migration.
    FillDisk(Side),
}

/// A fault and its moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    pub(super) when: FaultTime,
    pub(super) what: Action,
}

/// Kinds of faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum Kind {
    /// SIGKILL to a participant
    Kill,
    /// SIGTERM to the command
    Stop,
    /// Connections end
    Cut,
    /// A bit is flipped
    Flip,
    /// No link for a while
    LinkDown,
    /// No room on a disk
    FullDisk,
}

/// Each as often as it stands here.
const KINDS: [Kind; 16] = [
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Kill,
    Kind::Stop,
    Kind::Cut,
    Kind::Cut,
    Kind::Flip,
    Kind::Flip,
    Kind::LinkDown,
    Kind::FullDisk,
    Kind::FullDisk,
];

/// Limits chance.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Selection {
    /// In this mode alone (may be given several times)
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Vec<&'static str>,

    /// With faults of this kind alone (may be given several times)
    #[arg(long, value_name = "KIND")]
    fault: Vec<Kind>,
}

fn mode(text: &str) -> Result<&'static str, String> {
    let found = MODES.into_iter().find(|mode| *mode == text);
    found.ok_or_else(|| format!("modes are {MODES:?}"))
}

/// One migration and what happens to it.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) number: u64,
    pub(super) mode: &'static str,
    pub(super) tls: bool,
    /// The processes hold a TCP connection, which moves with them.
    pub(super) connected: bool,
    pub(super) dirty_pages_per_s: u32,
    /// None, one or two.
    pub(super) faults: Vec<Fault>,
}

impl Case {
    /// The case `number` of the chain of chances that `seed` begins, with what is `wanted` alone.
    pub(super) fn new(seed: u64, number: u64, selection: &Selection) -> Case {
        let modes = match selection.mode.as_slice() {
            [] => &MODES[..],
            modes => modes,
        };
        let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
        let count = match rng.u32(0..10) {
            0 => 0,
            1..=6 => 1,
            _ => 2,
        };
        Case {
            number,
            mode: modes[rng.usize(0..modes.len())],
            tls: rng.bool(),
            connected: rng.u32(0..4) == 0,
            dirty_pages_per_s: DIRTY_RATES[rng.usize(0..DIRTY_RATES.len())],
            faults: (0..count)
                .map(|_| Fault::new(&mut rng, selection))
                .collect(),
        }
    }
}

impl Fault {
    fn new(rng: &mut Rng, selection: &Selection) -> Fault {
        let ms = |rng: &mut Rng, most| Duration::from_micros(rng.u64(0..most * 1_000));
        let when = match rng.u32(0..3) {
            0 => FaultTime::After(ms(rng, MOMENT_MS_MAX)),
            _ => {
                let milestone = MILESTONES[rng.usize(0..MILESTONES.len())];
                FaultTime::Behind(milestone, ms(rng, BEHIND_MS_MAX))
            }
        };
        let side = match rng.bool() {
            true => Side::Source,
            false => Side::Destination,
        };
        let kinds = match selection.fault.as_slice() {
            [] => &KINDS[..],
            kinds => kinds,
        };
        let what = match kinds[rng.usize(0..kinds.len())] {
            Kind::Kill => Action::Kill {
                participant: rng.usize(0..PARTICIPANTS.len()),
                chance: rng.u64(..),
            },
            Kind::Stop => Action::Stop,
            Kind::Cut => {
                let kind = match rng.bool() {
                    true => ImpairmentKind::End,
                    false => ImpairmentKind::Reset,
                };
                Action::Cut(side, kind)
            }
            Kind::Flip => {
                let direction = match rng.bool() {
                    true => Direction::ToServer,
                    false => Direction::ToClient,
                };
                Action::Flip(side, direction, rng.u64(..))
            }
            Kind::LinkDown => Action::LinkDown(ms(rng, DOWN_MS_MAX)),
            Kind::FullDisk => Action::FillDisk(side),
        };
        Fault { when, what }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}: {}", self.number, self.mode)?;
        if self.tls {
            write!(f, ", TLS")?;
        }
        if self.connected {
            write!(f, ", connected")?;
        }
        write!(f, ", {} pages/s", self.dirty_pages_per_s)?;
        for fault in &self.faults {
            match fault.what {
                Action::Kill { participant, .. } => {
                    write!(f, "; kill {}", PARTICIPANTS[participant].0)?;
                }
                what => write!(f, "; {what:?}")?,
            }
            match fault.when {
                FaultTime::After(time) => write!(f, " after {} ms", time.as_millis())?,
                FaultTime::Behind(milestone, time) => {
                    write!(f, " {} ms behind {milestone:?}", time.as_millis())?;
                }
            }
        }
        Ok(())
    }
}
