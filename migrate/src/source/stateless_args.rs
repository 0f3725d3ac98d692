//! Options of `pageferry migrate` for containers whose state does not matter.

use std::time::Duration;

use pageferry::limits::TIMEOUT_S_MAX;
use pageferry::migration::messages::Ready;

use crate::times::duration;

/// See the module's text.
#[derive(clap::Args, Debug)]
pub(super) struct StatelessArgs {
    /// Start the container anew at the destination, of its bundle and its files
    ///
    /// With `--mode cold` it ends here before it starts there, with `--mode live` once it is ready there,
    /// clients are led there and its connections here have ended.
    #[arg(long, requires = "container",
        conflicts_with_all = ["tcp", "max_downtime", "throttle", "on_missed", "serve_on", "volume", "files"])]
    pub(super) stateless: bool,

    /// The started container is ready when this works, asked at the destination
    ///
    /// `tcp:[HOST:]PORT` and `http://HOST[:PORT]/PATH` are asked in the container's network, without HOST
    /// on loopback; `exec:COMMAND` is run in it by its `sh`.
    #[arg(long, value_name = "HOW", requires = "stateless")]
    pub(super) ready: Option<Ready>,

    /// How long connections may go on here once clients are led to the destination: 30, 2m; 0 cuts them
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
