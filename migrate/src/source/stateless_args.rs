//! Options of `pageferry migrate` for containers whose state does not matter.

use std::time::Duration;

use pageferry::limits::TIMEOUT_S_MAX;
use pageferry::migration::messages::Ready;

use crate::times::duration;

/// See the module's text.
#[derive(clap::Args, Debug)]
pub(super) struct StatelessArgs {
    /// Start a new instance of the container at the destination, from its bundle and files
    ///
    /// With `--mode cold` it stops here before it starts there. With `--mode live` it stops here once it is ready there,
    /// routes are switched and its connections here have ended.
    #[arg(long, requires = "container",
        conflicts_with_all = ["tcp", "max_downtime", "throttle", "on_missed", "serve_on", "volume", "files"])]
    pub(super) stateless: bool,

    /// The started container is ready when this probe at the destination succeeds
    ///
    /// `tcp:[HOST:]PORT` and `http://HOST[:PORT]/PATH` connect in the container's network, without HOST to loopback;
    /// `exec:COMMAND` is run in the container by its `sh`.
    #[arg(long, value_name = "HOW", requires = "stateless")]
    pub(super) ready: Option<Ready>,

    /// How long connections may continue here after routes were switched: 30, 2m; 0 cuts them
    #[arg(long, value_name = "SECONDS", default_value = "30", requires = "stateless",
        value_parser = seconds)]
    pub(super) drain: Duration,
}

/// Seconds, or a time with its unit.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if seconds <= TIMEOUT_S_MAX => Ok(Duration::from_secs(seconds)),
        Ok(_) => Err(format!("{text} s are more than a year")),
        Err(_) => duration(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_a_unit_is_in_seconds() {
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        assert_eq!(seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds("300ms"), Ok(Duration::from_millis(300)));
        for bad in ["", "-1", "x", "99999999999"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
