//! What zdtm says of its tests, and what two runs of it say otherwise.

use std::collections::{BTreeMap, BTreeSet};

/// What became of the tests of one run.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Outcomes {
    pub(super) passed: BTreeSet<String>,
    /// Test and the step that failed.
    pub(super) failed: BTreeMap<String, String>,
    pub(super) skipped: BTreeSet<String>,
}

impl Outcomes {
    /// Reads what a run printed. A test that runs in several flavours passes if it does in each.
    pub(super) fn parse(printed: &str) -> Outcomes {
        let mut outcomes = Outcomes::default();
        for line in printed.lines() {
            // "===== Test NAME PASS =====", "##### Test NAME FAIL at STEP #####"
            let rule = |c: char| c == '=' || c == '#';
            let words = line.trim_matches(rule).trim();
            if let Some(rest) = words
                .strip_prefix("Test ")
                .filter(|_| line.starts_with(rule))
            {
                if let Some(name) = rest.strip_suffix(" PASS") {
                    outcomes.passed.insert(name.to_owned());
                } else if let Some((name, step)) = rest.split_once(" FAIL at ") {
                    outcomes.failed.insert(name.to_owned(), step.to_owned());
                }
            } else if let Some((name, _)) = line
                .strip_prefix(" * ")
                .and_then(|failed| failed.rsplit_once('('))
            {
                // The list at the end also has tests that did not start.
                let step = || "start".to_owned();
                outcomes.failed.entry(name.to_owned()).or_insert_with(step);
            } else if let Some((name, _)) = line
                .strip_prefix("Skipping ")
                .and_then(|skipped| skipped.split_once(" ("))
                && name.contains('/')
            {
                outcomes.skipped.insert(name.to_owned());
            }
        }
        let failed = &outcomes.failed;
        outcomes.passed.retain(|name| !failed.contains_key(name));
        outcomes
    }

    /// How many lines of a run tell that it goes on.
    pub(super) fn steps(printed: &str) -> usize {
        let tells = |line: &&str| {
            line.starts_with("=== Run ") || line.starts_with("Skipping ") || line.contains(" Test ")
        };
        printed.lines().filter(tells).count()
    }

    /// Tests that passed in one of two runs and failed in the other.
    pub(super) fn differing(&self, other: &Outcomes) -> BTreeSet<String> {
        let both = |one: &Outcomes, two: &Outcomes| -> Vec<String> {
            let failed = two.failed.keys();
            failed
                .filter(|name| one.passed.contains(*name))
                .cloned()
                .collect()
        };
        let mut differing: BTreeSet<String> = both(self, other).into_iter().collect();
        differing.extend(both(other, self));
        differing
    }
}

/// How often a test passed with either side.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Passes {
    pub(super) stock: u32,
    pub(super) ours: u32,
}

impl Passes {
    pub(super) fn count(&mut self, name: &str, stock: &Outcomes, ours: &Outcomes) {
        self.stock += u32::from(stock.passed.contains(name));
        self.ours += u32::from(ours.passed.contains(name));
    }

    /// Whether stock CRIU passes where pageferry does not.
    pub(super) fn is_fault(self) -> bool {
        self.stock > 0 && self.ours == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: &str = "userns is supported\n\
        Skipping rtc at root\n\
        Skipping zdtm/static/three (manual run only)\n\
        === Run 1/3 ===-- zdtm/static/one\n\
        ======================= Run zdtm/static/one in h =======================\n\
        ================== Test zdtm/static/one PASS ==================\n\
        ================== Test zdtm/static/two PASS ==================\n\
        ############ Test zdtm/static/four FAIL at CRIU dump ############\n\
        # 1 TEST(S) FAILED (TOTAL 5/SKIPPED 1) #\n \
        * zdtm/static/four(h)\n \
        * zdtm/static/five(h)\n";

    #[test]
    fn reads_what_zdtm_prints() {
        let outcomes = Outcomes::parse(STOCK);
        let passed = ["zdtm/static/one", "zdtm/static/two"].map(str::to_owned);
        assert_eq!(outcomes.passed, passed.into());
        let failed = [
            ("zdtm/static/four".to_owned(), "CRIU dump".to_owned()),
            ("zdtm/static/five".to_owned(), "start".to_owned()),
        ];
        assert_eq!(outcomes.failed, failed.into());
        assert_eq!(outcomes.skipped, ["zdtm/static/three".to_owned()].into());
        assert_eq!(Outcomes::steps(STOCK), 6);
    }

    #[test]
    fn tells_what_differs() {
        let stock = Outcomes::parse(STOCK);
        let ours = Outcomes::parse(
            "== Test zdtm/static/one PASS ==\n## Test zdtm/static/two FAIL at result check ##\n\
             == Test zdtm/static/four PASS ==\n",
        );
        let differing = ["zdtm/static/four", "zdtm/static/two"].map(str::to_owned);
        assert_eq!(stock.differing(&ours), differing.clone().into());
        assert_eq!(ours.differing(&stock), differing.into());
        assert_eq!(stock.differing(&stock), BTreeSet::new());
    }

    #[test]
    fn a_fault_is_what_never_passes() {
        let stock = Outcomes::parse(STOCK);
        let ours = Outcomes::parse("## Test zdtm/static/two FAIL at result check ##\n");
        let mut passes = Passes::default();
        passes.count("zdtm/static/two", &stock, &ours);
        assert!(passes.is_fault());
        passes.count("zdtm/static/two", &stock, &stock);
        assert_eq!(passes, Passes { stock: 2, ours: 1 });
        assert!(!passes.is_fault());
    }
}
