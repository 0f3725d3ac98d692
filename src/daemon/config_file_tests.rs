//! What lines mean. That CRIU takes them so too is what tests/criu_config.rs finds out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Vec<Vec<String>> {
    let lines = lines(text.as_bytes()).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    let shown = |line: &Line| {
        line.words()
            .map(|word| word.into_string().unwrap())
            .collect()
    };
    lines.iter().map(shown).collect()
}

fn refused(text: &str) -> ConfigFileError {
    lines(text.as_bytes()).expect_err(text)
}

#[test]
fn a_line_is_an_option_and_its_value() {
    for (line, words) in [
        ("tls", &["--tls"][..]),
        ("  \ttls", &["--tls"]),
        ("no-tls", &["--no-tls"]),
        ("port 27000", &["--port", "27000"]),
        ("port  \t 27000", &["--port", "27000"]),
        ("port\t27000", &["--port", "27000"]),
        ("port=27000", &["--port=27000"]),
        ("port 27000   ", &["--port", "27000"]),
        ("port 27000 # seven", &["--port", "27000"]),
        ("port 27000#seven", &["--port", "27000"]),
        ("tls # secure", &["--tls"]),
        ("tls#secure", &["--tls#secure"]),
        ("tls ", &["--tls", ""]),
        ("tls yes", &["--tls", "yes"]),
        ("port =27000", &["--port", "=27000"]),
        // A space anywhere ends the name, even behind a tab.
        ("port\t27000 # seven", &["--port\t27000"]),
        ("port\t27000#seven", &["--port", "27000"]),
        ("port 27000\r", &["--port", "27000\r"]),
        ("tls-key \"k.pem\"", &["--tls-key", "k.pem"]),
        ("tls-key \"\"", &["--tls-key", ""]),
        ("tls-key \"a b\"", &["--tls-key", "a b"]),
        (r#"tls-key "a\"b""#, &["--tls-key", "a\"b"]),
        (r#"tls-key a\"b"#, &["--tls-key", "a\"b"]),
        (r"tls-key a\\b", &["--tls-key", r"a\\b"]),
        ("tls-key \"k.pem\" # mine", &["--tls-key", "k.pem"]),
    ] {
        assert_eq!(read(line), [words], "{line:?}");
        let oddities = lines(line.as_bytes()).unwrap();
        let odd = oddities[0].oddity.is_some();
        assert_eq!(odd, line.ends_with('\r'), "{line:?}: {:?}", oddities[0]);
    }
}

#[test]
fn blank_lines_and_comments_are_nothing() {
    assert!(read("\n \n\t\n# tls\n   # tls\n#").is_empty());
    let text = lines(b"\n# port 1\n  port 2\nport 3").unwrap();
    let numbers: Vec<usize> = text.iter().map(|line| line.number).collect();
    assert_eq!(numbers, [3, 4]);
}

#[test]
fn what_criu_reads_otherwise_than_written_is_told() {
    for (line, obeyed, written) in [
        ("tls-key \"a#b\"", "a", "a#b"),
        ("tls-key k.pem x", "k.pem", "k.pem x"),
        ("tls-key \"\" x", "", " x"),
        ("tls-key \"k\" x", "k", "k x"),
        ("tls-key \"k\"x", "k", "k x"),
        ("port 27000 \\", "27000", "27000 \\"),
    ] {
        let line = &lines(line.as_bytes()).unwrap()[0];
        assert_eq!(line.value.as_deref(), Some(OsStr::new(obeyed)), "{line:?}");
        assert_eq!(
            line.oddity.as_deref(),
            Some(OsStr::new(written)),
            "{line:?}"
        );
    }
}

#[test]
fn what_criu_refuses_is_refused() {
    for line in [
        "port 27000 28000",
        "port = 27000",
        "tls-key a bc",
        "tls-key \"/etc/my keys/some key\"",
    ] {
        assert_eq!(refused(line), ConfigFileError::TooMuch(1), "{line}");
    }
    // Behind a comment CRIU looks on where the value's first space was.
    assert_eq!(refused("port 27000\t# seven"), ConfigFileError::TooMuch(1));
    for line in ["tls-key \"", "tls-key \"k", "tls-key \"k\\\""] {
        assert_eq!(refused(line), ConfigFileError::Unquoted(1), "{line}");
    }
    assert_eq!(refused("tls\nport 27\x00"), ConfigFileError::Zero(2));
    assert_eq!(
        refused(&" ".repeat(CONFIG_FILE_BYTES_MAX + 1)),
        ConfigFileError::TooLong
    );
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "[a-z=# \t\"\\\\\r\n\0]{0,60}") {
        if let Ok(lines) = lines(text.as_bytes()) {
            prop_assert!(lines.len() <= text.split('\n').count());
            for line in lines {
                prop_assert!(line.option.as_bytes().starts_with(b"--"));
                prop_assert!(!line.option.as_bytes().contains(&b' '));
                if let Some(value) = line.value {
                    prop_assert!(!value.as_bytes().contains(&b'#'));
                    prop_assert!(!value.as_bytes().contains(&0));
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = lines(&text);
    }

    #[test]
    fn plain_settings_come_back(
        settings in proptest::collection::vec(("[a-z][a-z-]{0,20}", "[!\"$-~]{1,20}", any::<bool>()), 0..10)
    ) {
        let quoted = |value: &str| format!("\"{}\"", value.replace('"', "\\\""));
        // A value that ends with a backslash cannot be quoted: it would escape the quote.
        let line = |(name, value, quotes): &(String, String, bool)| match quotes {
            true if !value.contains('\\') => format!("{name} {}  # comment\n", quoted(value)),
            _ => format!("  {name}  {}\n", value.replace(['"', '\\'], "_")),
        };
        let text: String = settings.iter().map(line).collect();
        let read = lines(text.as_bytes()).unwrap();
        prop_assert_eq!(read.len(), settings.len());
        for (line, (name, value, quotes)) in read.iter().zip(&settings) {
            let value = match quotes {
                true if !value.contains('\\') => value.clone(),
                _ => value.replace(['"', '\\'], "_"),
            };
            prop_assert_eq!(line.option.to_string_lossy(), format!("--{name}"));
            prop_assert_eq!(line.value.as_ref().unwrap().to_string_lossy(), value);
            prop_assert!(line.oddity.is_none());
        }
    }
}
