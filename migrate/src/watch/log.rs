//! What a watcher tells in the event log: a rule that fires, its action, and how that ends.

use std::path::{Path, PathBuf};

use pageferry::error::{Error, Result};
use pageferry::migration::events::{Step, Writer};
use pageferry::migration::messages::MigrationId;

use super::rules::Action;
use crate::events::{Details, Events};

/// Options of `pageferry migrate` that say what the watcher would say.
const ID: &str = "--id";
const EVENTS: &str = "--events";
const RESUME: &str = "--resume";

/// See the module's text.
#[derive(Debug)]
pub(super) struct Log {
    /// The file, as another program finds it.
    path: Option<PathBuf>,
}

impl Log {
    /// To the user's file. Fails if it cannot be opened.
    pub(super) fn open(path: Option<&Path>) -> Result<Log> {
        let log = Log {
            path: path
                .map(std::path::absolute)
                .transpose()
                .map_err(|error| Error::file("find", path.unwrap_or(Path::new("")), error))?,
        };
        log.events(None)?;
        Ok(log)
    }

    fn events(&self, migration: Option<MigrationId>) -> Result<Events> {
        Events::new(Writer::Watch, migration).with_file(self.path.as_deref())
    }

    /// The action as it is carried out: a migration gets a name and the log, if it has none.
    pub(super) fn named(&self, action: &Action) -> (Action, Option<MigrationId>) {
        let Action::Migrate { args } = action else {
            return (action.clone(), None);
        };
        let mut args = args.clone();
        let is_resumed = value_of(&args, RESUME);
        let id = match (is_resumed, value_of(&args, ID)) {
            (Some(id), _) | (None, Some(id)) => id.parse().ok(),
            (None, None) => {
                let id = crate::source::made_up().ok();
                if let Some(id) = &id {
                    args.extend([ID.to_owned(), id.to_string()]);
                }
                id
            }
        };
        let has_file = value_of(&args, EVENTS).is_some() || is_resumed_by(&args);
        if let Some(path) = self.path.as_ref().filter(|_| !has_file) {
            args.extend([EVENTS.to_owned(), path.display().to_string()]);
        }
        (Action::Migrate { args }, id)
    }

    /// A rule has fired, and its action begins.
    pub(super) fn fired(
        &self,
        rule: &str,
        text: &str,
        migration: Option<MigrationId>,
    ) -> Option<Events> {
        match self.events(migration) {
            Ok(events) => {
                events.note(Step::Rule, Details::text(format!("rule {rule:?}: {text}")));
                events.begin(Step::Rule);
                Some(events)
            }
            Err(error) => {
                tracing::warn!("{error}: an event is lost");
                None
            }
        }
    }
}

fn is_resumed_by(args: &[String]) -> bool {
    value_of(args, RESUME).is_some()
}

/// The value of an option: `--id x` or `--id=x`.
fn value_of<'a>(args: &'a [String], option: &str) -> Option<&'a str> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.strip_prefix(option) {
            Some("") => return args.next().map(String::as_str),
            Some(rest) if rest.starts_with('=') => return Some(&rest[1..]),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migrate(args: &[&str]) -> Action {
        Action::Migrate {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        }
    }

    fn args_of(action: Action) -> Vec<String> {
        match action {
            Action::Migrate { args } => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_migration_gets_a_name_and_the_log_unless_it_has_them() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("events.jsonl");
        let log = Log::open(Some(&path)).unwrap();
        let (action, id) = log.named(&migrate(&["--pid", "7"]));
        let args = args_of(action);
        assert_eq!(
            value_of(&args, "--id"),
            id.map(|id| id.to_string()).as_deref()
        );
        assert_eq!(value_of(&args, "--events"), path.to_str());
        let own = ["--id=m-7", "--events", "/mine"];
        let (action, id) = log.named(&migrate(&own));
        assert_eq!(
            (args_of(action), id.unwrap().to_string()),
            (own.map(str::to_owned).to_vec(), "m-7".to_owned())
        );
        let resumed = ["--resume", "m-8"];
        let (action, id) = log.named(&migrate(&resumed));
        assert_eq!(
            (args_of(action).len(), id.unwrap().to_string()),
            (2, "m-8".to_owned())
        );
        let silent = Log::open(None).unwrap();
        assert_eq!(args_of(silent.named(&migrate(&[])).0).len(), 2);
    }
}
