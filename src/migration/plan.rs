//! What moving a service by its log would cost, and which way of moving is the best. Pure.

use std::time::Duration;

use super::convergence::{Costs, to_f64};

/// A log, as it was looked at.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct LogFacts {
    /// Bytes of all its files.
    pub bytes: u64,
    /// Pieces of clients in it.
    pub pieces: u64,
    /// How often the recorder waited in vain for an answer: a replay waits there as long.
    pub waits: u64,
    /// How long each time, µs.
    pub wait_us: u32,
    /// What arrives, bytes a second.
    pub bytes_per_s: f64,
}

/// What a replay costs on these hosts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ReplayCosts {
    /// The start of a service, and all that is said before the first piece, ms.
    pub start_ms: f64,
    /// A piece and its answer, over loopback, µs.
    pub piece_us: f64,
    /// Holding clients, the digests, the routes and the decision, ms.
    pub switch_ms: f64,
}

impl Default for ReplayCosts {
    fn default() -> ReplayCosts {
        ReplayCosts {
            start_ms: 200.0,
            piece_us: 100.0,
            switch_ms: 60.0,
        }
    }
}

/// What one way of moving would cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forecast {
    /// How long clients would wait.
    pub downtime: Duration,
    /// From the command's start until everything is at the destination.
    pub total: Duration,
    /// Whether the destination has the memory for it.
    pub fits: bool,
}

/// What a replay of `log` would cost. `None`: more arrives than could be replayed, so that it would not end.
pub fn forecast_replay(
    log: &LogFacts,
    replay: &ReplayCosts,
    link: &Costs,
    fits: bool,
) -> Option<Forecast> {
    let told_s =
        (to_f64(log.pieces) * replay.piece_us + to_f64(log.waits) * f64::from(log.wait_us)) / 1e6;
    let sent_s = to_f64(log.bytes) / link.bytes_per_s.max(1.0);
    // Sending overlaps with telling.
    let seconds = told_s.max(sent_s);
    // What arrives while it is replayed is replayed too, and so on.
    let share = match log.bytes {
        0 => 0.0,
        bytes => log.bytes_per_s.max(0.0) * seconds / to_f64(bytes),
    };
    if share >= 1.0 {
        return None;
    }
    let caught_up_s = seconds / (1.0 - share);
    let downtime_s = replay.switch_ms / 1e3;
    Some(Forecast {
        downtime: Duration::try_from_secs_f64(downtime_s).ok()?,
        total: Duration::try_from_secs_f64(replay.start_ms / 1e3 + caught_up_s + downtime_s)
            .ok()?,
        fits,
    })
}

/// A way is worth its later costs if another one would let clients wait for so many times longer.
const CLOSE: f64 = 1.5;

/// Which of the ways moves everything soonest, among those that fit and whose downtime is close to the shortest; `None` if
/// none fits.
pub fn recommend(ways: &[Forecast]) -> Option<usize> {
    let fitting = || ways.iter().enumerate().filter(|(_, way)| way.fits);
    let shortest = fitting().map(|(_, way)| way.downtime).min()?;
    let close = shortest.mul_f64(CLOSE);
    let best = fitting()
        .filter(|(_, way)| way.downtime <= close)
        .min_by_key(|(_, way)| way.total);
    best.map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::{Mode, predict_downtime};

    const MIB: u64 = 1 << 20;

    fn forecast(log: &LogFacts) -> Option<Forecast> {
        forecast_replay(log, &ReplayCosts::default(), &Costs::default(), true)
    }

    fn memory(mode: Mode, bytes: u64) -> Forecast {
        let costs = Costs::default();
        let downtime = predict_downtime(mode, &costs, bytes, bytes, 0);
        let sent = Duration::from_secs_f64(to_f64(bytes) / costs.bytes_per_s);
        Forecast {
            downtime,
            total: downtime + sent,
            fits: true,
        }
    }

    #[test]
    fn a_replay_takes_what_its_pieces_its_waits_or_its_way_take() {
        let log = LogFacts {
            bytes: 10 * MIB,
            pieces: 100_000,
            ..LogFacts::default()
        };
        let total = |log: &LogFacts| forecast(log).unwrap().total.as_millis();
        assert_eq!(total(&log), 10_260);
        let waits = LogFacts {
            waits: 1000,
            wait_us: 2000,
            ..log
        };
        assert_eq!(total(&waits), 12_260);
        let long = LogFacts {
            bytes: 11_000_000_000,
            ..log
        };
        assert_eq!(total(&long), 100_260);
        assert_eq!(total(&LogFacts::default()), 260);
    }

    #[test]
    fn what_arrives_meanwhile_is_replayed_too_and_may_be_too_much() {
        let log = |bytes_per_s| LogFacts {
            bytes: 10_000_000,
            pieces: 100_000,
            bytes_per_s,
            ..LogFacts::default()
        };
        // Replayed at 1 MB/s: half of it arrives again.
        assert_eq!(forecast(&log(500_000.0)).unwrap().total.as_millis(), 20_260);
        assert_eq!(forecast(&log(1_000_000.0)), None);
        assert_eq!(forecast(&log(f64::INFINITY)), None);
    }

    #[test]
    fn a_large_state_of_few_commands_moves_by_its_log_and_a_small_one_by_its_memory() {
        let short = LogFacts {
            bytes: MIB,
            pieces: 1000,
            ..LogFacts::default()
        };
        let large = [
            memory(Mode::Cold, 20_000 * MIB),
            memory(Mode::PostCopy, 20_000 * MIB),
            forecast(&short).unwrap(),
        ];
        assert_eq!(recommend(&large), Some(2));
        let long = LogFacts {
            bytes: 10_000 * MIB,
            pieces: 20_000_000,
            ..LogFacts::default()
        };
        let fast = ReplayCosts {
            switch_ms: 160.0,
            ..ReplayCosts::default()
        };
        let long = forecast_replay(&long, &fast, &Costs::default(), true).unwrap();
        let small = [memory(Mode::Cold, 8 * MIB), long];
        assert_eq!(recommend(&small), Some(0));
    }

    #[test]
    fn what_does_not_fit_is_not_recommended() {
        let way = |ms, fits| Forecast {
            downtime: Duration::from_millis(ms),
            total: Duration::from_millis(ms),
            fits,
        };
        assert_eq!(recommend(&[way(900, true), way(100, true)]), Some(1));
        assert_eq!(recommend(&[way(900, true), way(100, false)]), Some(0));
        assert_eq!(recommend(&[way(1, false)]), None);
        assert_eq!(recommend(&[]), None);
    }
}
