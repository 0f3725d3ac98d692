//! A command of the user's that switches a route, and is run once more to give it back.

use std::fmt;
use std::str::FromStr;

use pageferry::error::Result;
use serde::{Deserialize, Serialize};

use super::Facts;
use crate::shell;

/// Where commands print to, in the migration's directory.
const LOG: &str = "routes.log";

/// The command, for a shell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Exec(String);

impl FromStr for Exec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Exec, String> {
        match text.trim().is_empty() {
            true => Err("exec: without a command".to_owned()),
            false => Ok(Exec(text.to_owned())),
        }
    }
}

impl fmt::Display for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Exec {
    /// Runs it for `step`: `switch` or `back`.
    ///
    /// # Errors
    /// It fails, or takes too long: then its processes are killed.
    pub(super) async fn run(&self, step: &str, facts: Facts<'_>) -> Result<()> {
        let mut variables = vec![
            ("ROUTE", step.to_owned()),
            ("DIR", facts.dir.display().to_string()),
        ];
        variables.extend_from_slice(facts.variables);
        let title = format!("the route exec:{self}");
        shell::run(
            &title,
            &self.0,
            &variables,
            &facts.dir.join(LOG),
            facts.limit,
        )
        .await
    }
}
