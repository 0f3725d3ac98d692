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
    #[arg(long, conflicts_with = "address")]
    unix: Option<PathBuf>,
    #[arg(long)]
    exterior: bool,
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
    let skipped: Vec<String> = parsed.diagnostics.skipped.into_iter().collect();
    let skipped = skipped.join(" ");
    assert_eq!(
        skipped,
        "--external --ghost-limit --manage-cgroups --shell-job --tree"
    );
}

#[test]
fn what_neither_knows_is_an_error() {
    for line in ["--bogus", "-Z", "--no-bogus", "--no-port", "--=x"] {
        assert!(
            matches!(read(line), Err(CommandLineError::Unknown { .. })),
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

fn with_config(text: &str, line: &str) -> Result<Parsed<Args>, CommandLineError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("conf");
    std::fs::write(&path, text).unwrap();
    let environment = Environment {
        global: Some(path),
        ..Environment::default()
    };
    let words = ["page-server"].into_iter().chain(line.split_whitespace());
    let words = words.map(OsString::from);
    parse_with(ACTIONS, words, &environment, &RequestedSettings::default())
}

#[test]
fn the_command_line_has_the_last_word() {
    let args = with_config("port 7\ndaemon\naddress a\nkeep\n", "--port 8 --no-daemon");
    let common = args.unwrap().args.common;
    assert_eq!((common.port, common.daemon), (Some(8), false));
    assert_eq!(common.address.as_deref(), Some("a"));
    let on = with_config("no-daemon\n", "-d").unwrap();
    assert!(on.args.common.daemon);
    assert!(
        with_config("restore-detached\n", "")
            .unwrap()
            .args
            .common
            .daemon
    );
    assert!(
        !with_config("restore-detached\n", "--no-daemon")
            .unwrap()
            .args
            .common
            .daemon
    );
}

#[test]
fn what_cannot_stand_beside_an_option_gives_way_to_it() {
    let parsed = with_config("address far\nport 7\n", "--unix path").unwrap();
    assert_eq!(parsed.args.common.address, None);
    assert_eq!(parsed.args.common.port, Some(7));
    let warning = parsed.diagnostics.warnings.join("\n");
    assert!(warning.contains("conf, line 1: --address"), "{warning}");
    let both = read("--address far --unix path");
    assert!(matches!(both, Err(CommandLineError::Parser(_))));
}

#[test]
fn names_are_short_enough_in_a_file_if_criu_has_no_other() {
    // --exter is --external for CRIU, and one of two for the command line.
    assert!(read("--exter x").is_err());
    assert!(
        with_config("exter x\n", "")
            .unwrap()
            .diagnostics
            .skipped
            .is_empty()
    );
}

#[test]
fn a_request_stands_between_the_command_line_and_its_own_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runc.conf");
    std::fs::write(&path, "images-dir there\n").unwrap();
    let request = RequestedSettings {
        words: ["--images-dir=here", "--log-file=l"]
            .map(OsString::from)
            .to_vec(),
        replaced: vec!["address", "port"],
        config_file: Some(path.clone()),
    };
    let argv = ["page-server", "--address", "a", "--port", "7", "-o", "x"].map(OsString::from);
    let parse = || parse_with::<Args>(ACTIONS, argv.clone(), &Environment::default(), &request);
    let common = parse().unwrap().args.common;
    assert_eq!((common.address, common.port), (None, None));
    assert_eq!(common.images_dir, PathBuf::from("there"));
    assert_eq!(common.log_file, Some(PathBuf::from("l")));
    std::fs::remove_file(&path).unwrap();
    let without = parse().unwrap();
    assert_eq!(without.args.common.images_dir, PathBuf::from("here"));
    assert!(without.diagnostics.warnings.is_empty());
}

#[test]
fn a_mistyped_option_is_guessed() {
    for (line, meant) in [
        ("--exteriorr", "--exterior"),
        ("--imagesdir x", "--images-dir"),
        ("--prot 7", "--port"),
    ] {
        let error = read(line).unwrap_err().to_string();
        assert!(error.contains(&format!("did you mean {meant}?")), "{error}");
    }
    let error = read("--zzz").unwrap_err().to_string();
    assert!(!error.contains("did you mean"), "{error}");
}

#[test]
fn help_is_short_or_long() {
    let text = |line| match read(line) {
        Err(CommandLineError::Parser(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let (short, long) = (text("-h"), text("--help"));
    assert!(short.len() < long.len(), "{short}");
    assert!(
        !short.contains("timestamps") && long.contains("timestamps"),
        "{long}"
    );
}
