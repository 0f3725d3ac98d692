//! What libFuzzer writes: a line for each input that it keeps, totals at the end. Pure.

use serde::Serialize;

/// What a run came to.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Debug)]
pub(super) struct Totals {
    /// Inputs that were tried.
    pub(super) executions: u64,
    /// Places in the code that were reached.
    pub(super) coverage: u64,
    /// Those, how often each was reached in one input, and what was compared there.
    pub(super) features: u64,
    /// Inputs that are kept, as each of them reached something new.
    pub(super) inputs: u64,
}

/// Reads the totals out of libFuzzer's output.
pub(super) fn totals(log: &str) -> Totals {
    let mut totals = Totals::default();
    for line in log.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            // Inputs and their bytes: 12/34Kb.
            let number = words.get(at + 1)?.split('/').next()?;
            number.parse::<u64>().ok()
        };
        if let Some(executions) = after("stat::number_of_executed_units:") {
            totals.executions = executions;
        }
        if line.starts_with('#') {
            totals.coverage = after("cov:").unwrap_or(totals.coverage);
            totals.features = after("ft:").unwrap_or(totals.features);
            totals.inputs = after("corp:").unwrap_or(totals.inputs);
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_totals_are_read() {
        let log = "INFO: seed corpus: files: 2\n\
            #3\tINITED cov: 361 ft: 362 corp: 2/6b exec/s: 0 rss: 51Mb\n\
            #262144\tpulse  cov: 1101 ft: 4200 corp: 311/20Kb lim: 4096 exec/s: 87381 rss: 90Mb\n\
            Done 400000 runs in 4 second(s)\n\
            stat::number_of_executed_units: 400000\n";
        let expected = Totals {
            executions: 400_000,
            coverage: 1101,
            features: 4200,
            inputs: 311,
        };
        assert_eq!(totals(log), expected);
        assert_eq!(totals("nothing"), Totals::default());
    }
}
