//! Configuration files as command lines: what they may say, and what of it counts.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use super::{CommandLineError, Parsed, Reader};
use crate::daemon::config_file::Line;
use crate::daemon::settings::{ConfigFile, Named, read};

impl Reader<'_> {
    /// Reads a configuration file.
    pub(super) fn file(&mut self, file: &ConfigFile) -> Result<(), CommandLineError> {
        let shown = file.path.display();
        let lines = read(&file.path).map_err(|error| in_place(&shown.to_string(), error))?;
        let Some(lines) = lines else {
            self.missing(file);
            return Ok(());
        };
        for line in &lines {
            let place = format!("{shown}, line {}", line.number);
            self.place = Some(place.clone());
            let read = self.line(&place, line);
            self.place = None;
            read.map_err(|error| in_place(&place, error))?;
        }
        let options = lines
            .iter()
            .map(|line| line.option.to_string_lossy().into_owned());
        let options = options.collect::<Vec<_>>().join(" ");
        self.diagnostics
            .notes
            .push(format!("configuration file {shown} says: {options}"));
        Ok(())
    }

    /// As for CRIU that is no mistake; but a user who named the file will want to know.
    fn missing(&mut self, file: &ConfigFile) {
        if let Named::By(who) = file.named {
            self.diagnostics.warnings.push(format!(
                "there is no configuration file {} ({who}): nothing is read from it, as by CRIU",
                file.path.display()
            ));
        }
    }

    fn line(&mut self, place: &str, line: &Line) -> Result<(), CommandLineError> {
        if let (Some(written), Some(obeyed)) = (&line.oddity, &line.value) {
            let (written, obeyed) = (written.to_string_lossy(), obeyed.to_string_lossy());
            if is_about_security(&line.option) {
                return Err(CommandLineError::Doubtful {
                    obeyed: obeyed.into_owned(),
                    written: written.into_owned(),
                });
            }
            self.diagnostics.warnings.push(format!(
                "{place}: {obeyed:?} is taken for the value {written:?}, as by CRIU"
            ));
        }
        self.read(&mut line.words())
    }

    /// CRIU skips words that belong to no option.
    pub(super) fn ignore_word(&mut self, place: &str, word: &OsStr) {
        if !word.is_empty() {
            self.diagnostics.warnings.push(format!(
                "{place}: the option takes no value: {word:?} is ignored, as by CRIU"
            ));
        }
    }

    /// Takes out what configuration files say and what cannot stand beside what the command line or a
    /// request says: the files are there for every use of CRIU.
    pub(super) fn give_way(&mut self, command: &clap::Command) {
        let long = |name: &str| {
            let mut all = command.get_arguments();
            all.find(|argument| argument.get_long() == Some(name))
        };
        let given: Vec<String> = self
            .tidy
            .iter()
            .skip(1)
            .filter_map(|word| name_of(word))
            .collect();
        let explicit: Vec<&clap::Arg> = given
            .iter()
            .filter(|name| !self.places.contains_key(*name))
            .filter_map(|name| long(name))
            .collect();
        for (name, place) in self.places.clone() {
            let Some(argument) = long(&name) else {
                continue;
            };
            let mine = command.get_arg_conflicts_with(argument);
            let rival = explicit.iter().find(|other| {
                let theirs = command.get_arg_conflicts_with(other);
                mine.iter().any(|mine| mine.get_id() == other.get_id())
                    || theirs
                        .iter()
                        .any(|theirs| theirs.get_id() == argument.get_id())
            });
            if let Some(rival) = rival.and_then(|rival| rival.get_long()) {
                self.forget(&name);
                self.diagnostics.warnings.push(format!(
                    "{place}: --{name} does not count beside the --{rival} of this program"
                ));
            }
        }
    }

    /// Hands the tidy command line to the program's own parser.
    pub(super) fn finish<A: Parser>(mut self) -> Result<Parsed<A>, CommandLineError> {
        if let Some(verbosity) = self.verbosity {
            self.tidy.push(format!("--verbosity={verbosity}").into());
        }
        match A::try_parse_from(self.tidy) {
            Ok(args) => Ok(Parsed {
                args,
                diagnostics: self.diagnostics,
            }),
            Err(error) => Err(match place_of(&error, &self.places) {
                Some(place) => in_place(&place, CommandLineError::Parser(error)),
                None => error.into(),
            }),
        }
    }
}

/// Options whose values decide who is trusted.
fn is_about_security(option: &OsStr) -> bool {
    let name = option.as_bytes();
    name.starts_with(b"--tl") || name.starts_with(b"--no-tl")
}

fn in_place(
    place: &str,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> CommandLineError {
    CommandLineError::File {
        place: place.to_owned(),
        error: error.into(),
    }
}

/// The long name in a word of the tidy command line.
fn name_of(word: &OsStr) -> Option<String> {
    let word = word.to_str()?.strip_prefix("--")?;
    Some(word.split('=').next().unwrap_or(word).to_owned())
}

/// Where the option stands that our parser complains of, if that is in a configuration file.
fn place_of(error: &clap::Error, places: &BTreeMap<String, String>) -> Option<String> {
    let ContextValue::String(argument) = error.get(ContextKind::InvalidArg)? else {
        return None;
    };
    let name = argument.split_whitespace().next()?.strip_prefix("--")?;
    places.get(name.split('=').next()?).cloned()
}
