//! Where settings come from besides the command line: CRIU's configuration files, in CRIU's order.
//!
//! ```text
//! /etc/criu/default.conf     unless --no-default-config or --config is given
//! ~/.criu/default.conf       likewise
//! $CRIU_CONFIG_FILE
//! --config FILE
//! the command line
//! a request by RPC
//! the request's config_file (runc.conf, crun.conf)
//! ```
//!
//! What comes later wins. A file that is not there is no mistake, as for CRIU; one that is there and
//! cannot be read is.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::config_file::{Line, lines};
use crate::limits::CONFIG_FILE_BYTES_MAX;

/// CRIU's configuration of the whole system.
const GLOBAL: &str = "/etc/criu/default.conf";

/// What a process's environment says of configuration files.
#[derive(Clone, Default, Debug)]
pub struct Environment {
    /// The file of the whole system.
    pub global: Option<PathBuf>,
    /// `HOME`
    pub home: Option<OsString>,
    /// `CRIU_CONFIG_FILE`
    pub config_file: Option<OsString>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Environment {
        Environment {
            global: Some(GLOBAL.into()),
            home: env::var_os("HOME"),
            config_file: env::var_os("CRIU_CONFIG_FILE"),
        }
    }
}

/// What a request asks for on top of the command line.
#[derive(Clone, Default, Debug)]
pub struct RequestedSettings {
    /// What it says, as words of a command line.
    pub words: Vec<OsString>,
    /// Long options whose values before count no more, whether it has new ones or not.
    pub replaced: Vec<&'static str>,
    /// A configuration file that overrides all others.
    pub config_file: Option<PathBuf>,
}

/// A configuration file to be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ConfigFile {
    pub(super) path: PathBuf,
    pub(super) named: Named,
}

/// Who named a configuration file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Named {
    /// CRIU looks for it by itself.
    Default,
    /// The user, by an option or a variable.
    By(&'static str),
    /// A request. Runtimes name theirs without looking whether it is there.
    InRequest,
}

/// A configuration file of CRIU's that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoundFile {
    /// Where it is.
    pub path: PathBuf,
    /// The options in it, in its order; or why it cannot be read.
    pub options: Result<Vec<String>, String>,
}

/// Where runtimes tell CRIU to look for a configuration of theirs (a request's `config_file`).
const OF_RUNTIMES: [&str; 2] = ["/etc/criu/runc.conf", "/etc/criu/crun.conf"];

/// The configuration files that count on this machine for who runs CRIU or these programs with `environment`,
/// and for runtimes.
pub fn found_files(environment: &Environment) -> Vec<FoundFile> {
    let files = config_files(environment, &[]).into_iter();
    let paths = files.map(|file| file.path);
    let mut found = Vec::new();
    for path in paths.chain(OF_RUNTIMES.map(PathBuf::from)) {
        let options = match read(&path) {
            Ok(None) => continue,
            Ok(Some(lines)) => Ok(lines.iter().map(text_of).collect()),
            Err(error) => Err(error.to_string()),
        };
        found.push(FoundFile { path, options });
    }
    found
}

fn text_of(line: &Line) -> String {
    let option = line.option.to_string_lossy();
    match &line.value {
        Some(value) => format!("{option}={}", value.to_string_lossy()),
        None => option.into_owned(),
    }
}

/// The files to read before the command line `argv`, first ones first.
pub(super) fn config_files(environment: &Environment, argv: &[OsString]) -> Vec<ConfigFile> {
    let given = given_on_command_line(argv);
    if given.help {
        return Vec::new();
    }
    let in_home = |home: &OsString| PathBuf::from(home).join(".criu/default.conf");
    let mut files = Vec::new();
    let mut push = |path: Option<PathBuf>, named| {
        files.extend(path.map(|path| ConfigFile { path, named }));
    };
    if !given.no_default {
        push(environment.global.clone(), Named::Default);
        push(environment.home.as_ref().map(in_home), Named::Default);
    }
    let from_environment = environment.config_file.as_ref();
    let from_environment = from_environment.filter(|name| !name.is_empty());
    push(
        from_environment.map(PathBuf::from),
        Named::By("CRIU_CONFIG_FILE"),
    );
    push(given.config, Named::By("--config"));
    files
}

/// What the command line says of configuration files. CRIU looks for these words before it reads the
/// options one after another: wherever they stand, but only as they are spelled here.
#[derive(Default)]
struct Given {
    help: bool,
    no_default: bool,
    config: Option<PathBuf>,
}

fn given_on_command_line(argv: &[OsString]) -> Given {
    let mut given = Given::default();
    for (at, word) in argv.iter().enumerate() {
        match word.as_bytes() {
            b"--help" | b"-h" => given.help = true,
            b"--no-default-config" => given.no_default = true,
            b"--config" => {
                given.no_default = true;
                given.config = argv.get(at + 1).map(PathBuf::from);
            }
            bytes => {
                if let Some(path) = bytes.strip_prefix(b"--config=") {
                    given.no_default = true;
                    given.config = Some(OsString::from_vec(path.to_vec()).into());
                }
            }
        }
    }
    given
}

/// The options in the file at `path`; `None` if there is no file.
pub(super) fn read(path: &Path) -> io::Result<Option<Vec<Line>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    // One byte more tells that the file is too long.
    let limit = u64::try_from(CONFIG_FILE_BYTES_MAX)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    file.take(limit).read_to_end(&mut text)?;
    lines(&text).map(Some).map_err(io::Error::other)
}

/// The number that C's `atoi` finds at the start of `text`; CRIU reads all numbers so.
pub(super) fn leading_number(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = unsigned.bytes().take_while(u8::is_ascii_digit).count();
    let sign = if text.starts_with('-') { "-" } else { "" };
    match digits {
        0 => "0".to_owned(),
        _ => format!("{sign}{}", &unsigned[..digits]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn paths(line: &str) -> Vec<String> {
        let environment = Environment {
            global: Some("/etc/criu/default.conf".into()),
            home: Some("/home/ada".into()),
            config_file: Some("/env".into()),
        };
        let files = config_files(&environment, &words(line));
        files
            .iter()
            .map(|file| file.path.display().to_string())
            .collect()
    }

    #[test]
    fn later_files_come_last_and_named_ones_replace_the_defaults() {
        let home = "/home/ada/.criu/default.conf";
        let all = ["/etc/criu/default.conf", home, "/env"];
        assert_eq!(paths("page-server page-server -D img"), all);
        assert_eq!(paths("page-server --no-default-config"), ["/env"]);
        assert_eq!(paths("page-server --config a"), ["/env", "a"]);
        assert_eq!(paths("page-server -v --config=a --config=b"), ["/env", "b"]);
        // CRIU does not know these in advance, and then they mean nothing.
        assert_eq!(paths("page-server --conf a --no-default"), all);
        assert!(paths("page-server --config a -h").is_empty());
    }

    #[test]
    fn nobody_has_a_file_without_an_environment() {
        assert!(config_files(&Environment::default(), &[]).is_empty());
        let environment = Environment {
            config_file: Some(OsString::new()),
            ..Environment::default()
        };
        assert!(config_files(&environment, &[]).is_empty());
    }

    #[test]
    fn a_file_is_there_or_not_or_unusable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conf");
        assert_eq!(read(&path).unwrap(), None);
        assert_eq!(read(&path.join("below")).unwrap(), None);
        std::fs::write(&path, "port 7\n").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().len(), 1);
        assert!(read(dir.path()).is_err());
        std::fs::write(&path, vec![b'#'; CONFIG_FILE_BYTES_MAX + 1]).unwrap();
        assert!(read(&path).is_err());
    }

    #[test]
    fn numbers_are_read_as_by_c() {
        for (text, number) in [
            ("27", "27"),
            (" \t27\t", "27"),
            ("27x", "27"),
            ("+7", "7"),
            ("-7", "-7"),
            ("x", "0"),
            ("", "0"),
        ] {
            assert_eq!(leading_number(OsStr::new(text)), number, "{text:?}");
        }
    }
}
