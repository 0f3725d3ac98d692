//! What is kept over a restart: which rules have fired, and which actions are under way.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use pageferry::error::{Error, Kind, Result};
use pageferry::observe::schema::Output;
use pageferry::sys::owned_process::ProcessName;
use pageferry::watch::SavedState;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Default, Serialize, Deserialize, Debug, JsonSchema)]
struct Contents {
    /// State of each rule, by its name.
    rules: BTreeMap<String, SavedState>,
    /// Actions that run, by their target.
    running: BTreeMap<String, Running>,
}

/// An action that runs.
#[derive(Clone, Serialize, Deserialize, Debug, JsonSchema)]
pub(super) struct Running {
    /// The rule that started it.
    pub(super) rule: String,
    /// The process that carries it out, if it is one.
    pub(super) process: Option<ProcessName>,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Contents>("watch-state", "pageferry watch --state FILE")
}

/// The file.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    contents: Contents,
    /// Nothing is written.
    is_dry: bool,
    _lock: Option<Flock<File>>,
}

impl State {
    /// Reads it, if it is there. No other watcher uses it meanwhile.
    pub(super) fn open(path: &Path, is_dry: bool) -> Result<State> {
        let lock = match is_dry {
            true => None,
            false => Some(lock(path)?),
        };
        let contents = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let text = format!(
                    "{} is damaged (remove it to forget what has fired)",
                    path.display()
                );
                Error::wrap(Kind::Usage, text, error)
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Contents::default(),
            Err(error) => return Err(Error::file("read", path, error)),
        };
        Ok(State {
            path: path.to_owned(),
            contents,
            is_dry,
            _lock: lock,
        })
    }

    /// What is known of a rule.
    pub(super) fn saved(&self, rule: &str) -> SavedState {
        self.contents.rules.get(rule).copied().unwrap_or_default()
    }

    /// Actions that are under way.
    pub(super) fn running(&self) -> &BTreeMap<String, Running> {
        &self.contents.running
    }

    /// Writes down what is known of a rule, unless it is there.
    pub(super) fn keep(&mut self, rule: &str, saved: SavedState) -> Result<()> {
        if self.saved(rule) == saved {
            return Ok(());
        }
        self.contents.rules.insert(rule.to_owned(), saved);
        self.write()
    }

    /// An action begins: its rule has fired.
    pub(super) fn begin(
        &mut self,
        target: &str,
        saved: SavedState,
        running: Running,
    ) -> Result<()> {
        self.contents.rules.insert(running.rule.clone(), saved);
        self.contents.running.insert(target.to_owned(), running);
        self.write()
    }

    /// The action on a target is over.
    pub(super) fn end(&mut self, target: &str) -> Result<()> {
        match self.contents.running.remove(target) {
            Some(_) => self.write(),
            None => Ok(()),
        }
    }

    /// Whole or as before.
    fn write(&self) -> Result<()> {
        if self.is_dry {
            return Ok(());
        }
        let failed = |error| Error::file("write", &self.path, error);
        let bytes = serde_json::to_vec_pretty(&self.contents);
        let bytes = bytes.map_err(|error| Error::wrap(Kind::Io, "the state", error))?;
        let unfinished = self.path.with_extension("new");
        let mut file = File::create(&unfinished).map_err(failed)?;
        file.write_all(&bytes).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&unfinished, &self.path).map_err(failed)
    }
}

fn lock(path: &Path) -> Result<Flock<File>> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).map_err(|error| Error::file("make", dir, error))?;
    }
    let name = path.with_extension("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name);
    let file = file.map_err(|error| Error::file("open", &name, error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        let text = format!("{} is locked: another watcher uses it", name.display());
        Error::wrap(Kind::Usage, text, errno)
    })
}
