//! Tests that run once for each real CRIU.

use anyhow::Result;

use crate::criu::{Criu, Suite};
use crate::daemons::Make;
use crate::gate;
use crate::test_dir::{TestDir, with_test_dir};

/// Set to `criu` to put CRIU's own daemons to the tests: a test that they fail too, where they are
/// known to be right, is a wrong test.
pub const MAKE_VARIABLE: &str = "PAGEFERRY_TEST_MAKE";

/// Whose daemons are tested.
pub fn make(criu: &Criu) -> Make<'_> {
    match std::env::var(MAKE_VARIABLE) {
        Ok(make) if make == "criu" => Make::Criu(criu),
        _ => Make::Ours,
    }
}

/// Runs a test with the CRIU of a suite, in a test directory of its own.
pub fn with_criu(suite: Suite, test: impl FnOnce(&TestDir, &Criu) -> Result<()>) {
    let Some(criu) = gate::criu(suite) else {
        return;
    };
    eprintln!("CRIU {} of {}", criu.version, suite.name());
    with_test_dir(|test_dir| test(test_dir, &criu));
}

/// Makes a test for each real CRIU of a function `fn(&TestDir, &Criu) -> anyhow::Result<()>`.
#[macro_export]
macro_rules! for_each_criu {
    ($($(#[$attribute:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$attribute])*
        mod $name {
            use $crate::criu::Suite;
            use $crate::suite::with_criu;

            #[test]
            fn trixie() {
                with_criu(Suite::Trixie, super::$name);
            }

            #[test]
            fn sid() {
                with_criu(Suite::Sid, super::$name);
            }

            #[test]
            fn experimental() {
                with_criu(Suite::Experimental, super::$name);
            }
        }
    )+};
}
