//! Commands of the user's at three points of a migration, with the facts in their environment. docs/migration.md
//! lists them.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use pageferry::error::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::shell;

/// Where what they print goes, in the migration's directory.
const LOG: &str = "hooks.log";

/// The commands, as they are written down.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Hooks {
    pub(super) pre_freeze: Option<String>,
    pub(super) post_resume: Option<String>,
    pub(super) on_failure: Option<String>,
    /// How long each may take, ms.
    pub(super) limit_ms: u64,
}

/// A point of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Point {
    PreFreeze,
    PostResume,
    OnFailure,
}

impl Point {
    fn name(self) -> &'static str {
        match self {
            Point::PreFreeze => "pre-freeze",
            Point::PostResume => "post-resume",
            Point::OnFailure => "on-failure",
        }
    }
}

impl Hooks {
    /// How long each command may take.
    pub(super) fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }

    fn command(&self, point: Point) -> Option<&str> {
        match point {
            Point::PreFreeze => self.pre_freeze.as_deref(),
            Point::PostResume => self.post_resume.as_deref(),
            Point::OnFailure => self.on_failure.as_deref(),
        }
    }

    /// Runs the hook of a point, once for each migration in `dir`, whoever comes to that point again.
    ///
    /// Fails if the hook does, or takes too long: then its processes are killed.
    pub(super) async fn run(
        &self,
        point: Point,
        dir: &Path,
        facts: &[(&'static str, String)],
    ) -> Result<()> {
        let name = point.name();
        let Some(text) = self.command(point) else {
            return Ok(());
        };
        let mark = dir.join(format!("{name}.begun"));
        match File::create_new(&mark) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made.map_err(|error| Error::file("create", &mark, error))?,
        };
        let mut variables = vec![
            ("HOOK", name.to_owned()),
            ("DIR", dir.display().to_string()),
        ];
        variables.extend_from_slice(facts);
        let title = format!("the hook --{name}");
        shell::run(&title, text, &variables, &dir.join(LOG), self.limit()).await
    }
}
