//! Reads a criu command line as it is, and hands our own argument parser a tidy one.
//!
//! ```text
//! -dvv -Dimg page-server --port 7 --ghost-limit 1M
//!   -> --daemon --images-dir=img --port=7 --verbosity=4      and "--ghost-limit" was skipped
//! ```
//!
//! Rules of getopt_long that CRIU users rely on: letters may be joined (`-dvv`; a letter with a value
//! takes the rest of the row), values follow or are attached, long names may be shortened while they
//! are unique, words may stand between options, and `--no-NAME` turns a switch off. What CRIU knows and
//! this program does not is skipped with a warning; what neither knows is an error. Configuration files
//! and requests are read as further command lines, before and after this one ([`super::settings`]).

mod error;

mod files;
pub mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{ArgAction, Parser};

use super::criu_options::{LONG, SHORT, Value};
use super::log::VERBOSITY_DEFAULT;
use super::settings::{
    ConfigFile, Environment, Named, RequestedSettings, config_files, leading_number,
};
pub use error::CommandLineError;

/// A word among the options that says what the program is to do.
#[derive(Clone, Copy, Debug)]
pub struct Action {
    /// The word, e.g. `page-server`.
    pub word: &'static str,
    /// A long option that takes the word behind it as its value, if it has one (`swrk FD`).
    pub operand_option: Option<&'static str>,
}

/// CRIU's actions and the program that does each, for those who mix them up.
const ACTIONS_ELSEWHERE: &[(&str, &str)] = &[
    ("page-server", "page-server"),
    ("lazy-pages", "lazy-client"),
    ("dump", "criu"),
    ("pre-dump", "criu"),
    ("restore", "criu"),
    ("check", "criu"),
    ("service", "criu"),
    ("swrk", "page-server or criu"),
    ("dedup", "criu"),
    ("cpuinfo", "criu"),
];

/// Options with numbers: in a configuration file CRIU takes what a value begins with for the number.
const NUMBERS: &[&str] = &["port", "ps-socket", "status-fd"];

/// Options about configuration files: they have been obeyed before the command line is read.
const READ_BEFORE: &[&str] = &["config", "no-default-config"];

/// A parsed command line.
#[derive(Debug)]
pub struct Parsed<A> {
    /// The program's own arguments.
    pub args: A,
    /// What is to be said of them.
    pub diagnostics: Diagnostics,
}

/// What is to be said of a command line once there is a log.
#[derive(Default, Debug)]
pub struct Diagnostics {
    /// Options of CRIU's on the command line that mean nothing here.
    pub skipped: BTreeSet<String>,
    /// What a configuration file says that may be a mistake.
    pub warnings: Vec<String>,
    /// Which configuration files were read, and what in them counts.
    pub notes: Vec<String>,
}

/// Reads `argv` (the program's name first) for a program with the given `actions`, and the configuration
/// files that CRIU would read.
///
/// # Errors
///
/// The command line or a file cannot be understood, or asks for help.
pub fn parse<A: Parser>(
    actions: &[Action],
    argv: impl IntoIterator<Item = OsString>,
) -> Result<Parsed<A>, CommandLineError> {
    let environment = Environment::of_process();
    parse_with(actions, argv, &environment, &RequestedSettings::default())
}

/// The same with the configuration files that `environment` leads to, and with what a request asks for.
///
/// # Errors
///
/// As those of [`parse`].
pub fn parse_with<A: Parser>(
    actions: &[Action],
    argv: impl IntoIterator<Item = OsString>,
    environment: &Environment,
    request: &RequestedSettings,
) -> Result<Parsed<A>, CommandLineError> {
    let command = A::command();
    let mut argv = argv.into_iter();
    let mut reader = Reader {
        own: own_options(&command),
        gathered: gathered_options(&command),
        actions,
        tidy: vec![argv.next().unwrap_or_default()],
        verbosity: None,
        action: None,
        place: None,
        places: BTreeMap::new(),
        diagnostics: Diagnostics::default(),
    };
    let argv: Vec<OsString> = argv.collect();
    for file in config_files(environment, &argv) {
        reader.file(&file)?;
    }
    reader.read(&mut argv.into_iter())?;
    for option in &request.replaced {
        reader.forget(option);
    }
    reader.read(&mut request.words.iter().cloned())?;
    if let Some(path) = request.config_file.clone() {
        reader.file(&ConfigFile {
            path,
            named: Named::InRequest,
        })?;
    }
    reader.give_way(&command);
    reader.finish()
}

/// How much alike two names are that may be one, mistyped: between 0 and 1 (Jaro-Winkler).
const MISTYPED: f64 = 0.85;

/// The option of `known` that is spelled most like `given`, if one may have been meant.
fn similar<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let scored = known.map(|name| (strsim::jaro_winkler(given, name), name));
    let best = scored.max_by(|one, other| one.0.total_cmp(&other.0));
    let (_, name) = best.filter(|(score, _)| *score >= MISTYPED)?;
    Some(format!("--{name}"))
}

/// Names and aliases of the program's long options.
fn own_options(command: &clap::Command) -> Vec<(String, Value)> {
    let mut own = vec![
        ("help".to_owned(), Value::Switch),
        ("version".to_owned(), Value::Switch),
    ];
    for argument in command.get_arguments() {
        let value = if argument.get_action().takes_values() {
            Value::Needed
        } else {
            Value::Switch
        };
        let aliases = argument.get_all_aliases().unwrap_or_default();
        let names = argument.get_long().into_iter().chain(aliases);
        own.extend(names.map(|name| (name.to_owned(), value)));
    }
    own
}

/// Names of the program's options whose values add up when they are given several times.
fn gathered_options(command: &clap::Command) -> BTreeSet<String> {
    command
        .get_arguments()
        .filter(|argument| matches!(argument.get_action(), ArgAction::Append))
        .filter_map(|argument| argument.get_long().map(str::to_owned))
        .collect()
}

struct Reader<'a> {
    own: Vec<(String, Value)>,
    gathered: BTreeSet<String>,
    actions: &'a [Action],
    tidy: Vec<OsString>,
    verbosity: Option<u32>,
    action: Option<String>,
    /// The configuration file and line that is being read.
    place: Option<String>,
    /// Options whose values come from configuration files, with their places.
    places: BTreeMap<String, String>,
    diagnostics: Diagnostics,
}

impl Reader<'_> {
    fn read(&mut self, words: &mut dyn Iterator<Item = OsString>) -> Result<(), CommandLineError> {
        let mut only_words = false;
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            if only_words || bytes == b"-" || !bytes.starts_with(b"-") {
                match &self.place {
                    Some(place) => self.ignore_word(&place.clone(), &word),
                    None => self.word(&word, words)?,
                }
            } else if bytes == b"--" && self.place.is_some() {
                return Err(CommandLineError::EndInFile);
            } else if bytes == b"--" {
                only_words = true;
            } else if let Some(long) = bytes.strip_prefix(b"--") {
                self.long(long, words)?;
            } else {
                self.short(&bytes[1..], words)?;
            }
        }
        Ok(())
    }

    fn word(
        &mut self,
        word: &OsStr,
        words: &mut dyn Iterator<Item = OsString>,
    ) -> Result<(), CommandLineError> {
        let text = word.to_string_lossy().into_owned();
        if self.action.is_some() {
            return Err(CommandLineError::Word(text));
        }
        let Some(action) = self.actions.iter().find(|action| action.word == text) else {
            let elsewhere = ACTIONS_ELSEWHERE.iter().find(|(other, _)| *other == text);
            return Err(match elsewhere {
                Some((_, program)) => CommandLineError::OtherProgram {
                    word: text,
                    program,
                },
                None => CommandLineError::Word(text),
            });
        };
        if let Some(option) = action.operand_option {
            let operand = words
                .next()
                .ok_or_else(|| CommandLineError::ValueMissing(text.clone()))?;
            self.push(option, Some(&operand));
        }
        self.action = Some(text);
        Ok(())
    }

    fn long(
        &mut self,
        given: &[u8],
        words: &mut dyn Iterator<Item = OsString>,
    ) -> Result<(), CommandLineError> {
        let equals = given.iter().position(|byte| *byte == b'=');
        let (name, attached) = match equals {
            Some(at) => (
                &given[..at],
                Some(OsString::from_vec(given[at + 1..].to_vec())),
            ),
            None => (given, None),
        };
        let given = String::from_utf8_lossy(name);
        let (name, value, negated) = self.resolve(&given)?;
        // One switch under two names: either turns off what the other turned on.
        let name = if name == "restore-detached" {
            "daemon".to_owned()
        } else {
            name
        };
        if negated {
            if attached.is_some() {
                return Err(CommandLineError::ValueTooMuch(format!("--no-{name}")));
            }
            self.forget(&name);
            return Ok(());
        }
        self.option(&name, value, attached, words)
    }

    /// The full name that `given` stands for, and whether `no-` turned it off.
    fn resolve(&self, given: &str) -> Result<(String, Value, bool), CommandLineError> {
        let criu = LONG.iter().map(|(name, value)| (*name, *value));
        let own = self.own.iter().map(|(name, value)| (name.as_str(), *value));
        let known: Vec<(&str, Value)> = own.chain(criu).collect();
        let exact = |wanted: &str| known.iter().find(|(name, _)| *name == wanted).copied();
        if let Some((name, value)) = exact(given) {
            return Ok((name.to_owned(), value, false));
        }
        if let Some((name, Value::Switch)) = given.strip_prefix("no-").and_then(exact) {
            return Ok((name.to_owned(), Value::Switch, true));
        }
        // A configuration file is CRIU's as well, for whom a name is short enough if it is CRIU's only one.
        let of_criu = |name: &&str| LONG.iter().any(|(criu, _)| criu == name);
        let starts = |name: &&str| !given.is_empty() && name.starts_with(given);
        let names = known.iter().map(|(name, _)| *name).filter(starts);
        let mut candidates: BTreeSet<&str> = names.collect();
        if self.place.is_some() && candidates.iter().any(of_criu) {
            candidates.retain(of_criu);
        }
        let mut names = candidates.iter();
        match (names.next(), names.next()) {
            (None, _) => Err(CommandLineError::Unknown {
                given: format!("--{given}"),
                similar: similar(given, known.iter().map(|(name, _)| *name)),
            }),
            (Some(name), None) => {
                let value = exact(name).map_or(Value::Switch, |(_, value)| value);
                Ok(((*name).to_owned(), value, false))
            }
            (Some(_), Some(_)) => Err(CommandLineError::Ambiguous {
                given: format!("--{given}"),
                candidates: candidates.into_iter().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// A row of letters; the first that takes a value takes the rest of the row.
    fn short(
        &mut self,
        row: &[u8],
        words: &mut dyn Iterator<Item = OsString>,
    ) -> Result<(), CommandLineError> {
        for (at, letter) in row.iter().enumerate() {
            let letter = char::from(*letter);
            if letter == 'h' {
                // Shorter than --help.
                self.tidy.push("-h".into());
                continue;
            }
            let name = SHORT
                .iter()
                .find(|(short, _)| *short == letter)
                .map(|(_, name)| *name)
                .ok_or_else(|| CommandLineError::Unknown {
                    given: format!("-{letter}"),
                    similar: None,
                })?;
            let (_, value, _) = self.resolve(name)?;
            // CRIU's own way to take a value wins: -v4, but never -v 4.
            let value = if name == "verbosity" {
                Value::Optional
            } else {
                value
            };
            let rest = &row[at + 1..];
            if value == Value::Switch {
                self.option(name, value, None, words)?;
            } else {
                let attached = (!rest.is_empty()).then(|| OsString::from_vec(rest.to_vec()));
                return self.option(name, value, attached, words);
            }
        }
        Ok(())
    }

    fn option(
        &mut self,
        name: &str,
        value: Value,
        attached: Option<OsString>,
        words: &mut dyn Iterator<Item = OsString>,
    ) -> Result<(), CommandLineError> {
        if name == "verbosity" {
            return self.raise_verbosity(attached.as_deref());
        }
        let shown = format!("--{name}");
        let argument = match (value, attached) {
            (Value::Switch, Some(_)) => return Err(CommandLineError::ValueTooMuch(shown)),
            (Value::Needed, None) => Some(
                words
                    .next()
                    .ok_or_else(|| CommandLineError::ValueMissing(shown.clone()))?,
            ),
            (_, attached) => attached,
        };
        if self.own.iter().any(|(own, _)| own == name) {
            let in_file = self.place.is_some();
            let number = argument
                .as_deref()
                .filter(|_| in_file && NUMBERS.contains(&name))
                .map(leading_number);
            if name == "port" && number.as_deref() == Some("0") {
                return Err(CommandLineError::PortInFile);
            }
            let number = number.map(OsString::from);
            self.push(name, number.as_deref().or(argument.as_deref()));
        } else if self.place.is_none() && !READ_BEFORE.contains(&name) {
            self.diagnostics.skipped.insert(shown);
        }
        Ok(())
    }

    /// The option as if it had not been given.
    fn forget(&mut self, name: &str) {
        let (switch, head) = (format!("--{name}"), format!("--{name}="));
        self.tidy.retain(|word| {
            word.as_bytes() != switch.as_bytes() && !word.as_bytes().starts_with(head.as_bytes())
        });
        self.places.remove(name);
    }

    fn push(&mut self, name: &str, argument: Option<&OsStr>) {
        let mut word = OsString::from(format!("--{name}"));
        if let Some(argument) = argument {
            word.push("=");
            word.push(argument);
        }
        if !self.gathered.contains(name) {
            // A repeated switch means what it means once; of repeated values the last one counts.
            let head = format!("--{name}=");
            self.tidy.retain(|before| {
                *before != word && !before.as_bytes().starts_with(head.as_bytes())
            });
        }
        self.tidy.push(word);
        match &self.place {
            Some(place) => self.places.insert(name.to_owned(), place.clone()),
            None => self.places.remove(name),
        };
    }

    /// `-v` is one more than the level so far, `-vvv` three more, `-v3` is three.
    fn raise_verbosity(&mut self, attached: Option<&OsStr>) -> Result<(), CommandLineError> {
        let now = self.verbosity.unwrap_or(VERBOSITY_DEFAULT);
        let text = attached.map(OsStr::to_string_lossy).unwrap_or_default();
        let level = if text.bytes().all(|byte| byte == b'v') {
            let more = u32::try_from(text.len()).unwrap_or(u32::MAX);
            now.saturating_add(1).saturating_add(more)
        } else if self.place.is_some() {
            leading_number(OsStr::new(&*text)).parse().unwrap_or(0)
        } else {
            text.parse()
                .map_err(|_| CommandLineError::Verbosity(text.into_owned()))?
        };
        self.verbosity = Some(level);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
