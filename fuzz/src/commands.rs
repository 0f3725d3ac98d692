//! Configuration files and command lines.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use clap::Parser;
use pageferry::daemon::CommonArgs;
use pageferry::daemon::command_line::words::{action, parts};
use pageferry::daemon::command_line::{Action, Parsed, parse_with};
use pageferry::daemon::config_file::lines;
use pageferry::daemon::settings::{Environment, RequestedSettings};
use pageferry::tls::TlsArgs;

use crate::{byte, canary};

/// A configuration file in CRIU's format.
pub(crate) fn config_file(data: &[u8]) {
    let Ok(lines) = lines(data) else {
        return;
    };
    let mut number = 0;
    for line in &lines {
        assert!(line.number > number, "lines are in order");
        number = line.number;
        assert!(line.words().count() <= 2);
        let words = line.words().flat_map(OsStringExt::into_vec);
        assert!(
            words.count() <= data.len() + 3,
            "nothing is made up but dashes and ="
        );
    }
    canary(lines.iter().any(|line| line.oddity.is_some()) && lines.len() > 1);
}

/// Lines of every form.
pub(crate) fn file_seeds() -> Vec<Vec<u8>> {
    [
        "# a comment\ntls\nport 27000 # so\nlog-file \"my log\"\nno-auto-dedup\n",
        "images-dir\t/x\nlog-file \"a\\\"b\"\n  verbosity 4\n",
        "port \"27 000\"\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// Options that both daemons have.
#[derive(Parser, Debug)]
#[command(args_override_self = true)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    tls: TlsArgs,
}

/// A command line: the program, then the words with zero bytes between.
pub(crate) fn command_line(mut data: &[u8]) {
    let program = byte(&mut data) % 3;
    let words: Vec<OsString> = data
        .split(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect();
    let _ = action(&parts(&words));
    // Files are not what is looked at here.
    let names_file = |word: &OsString| word.as_encoded_bytes().windows(4).any(|it| it == b"conf");
    if words.iter().any(names_file) {
        return;
    }
    let argv = std::iter::once(OsString::from("program")).chain(words);
    match program {
        0 => {
            let environment = Environment {
                global: None,
                home: None,
                config_file: None,
            };
            let actions = [Action {
                word: "page-server",
                operand_option: None,
            }];
            let request = RequestedSettings::default();
            let parsed: Result<Parsed<Args>, _> =
                parse_with(&actions, argv, &environment, &request);
            if let Ok(parsed) = parsed {
                canary(!parsed.diagnostics.skipped.is_empty());
            }
        }
        1 => {
            let matched = page_server::command().try_get_matches_from(argv);
            canary(matched.is_ok_and(|matched| matched.get_flag("keep")));
        }
        _ => drop(lazy_client::command().try_get_matches_from(argv)),
    }
}

/// Command lines of all sorts.
pub(crate) fn line_seeds() -> Vec<Vec<u8>> {
    [
        "\0-dvv\0-Dimg\0page-server\0--port\x007\0--ghost-limit\x001M",
        "\0--daem\0--no-daemon\0-o\0log\0--tls",
        "\x01-D\0images\0--port\x0027000\0--keep\0--sync\0close",
        "\x02-d\0-D\0images\0--page-server\0--address\0::1\0--port\x007",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
