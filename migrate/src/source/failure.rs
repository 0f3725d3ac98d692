//! Why a migration was given up: the step, the side, what CRIU says, and what to do.

use std::fmt;

use pageferry::criu::log::{advice, cause};
use pageferry::error::Error;
use pageferry::migration::events::{Side, Step};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::client::is_of_agent;

/// Why a migration was given up.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Failure {
    /// The part of the migration that failed.
    pub(crate) step: Step,
    /// The host at which it failed.
    pub(crate) side: Side,
    /// What went wrong, in words.
    pub(crate) text: String,
    /// The line in which CRIU's own log says what went wrong first; null if CRIU says nothing.
    pub(crate) criu: Option<String>,
    /// What helps; null if the text says all that is known.
    pub(crate) advice: Option<String>,
}

impl Failure {
    /// What `error` says of a `step`.
    pub(super) fn of(step: Step, error: &Error) -> Failure {
        let whole = error.to_string();
        let criu = cause(&whole);
        // Where CRIU's line stands, the rest is the name of the log and lines around it.
        let text = match (criu, whole.split_once(":\n")) {
            (Some(_), Some((text, _))) => text,
            _ => whole.as_str(),
        };
        let criu = criu.map(|line| printable(without_name(line)));
        Failure {
            step,
            side: match is_of_agent(error) {
                true => Side::Destination,
                false => Side::Source,
            },
            text: printable(text),
            advice: criu.as_deref().and_then(advice).map(str::to_owned),
            criu,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, side) = (self.step.name(), self.side.name());
        write!(f, "step {step} failed at the {side}: {}", self.text)?;
        if let Some(line) = &self.criu {
            write!(f, "; CRIU says: {line}")?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "; what to do: {advice}")?;
        }
        Ok(())
    }
}

/// A line of a log without the name of its file before it.
fn without_name(line: &str) -> &str {
    match line.split_once(".log: ") {
        Some((_, rest)) => rest,
        None => line,
    }
}

/// Text of another host, for a terminal.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use pageferry::error::Kind;

    use super::*;
    use crate::client::AgentProblem;

    #[test]
    fn a_failure_names_step_side_line_and_advice() {
        let text = "criu restore failed (exit status: 1):\n/d/images/restore.log: (00.1)  77: Error \
                    (criu/files-reg.c:23): Can't open file srv/x on restore: No such file or directory";
        let of = "the destination could not restore";
        let error = Error::wrap(Kind::PeerLost, of, AgentProblem(text.to_owned()));
        let failure = Failure::of(Step::Restore, &error);
        assert_eq!(
            (failure.step, failure.side),
            (Step::Restore, Side::Destination)
        );
        assert_eq!(
            failure.to_string(),
            "step restore failed at the destination: the destination could not restore: criu restore failed (exit \
             status: 1); CRIU says: (00.1)  77: Error (criu/files-reg.c:23): Can't open file srv/x on restore: No \
             such file or directory; what to do: put this file at the destination under the same path, or send its \
             directory along (--volume)"
        );
    }

    #[test]
    fn what_criu_has_no_part_in_is_told_as_it_is() {
        let error = Error::new(Kind::Interrupted, "stopped by\u{1b}[2J Ctrl-C");
        let failure = Failure::of(Step::Round, &error);
        assert_eq!(failure.side, Side::Source);
        assert_eq!(
            failure.to_string(),
            "step round failed at the source: stopped by [2J Ctrl-C"
        );
    }
}
