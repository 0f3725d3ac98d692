//! The text of CRIU's configuration files: options as on the command line, without dashes, one a line.
//!
//! ```text
//! # a comment
//! tls
//! port 27000            # the value ends at a blank or a #
//! log-file "my log"     # or is quoted; \" stands for a quote
//! no-auto-dedup
//! ```
//!
//! Pure: bytes in, words of a command line out. The rules are those of CRIU 4.1.1 to 4.3, found out by
//! running them on generated files (tests/criu_config.rs does so again), odd ones included: a file must
//! mean the same to both. Where CRIU reads something else than what is written there, [`Line::oddity`]
//! says so.
//!
//! | on a line | what CRIU makes of it |
//! |---|---|
//! | blanks, `#` first | nothing |
//! | the name | up to the first space; without any space on the line up to the first tab; else all of it |
//! | the value | what follows, up to a `#` or a space; a tab behind it belongs to it |
//! | `"` first | the value is quoted, up to a `"` without a `\` before it |
//! | `#` in a quoted value | the value ends there all the same |
//! | spaces in a quoted value | an error, unless they are among its first characters (as many as stand before the value) |
//! | more words | an error, but for one character, which is dropped |

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use thiserror::Error;

use crate::limits::CONFIG_FILE_BYTES_MAX;

/// One option of a configuration file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Where it stands, from 1.
    pub number: usize,
    /// `--NAME`, which may have its value attached by `=`.
    pub option: OsString,
    /// The word behind it, if there is one. It is the option's value if the option needs one.
    pub value: Option<OsString>,
    /// What the value would be if it were read as it is written, where CRIU reads it otherwise.
    pub oddity: Option<OsString>,
}

/// Why a configuration file cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ConfigFileError {
    /// It is longer than [`CONFIG_FILE_BYTES_MAX`].
    #[error("it is longer than {CONFIG_FILE_BYTES_MAX} bytes")]
    TooLong,
    /// A zero byte, behind which CRIU would read nothing.
    #[error("line {0}: it holds a zero byte")]
    Zero(usize),
    /// A quoted value without its second quote.
    #[error("line {0}: the quoted value does not end")]
    Unquoted(usize),
    /// More than an option and its value.
    #[error(
        "line {0}: there is more than one option and its value (CRIU takes no value with blanks \
         either, but for a few quoted ones)"
    )]
    TooMuch(usize),
}

/// The options in `text`.
///
/// # Errors
///
/// CRIU would refuse the file, or lose a part of it.
pub fn lines(text: &[u8]) -> Result<Vec<Line>, ConfigFileError> {
    if text.len() > CONFIG_FILE_BYTES_MAX {
        return Err(ConfigFileError::TooLong);
    }
    let mut lines = Vec::new();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let number = index + 1;
        if line.contains(&0) {
            return Err(ConfigFileError::Zero(number));
        }
        lines.extend(statement(number, line.trim_blanks_start())?);
    }
    Ok(lines)
}

/// What counts as blank in C.
trait Blanks {
    fn trim_blanks_start(&self) -> &Self;
}

impl Blanks for [u8] {
    fn trim_blanks_start(&self) -> &[u8] {
        let start = self.iter().position(|byte| !is_blank(*byte));
        &self[start.unwrap_or(self.len())..]
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn statement(number: usize, line: &[u8]) -> Result<Option<Line>, ConfigFileError> {
    if line.is_empty() || line[0] == b'#' {
        return Ok(None);
    }
    let find = |wanted: u8| line.iter().position(|byte| *byte == wanted);
    let Some(end) = find(b' ').or_else(|| find(b'\t')) else {
        return Ok(Some(Line::new(number, line, None)));
    };
    let rest = line[end + 1..].trim_blanks_start();
    if rest.first() == Some(&b'#') {
        return Ok(Some(Line::new(number, &line[..end], None)));
    }
    let before = line.len() - rest.len();
    let value = match rest.strip_prefix(b"\"") {
        Some(quoted) => quoted_value(number, quoted, before + 1)?,
        None => plain_value(rest),
    };
    let obeyed = value.obeyed(number)?;
    let mut statement = Line::new(number, &line[..end], Some(&obeyed));
    let written = written(rest);
    statement.oddity = (written != obeyed).then(|| OsString::from_vec(written));
    Ok(Some(statement))
}

impl Line {
    fn new(number: usize, name: &[u8], value: Option<&[u8]>) -> Line {
        Line {
            number,
            option: OsString::from_vec([b"--", name].concat()),
            value: value.map(|value| OsString::from_vec(value.to_vec())),
            oddity: None,
        }
    }

    /// The line's words on a command line.
    pub fn words(&self) -> impl Iterator<Item = OsString> {
        [Some(self.option.clone()), self.value.clone()]
            .into_iter()
            .flatten()
    }
}

/// A value before CRIU has looked for comments and further words in it.
struct Raw {
    bytes: Vec<u8>,
    /// From where in the value on CRIU looks for further words.
    look_from: usize,
}

/// A value without quotes: the rest of the line.
fn plain_value(rest: &[u8]) -> Raw {
    let space = rest.iter().position(|byte| *byte == b' ');
    Raw {
        bytes: rest.to_vec(),
        look_from: space.unwrap_or(0),
    }
}

/// A quoted value, from behind its first quote, which is character `start` of the line.
fn quoted_value(number: usize, quoted: &[u8], start: usize) -> Result<Raw, ConfigFileError> {
    match quoted.first() {
        None => return Err(ConfigFileError::Unquoted(number)),
        // Whatever follows an empty value is dropped.
        Some(b'"') => {
            return Ok(Raw {
                bytes: Vec::new(),
                look_from: 0,
            });
        }
        Some(_) => {}
    }
    let is_end = |at: &usize| quoted[*at] == b'"' && quoted[*at - 1] != b'\\';
    let end = (1..quoted.len())
        .find(is_end)
        .ok_or(ConfigFileError::Unquoted(number))?;
    let behind = &quoted[end + 1..];
    if behind.contains(&b' ') && is_refused(behind) {
        return Err(ConfigFileError::TooMuch(number));
    }
    Ok(Raw {
        bytes: quoted[..end].to_vec(),
        look_from: start + 1,
    })
}

/// Whether `rest` has a word in it before a comment. Its last character is not looked at.
fn is_refused(rest: &[u8]) -> bool {
    let looked_at = &rest[..rest.len().saturating_sub(1)];
    let words = looked_at.iter().take_while(|byte| **byte != b'#');
    words.into_iter().any(|byte| !is_blank(*byte))
}

impl Raw {
    /// What CRIU obeys. It cuts the value at a `#` by a zero byte and then looks for further words from
    /// `look_from` on, which may be behind the cut.
    fn obeyed(mut self, number: usize) -> Result<Vec<u8>, ConfigFileError> {
        let unescaped = unescaped(&self.bytes);
        let escapes = self.bytes.len() - unescaped.len();
        if escapes > 0 {
            // The shorter value is written over the longer one.
            self.bytes[..unescaped.len()].copy_from_slice(&unescaped);
            self.bytes[unescaped.len()] = 0;
            self.look_from += escapes + 1;
        }
        if let Some(comment) = self.bytes_to_zero(0).iter().position(|byte| *byte == b'#') {
            self.bytes[comment] = 0;
        }
        let looked_at = self.bytes_to_zero(self.look_from);
        if let Some(space) = looked_at.iter().position(|byte| *byte == b' ') {
            let words = &looked_at[..looked_at.len() - 1];
            if words.iter().any(|byte| !is_blank(*byte)) {
                return Err(ConfigFileError::TooMuch(number));
            }
            let cut = self.look_from + space;
            self.bytes[cut] = 0;
        }
        Ok(self.bytes_to_zero(0).to_vec())
    }

    /// What a C program finds from `start` on.
    fn bytes_to_zero(&self, start: usize) -> &[u8] {
        let bytes = self.bytes.get(start..).unwrap_or_default();
        let end = bytes.iter().position(|byte| *byte == 0);
        &bytes[..end.unwrap_or(bytes.len())]
    }
}

/// `\"` stands for a quote.
fn unescaped(bytes: &[u8]) -> Vec<u8> {
    let escapes = |at: usize| bytes[at] == b'\\' && bytes.get(at + 1) == Some(&b'"');
    let kept = (0..bytes.len()).filter(|at| !escapes(*at));
    kept.map(|at| bytes[at]).collect()
}

/// The value as a reader would take it: the quoted text, or a word; and what else stands behind it but a
/// comment.
fn written(rest: &[u8]) -> Vec<u8> {
    let (value, behind) = match rest.strip_prefix(b"\"") {
        Some(quoted) => {
            let is_end = |at: &usize| quoted[*at] == b'"' && (*at == 0 || quoted[*at - 1] != b'\\');
            let end = (0..quoted.len()).find(is_end).unwrap_or(quoted.len());
            (&quoted[..end], quoted.get(end + 1..).unwrap_or_default())
        }
        None => {
            let end = rest
                .iter()
                .position(|byte| is_blank(*byte) || *byte == b'#');
            rest.split_at(end.unwrap_or(rest.len()))
        }
    };
    let behind = behind.trim_blanks_start();
    let mut value = unescaped(value);
    if !(behind.is_empty() || behind[0] == b'#') {
        value.extend_from_slice(b" ");
        value.extend_from_slice(behind);
    }
    value
}

#[cfg(test)]
#[path = "config_file_tests.rs"]
mod tests;
