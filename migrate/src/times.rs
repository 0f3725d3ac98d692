//! Times on command lines and in files of rules.

use std::time::Duration;

use pageferry::limits::TIMEOUT_S_MAX;

/// A time with its unit: 300ms, 1.5s, 10m, 1h.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: a number and ms, s, m or h");
    let digits = text
        .find(|c: char| c.is_ascii_alphabetic())
        .ok_or_else(wrong)?;
    let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    // Nothing longer than the other programs take.
    #[allow(clippy::cast_precision_loss)]
    let most = Duration::from_secs(TIMEOUT_S_MAX);
    match Duration::try_from_secs_f64(number * unit) {
        Ok(time) if !time.is_zero() && time <= most => Ok(time),
        _ => Err(format!("{text:?} is not between 1 ms and a year")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let of = |text| duration(text).unwrap();
        assert_eq!(of("300ms"), Duration::from_millis(300));
        assert_eq!(of("1.5s"), Duration::from_millis(1500));
        assert_eq!(of("10m"), Duration::from_secs(600));
        for bad in ["", "5", "s", "0s", "-1s", "1d", "1e30s", "nans"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
