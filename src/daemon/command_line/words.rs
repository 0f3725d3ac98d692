//! A criu command line in parts, for a program that stands before CRIU and changes some of them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::daemon::criu_options::{LONG, SHORT, Value};

/// A part of a command line: an option with its value, a word, or what stands behind `--`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The option's long name, if this is an option that CRIU has.
    pub option: Option<&'static str>,
    /// Its value.
    pub value: Option<OsString>,
    /// The words as they were given.
    pub words: Vec<OsString>,
}

impl Part {
    /// Whether it is an action or its operand.
    pub fn is_word(&self) -> bool {
        let dashed = |word: &OsString| word.as_bytes().starts_with(b"-") && word != "-";
        self.option.is_none() && !self.words.iter().any(dashed)
    }
}

/// Takes `argv` (without the program's name) apart. What CRIU does not know stays a part of its own.
pub fn parts(argv: &[OsString]) -> Vec<Part> {
    let mut words = argv.iter().cloned();
    let mut parts = Vec::new();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            // Not CRIU's any more: the command of --exec-cmd.
            let rest = std::iter::once(word).chain(words.by_ref()).collect();
            parts.push(Part {
                option: None,
                value: None,
                words: rest,
            });
        } else if let Some(name) = bytes.strip_prefix(b"--") {
            parts.push(long(&word, name, &mut words));
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            parts.extend(row(&word, &mut words));
        } else {
            parts.push(Part {
                option: None,
                value: None,
                words: vec![word],
            });
        }
    }
    parts
}

/// The first word, which says what is to be done.
pub fn action(parts: &[Part]) -> Option<&OsStr> {
    let word = parts.iter().find(|part| part.is_word())?;
    word.words.first().map(OsString::as_os_str)
}

fn long(word: &OsString, name: &[u8], words: &mut dyn Iterator<Item = OsString>) -> Part {
    let equals = name.iter().position(|byte| *byte == b'=');
    let attached = equals.map(|at| OsString::from_vec(name[at + 1..].to_vec()));
    let name = String::from_utf8_lossy(&name[..equals.unwrap_or(name.len())]);
    let mut part = Part {
        option: None,
        value: attached,
        words: vec![word.clone()],
    };
    let exact = LONG.iter().find(|(long, _)| *long == name);
    let mut longer = LONG
        .iter()
        .filter(|(long, _)| !name.is_empty() && long.starts_with(&*name));
    let known = exact.or_else(|| longer.next().filter(|_| longer.next().is_none()));
    if let Some((long, value)) = known {
        part.option = Some(long);
        take_value(&mut part, *value, words);
    }
    part
}

/// A row of letters, each an option of its own but for what follows one with a value.
fn row(word: &OsString, words: &mut dyn Iterator<Item = OsString>) -> Vec<Part> {
    let letters = &word.as_bytes()[1..];
    let mut parts = Vec::new();
    for (at, letter) in letters.iter().enumerate() {
        let long = SHORT
            .iter()
            .find(|(short, _)| *short == char::from(*letter));
        let known = long.and_then(|(_, name)| LONG.iter().find(|(long, _)| long == name));
        let value = known.map_or(Value::Switch, |(_, value)| *value);
        let rest = match value {
            Value::Switch => &[][..],
            Value::Needed | Value::Optional => &letters[at + 1..],
        };
        let mut part = Part {
            option: known.map(|(name, _)| *name),
            value: (!rest.is_empty()).then(|| OsString::from_vec(rest.to_vec())),
            words: vec![OsString::from_vec([b"-", &letters[at..=at], rest].concat())],
        };
        take_value(&mut part, value, words);
        parts.push(part);
        if value != Value::Switch {
            break;
        }
    }
    parts
}

fn take_value(part: &mut Part, value: Value, words: &mut dyn Iterator<Item = OsString>) {
    if value == Value::Needed && part.value.is_none() {
        part.value = words.next();
        part.words.extend(part.value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> Vec<Part> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        parts(&words)
    }

    #[test]
    fn every_word_is_in_a_part() {
        for line in [
            "dump -t 7 -D img -v4",
            "-dv page-server --port=7",
            "restore -- ls -la",
            "--new x swrk 3",
        ] {
            let words: Vec<OsString> = split(line)
                .into_iter()
                .flat_map(|part| part.words)
                .collect();
            let joined = words.join(OsStr::new(" "));
            assert_eq!(joined, line.replace("-dv", "-d -v").as_str());
        }
    }

    #[test]
    fn options_have_their_long_names() {
        let options = |line: &str| {
            let shown = |part: Part| {
                (
                    part.option,
                    part.value.map(|value| value.into_string().unwrap()),
                )
            };
            split(line).into_iter().map(shown).collect::<Vec<_>>()
        };
        let images = (Some("images-dir"), Some("img".to_owned()));
        for line in [
            "-Dimg",
            "-D img",
            "--images-dir img",
            "--images-dir=img",
            "--images img",
        ] {
            assert_eq!(options(line), std::slice::from_ref(&images), "{line}");
        }
        let daemon = (Some("daemon"), None);
        assert_eq!(options("-dDimg"), [daemon.clone(), images]);
        assert_eq!(
            options("-dvv"),
            [daemon, (Some("verbosity"), Some("v".to_owned()))]
        );
        assert_eq!(options("--newer"), [(None, None)]);
    }

    #[test]
    fn the_action_is_the_first_word() {
        for (line, word) in [
            ("dump -t 1", Some("dump")),
            ("-t 1 -o log pre-dump", Some("pre-dump")),
            ("-v 4 dump", Some("4")),
            ("--port page-server lazy-pages", Some("lazy-pages")),
            ("--version", None),
            ("--exec-cmd -- dump", None),
        ] {
            assert_eq!(action(&split(line)), word.map(OsStr::new), "{line}");
        }
    }
}
