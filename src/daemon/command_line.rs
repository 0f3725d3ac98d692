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
//! this program does not is skipped with a warning; what neither knows is an error.

mod error;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{ArgAction, Parser};

use super::criu_options::{LONG, SHORT, Value};
use super::log::VERBOSITY_DEFAULT;
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

/// A parsed command line.
#[derive(Debug)]
pub struct Parsed<A> {
    /// The program's own arguments.
    pub args: A,
    /// Options of CRIU's that mean nothing here, for a warning.
    pub skipped: Vec<String>,
}

/// Reads `argv` (the program's name first) for a program with the given `actions`.
pub fn parse<A: Parser>(
    actions: &[Action],
    argv: impl IntoIterator<Item = OsString>,
) -> Result<Parsed<A>, CommandLineError> {
    let command = A::command();
    let mut words = argv.into_iter();
    let mut reader = Reader {
        own: own_options(&command),
        gathered: gathered_options(&command),
        actions,
        tidy: vec![words.next().unwrap_or_default()],
        skipped: BTreeSet::new(),
        verbosity: None,
        action: None,
    };
    reader.read(&mut words)?;
    if let Some(verbosity) = reader.verbosity {
        reader.tidy.push(format!("--verbosity={verbosity}").into());
    }
    let args = A::try_parse_from(reader.tidy)?;
    let skipped = reader.skipped.into_iter().collect();
    Ok(Parsed { args, skipped })
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
    skipped: BTreeSet<String>,
    verbosity: Option<u32>,
    action: Option<String>,
}

impl Reader<'_> {
    fn read(&mut self, words: &mut dyn Iterator<Item = OsString>) -> Result<(), CommandLineError> {
        let mut only_words = false;
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            if only_words || bytes == b"-" || !bytes.starts_with(b"-") {
                self.word(&word, words)?;
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
        if negated {
            if attached.is_some() {
                return Err(CommandLineError::ValueTooMuch(format!("--no-{name}")));
            }
            let switch = OsString::from(format!("--{name}"));
            self.tidy.retain(|word| *word != switch);
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
        let candidates: BTreeSet<&str> = known
            .iter()
            .map(|(name, _)| *name)
            .filter(|name| !given.is_empty() && name.starts_with(given))
            .collect();
        let mut names = candidates.iter();
        match (names.next(), names.next()) {
            (None, _) => Err(CommandLineError::Unknown(format!("--{given}"))),
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
            let name = SHORT
                .iter()
                .find(|(short, _)| *short == letter)
                .map(|(_, name)| *name)
                .ok_or_else(|| CommandLineError::Unknown(format!("-{letter}")))?;
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
            self.push(name, argument.as_deref());
        } else {
            self.skipped.insert(shown);
        }
        Ok(())
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
    }

    /// `-v` is one more than the level so far, `-vvv` three more, `-v3` is three.
    fn raise_verbosity(&mut self, attached: Option<&OsStr>) -> Result<(), CommandLineError> {
        let now = self.verbosity.unwrap_or(VERBOSITY_DEFAULT);
        let text = attached.map(OsStr::to_string_lossy).unwrap_or_default();
        let level = if text.bytes().all(|byte| byte == b'v') {
            let more = u32::try_from(text.len()).unwrap_or(u32::MAX);
            now.saturating_add(1).saturating_add(more)
        } else {
            text.parse()
                .map_err(|_| CommandLineError::Verbosity(text.into_owned()))?
        };
        self.verbosity = Some(level);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::daemon::CommonArgs;

    #[derive(Parser, Debug)]
    struct Args {
        #[command(flatten)]
        common: CommonArgs,
        #[arg(long)]
        keep: bool,
        #[arg(long)]
        swrk: Option<i32>,
        #[arg(long)]
        allow: Vec<String>,
    }

    const ACTIONS: &[Action] = &[
        Action {
            word: "page-server",
            operand_option: None,
        },
        Action {
            word: "swrk",
            operand_option: Some("swrk"),
        },
    ];

    fn read(line: &str) -> Result<Parsed<Args>, CommandLineError> {
        let words = line.split_whitespace().map(OsString::from);
        parse(ACTIONS, std::iter::once("x".into()).chain(words))
    }

    #[test]
    fn the_action_may_stand_anywhere_but_only_once() {
        for line in [
            "page-server -D img -o log",
            "-D img page-server -o log",
            "-D img -o log page-server",
            "-D img -o log",
            "-o log -D img -- page-server",
        ] {
            let args = read(line).unwrap().args;
            assert_eq!(args.common.images_dir, PathBuf::from("img"), "{line}");
            assert_eq!(args.common.log_file, Some(PathBuf::from("log")), "{line}");
        }
        assert!(matches!(
            read("page-server page-server"),
            Err(CommandLineError::Word(_))
        ));
        assert_eq!(read("swrk 3").unwrap().args.swrk, Some(3));
        assert!(matches!(
            read("swrk"),
            Err(CommandLineError::ValueMissing(_))
        ));
        let mixed_up = read("lazy-pages -D img").unwrap_err().to_string();
        assert!(mixed_up.contains("lazy-client"), "{mixed_up}");
    }

    #[test]
    fn letters_join_and_values_attach() {
        let common = read("-dvv -Dimg -Wwork --port=7 --address ::1 -olog")
            .unwrap()
            .args
            .common;
        assert!(common.daemon);
        assert_eq!(common.verbosity, 4);
        assert_eq!(common.images_dir, PathBuf::from("img"));
        assert_eq!(common.work_dir, Some(PathBuf::from("work")));
        assert_eq!(
            (common.port, common.address.as_deref()),
            (Some(7), Some("::1"))
        );
        assert!(read("--restore-detached").unwrap().args.common.daemon);
        assert!(!read("-d --no-daemon").unwrap().args.common.daemon);
        let last = read("-D a --allow x -D b --allow y -d -d").unwrap().args;
        assert_eq!(last.common.images_dir, PathBuf::from("b"));
        assert_eq!(last.allow, ["x", "y"]);
    }

    #[test]
    fn verbosity_is_spelled_as_for_criu() {
        for (line, level) in [
            ("", 2),
            ("-v", 3),
            ("-vv", 4),
            ("-v -v", 4),
            ("-vvvv", 6),
            ("-v4", 4),
            ("-v0", 0),
            ("--verbosity", 3),
            ("--verbosity=1", 1),
        ] {
            assert_eq!(read(line).unwrap().args.common.verbosity, level, "{line}");
        }
        // In CRIU too the 4 of "-v 4" is a word of its own, and one too many.
        assert!(matches!(
            read("page-server -v 4"),
            Err(CommandLineError::Word(_))
        ));
        assert!(matches!(read("-vx"), Err(CommandLineError::Verbosity(_))));
    }

    #[test]
    fn options_of_criu_are_skipped_with_their_values() {
        let parsed = read(
            "--ghost-limit 1M -t 77 -j --keep --manage-cgroups --no-default-config --config x \
             --manage-cgroups=soft --ext -D img --no-track-mem",
        );
        assert!(matches!(parsed, Err(CommandLineError::Ambiguous { .. })));
        let parsed = read(
            "--ghost-limit 1M -t 77 -j --keep --manage-cgroups --no-default-config --config x \
             --manage-cgroups=soft --externa veth -D img --no-track-mem",
        )
        .unwrap();
        assert!(parsed.args.keep);
        assert_eq!(parsed.args.common.images_dir, PathBuf::from("img"));
        let skipped = parsed.skipped.join(" ");
        assert_eq!(
            skipped,
            "--config --external --ghost-limit --manage-cgroups --no-default-config --shell-job --tree"
        );
    }

    #[test]
    fn what_neither_knows_is_an_error() {
        for line in ["--bogus", "-Z", "--no-bogus", "--no-port", "--=x"] {
            assert!(
                matches!(read(line), Err(CommandLineError::Unknown(_))),
                "{line}"
            );
        }
        assert!(matches!(
            read("--daemon=yes"),
            Err(CommandLineError::ValueTooMuch(_))
        ));
        assert!(matches!(
            read("--port"),
            Err(CommandLineError::ValueMissing(_))
        ));
        assert!(matches!(
            read("--port many"),
            Err(CommandLineError::Parser(_))
        ));
    }
}
