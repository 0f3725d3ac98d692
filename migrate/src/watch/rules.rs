//! The file of rules: read whole and checked before anything follows from it. A mistake names its line and field.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{WATCH_FILE_BYTES_MAX, WATCH_RULES_MAX};
use pageferry::units::parse_bytes;
use pageferry::watch::Timing;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Spanned;

/// Least time between two firings, unless a rule says otherwise.
const COOL_DOWN: Duration = Duration::from_secs(300);

/// Shortest and longest window of a PSI trigger (Documentation/accounting/psi.rst).
const WINDOW: Range<Duration> = Duration::from_millis(500)..Duration::from_millis(10_001);

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<Spanned<Rule>>,
}

/// One condition, and what follows from it.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Rule {
    /// Its name: in the log and in the state file.
    pub(super) name: String,
    /// What it acts on: no two actions on one target at a time. The rule's name unless given.
    pub(super) target: Option<String>,
    /// The condition.
    pub(super) when: When,
    /// How long it must hold.
    #[serde(default, rename = "for", deserialize_with = "time")]
    pub(super) hold: Duration,
    /// Least time between two firings.
    #[serde(default, deserialize_with = "some_time")]
    cool_down: Option<Duration>,
    /// The action.
    pub(super) action: Action,
}

/// A condition.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum When {
    /// Tasks wait for a resource: told by the kernel.
    Psi(Psi),
    /// The load of the last minute.
    Load { above: f64, clear: Option<f64> },
    /// Memory that is available, bytes.
    FreeMemory { below: Bytes, clear: Option<Bytes> },
    /// Room on a file system for users, bytes.
    FreeDisk {
        path: PathBuf,
        below: Bytes,
        clear: Option<Bytes>,
    },
    /// A file is there.
    File { path: PathBuf },
    /// A line comes over the socket.
    Command { word: String },
    /// The host is about to go down, and waits for the action: told by systemd-logind.
    Shutdown(Shutdown),
}

/// A shutdown that waits.
#[derive(Clone, Copy, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Shutdown {
    /// How long logind must let a shutdown wait, at least.
    #[serde(default, deserialize_with = "some_time")]
    pub(super) delay: Option<Duration>,
}

/// A trigger of pressure stall information.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Psi {
    /// What is waited for.
    pub(super) resource: Resource,
    /// Whether some or all tasks wait.
    #[serde(default)]
    pub(super) tasks: Tasks,
    /// How long they must wait in a window.
    #[serde(deserialize_with = "time")]
    pub(super) stall: Duration,
    /// The window.
    #[serde(deserialize_with = "time")]
    pub(super) window: Duration,
    /// Directory of a control group; the whole host without it.
    pub(super) cgroup: Option<PathBuf>,
    /// After how long without an event of the kernel the pressure is over: two windows unless given.
    #[serde(default, deserialize_with = "some_time")]
    pub(super) clear: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Resource {
    Memory,
    Cpu,
    Io,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Tasks {
    #[default]
    Some,
    Full,
}

/// What is done.
#[derive(Clone, PartialEq, Eq, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum Action {
    /// `pageferry migrate` with these arguments.
    Migrate { args: Vec<String> },
    /// Freezes a control group.
    Pause { cgroup: PathBuf },
    /// Lets it go on.
    Resume { cgroup: PathBuf },
    /// Ends what runs in a control group, or a unit of systemd.
    Stop(Service),
    /// Ends it and starts it again.
    Restart(Service),
    /// A command of a shell.
    Exec { command: String },
}

/// What can be stopped and started.
#[derive(Clone, PartialEq, Eq, Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Service {
    pub(super) cgroup: Option<PathBuf>,
    pub(super) unit: Option<String>,
    /// How a control group's processes are started again.
    pub(super) start: Option<String>,
    /// How long processes may take to end by themselves.
    #[serde(default = "ten_seconds", deserialize_with = "time")]
    pub(super) grace: Duration,
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

/// A number of bytes with a suffix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
pub(super) struct Bytes(pub(super) u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Bytes, D::Error> {
        let text = String::deserialize(from)?;
        parse_bytes(&text).map(Bytes).map_err(D::Error::custom)
    }
}

fn time<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    crate::times::duration(&text).map_err(D::Error::custom)
}

fn some_time<'de, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Duration>, D::Error> {
    time(from).map(Some)
}

impl Rule {
    pub(super) fn target(&self) -> &str {
        self.target.as_deref().unwrap_or(&self.name)
    }

    pub(super) fn timing(&self) -> Timing {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        // A host that goes down waits for no cool-down.
        let cool_down = match self.when {
            When::Shutdown(_) => Duration::ZERO,
            _ => self.cool_down.unwrap_or(COOL_DOWN),
        };
        Timing {
            hold_ms: ms(self.hold),
            cool_down_ms: ms(cool_down),
        }
    }

    /// What the rule asks of a shutdown, if it waits for one.
    pub(super) fn shutdown(&self) -> Option<Shutdown> {
        match self.when {
            When::Shutdown(shutdown) => Some(shutdown),
            _ => None,
        }
    }

    /// What is wrong beyond what the types say: the field, and why.
    fn mistake(&self) -> Option<(&'static str, &'static str)> {
        let is_command = matches!(self.when, When::Command { .. });
        if self.name.is_empty() || self.name.chars().any(char::is_control) {
            return Some(("name", "it must have visible characters"));
        }
        if is_command && !self.hold.is_zero() {
            return Some(("for", "a command is given once and does not last"));
        }
        match &self.when {
            When::Shutdown(_) if !self.hold.is_zero() => {
                Some(("for", "a shutdown does not wait for it"))
            }
            When::Shutdown(_) if self.cool_down.is_some() => {
                Some(("cool-down", "a shutdown does not wait for it"))
            }
            When::Psi(psi) if !WINDOW.contains(&psi.window) => {
                Some(("window", "the kernel takes 500ms to 10s"))
            }
            When::Psi(psi) if psi.stall > psi.window => {
                Some(("stall", "it is longer than the window"))
            }
            When::Load {
                above,
                clear: Some(clear),
            } if clear > above => Some(("clear", "it is over `above`")),
            When::FreeMemory {
                below,
                clear: Some(clear),
            }
            | When::FreeDisk {
                below,
                clear: Some(clear),
                ..
            } if clear < below => Some(("clear", "it is under `below`")),
            _ => self.action.mistake(),
        }
    }
}

impl Action {
    fn mistake(&self) -> Option<(&'static str, &'static str)> {
        let (service, is_restart) = match self {
            Action::Stop(service) => (service, false),
            Action::Restart(service) => (service, true),
            _ => return None,
        };
        match (&service.cgroup, &service.unit, &service.start) {
            (None, None, _) => Some(("action", "name a cgroup or a unit")),
            (Some(_), Some(_), _) => Some(("unit", "name a cgroup or a unit, not both")),
            (Some(_), None, None) if is_restart => Some((
                "action",
                "a cgroup needs `start`, the command that starts it",
            )),
            (None, Some(_), Some(_)) => Some(("start", "systemd knows how to start a unit")),
            _ => None,
        }
    }
}

/// Reads the rules of a file.
pub(super) fn read(path: &Path) -> Result<Vec<Rule>> {
    let length = fs::metadata(path).map(|found| found.len());
    let length = length.map_err(|error| Error::file("read", path, error))?;
    if length > WATCH_FILE_BYTES_MAX {
        let text = format!("{} is not a file of rules: {length} bytes", path.display());
        return Err(Error::new(Kind::Usage, text));
    }
    let text = fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
    parse(&text)
        .map_err(|mistake| Error::new(Kind::Usage, format!("{}: {mistake}", path.display())))
}

/// Reads the rules in `text`; a mistake is told with its line.
pub(super) fn parse(text: &str) -> std::result::Result<Vec<Rule>, String> {
    let file: File = toml::from_str(text).map_err(|error| {
        let place = error.span().map(|span| place(text, &span));
        format!("{}{}", place.unwrap_or_default(), error.message())
    })?;
    let mut names = BTreeSet::new();
    if file.rule.is_empty() || file.rule.len() > WATCH_RULES_MAX {
        return Err(format!(
            "it has {} rules, and 1 to {WATCH_RULES_MAX} are taken: [[rule]]",
            file.rule.len()
        ));
    }
    for rule in &file.rule {
        let at = place(text, &rule.span());
        let rule = rule.get_ref();
        if let Some((field, why)) = rule.mistake() {
            let at = field_place(text, &at, rule, field);
            return Err(format!("{at}`{field}` of rule {:?}: {why}", rule.name));
        }
        if !names.insert(rule.name.clone()) {
            return Err(format!(
                "{at}`name`: another rule is called {:?}",
                rule.name
            ));
        }
    }
    Ok(file.rule.into_iter().map(Spanned::into_inner).collect())
}

/// The line of a span, and what stands there.
fn place(text: &str, span: &Range<usize>) -> String {
    let before = text.get(..span.start).unwrap_or(text);
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default().trim();
    format!("line {number} (`{line}`): ")
}

/// The line of a field in a rule: the first one behind the rule's name that names it, or the rule's own.
fn field_place(text: &str, rule_place: &str, rule: &Rule, field: &str) -> String {
    let name = text.find(&format!("\"{}\"", rule.name)).unwrap_or_default();
    let begin = text[..name].rfind("[[rule]]").unwrap_or_default();
    let end = text[name..]
        .find("[[rule]]")
        .map_or(text.len(), |at| name + at);
    let names_field = |at: &usize| {
        let before = text[..*at].chars().next_back();
        let after = text[*at + field.len()..].trim_start();
        after.starts_with(['=', '.', ']'])
            && !before.is_some_and(|c| c.is_alphanumeric() || c == '-')
    };
    let mut found = text[begin..end]
        .match_indices(field)
        .map(|(at, _)| begin + at);
    match found.find(names_field) {
        Some(at) => place(text, &(at..at)),
        None => rule_place.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[[rule]]
name = "squeezed"
target = "web"
when.psi = { resource = "memory", stall = "150ms", window = "1s", cgroup = "/sys/fs/cgroup/web" }
for = "5s"
cool-down = "10m"
action.migrate.args = ["--pid", "12", "--to", "host:9191", "--tls"]

[[rule]]
name = "loaded"
when.load = { above = 8.0, clear = 6.5 }
action.exec.command = "true"

[[rule]]
name = "full"
when.free-disk = { path = "/var", below = "1G", clear = "2G" }
action.stop = { unit = "web.service" }

[[rule]]
name = "maintenance"
when.shutdown.delay = "2m"
action.exec.command = "true"
"#;

    #[test]
    fn rules_are_read() {
        let rules = parse(GOOD).unwrap();
        assert_eq!(rules.len(), 4);
        assert_eq!((rules[0].target(), rules[1].target()), ("web", "loaded"));
        assert_eq!(rules[0].timing().hold_ms, 5_000);
        assert_eq!(rules[1].timing().cool_down_ms, 300_000);
        let delay = rules[3].shutdown().map(|shutdown| shutdown.delay);
        assert_eq!(delay, Some(Some(Duration::from_secs(120))));
        assert_eq!(rules[3].timing().cool_down_ms, 0);
        let any = GOOD.replace("when.shutdown.delay = \"2m\"", "when.shutdown = {}");
        assert!(parse(&any).unwrap()[3].shutdown().is_some());
    }

    #[test]
    fn a_mistake_names_line_and_field() {
        for (from, to, line, field) in [
            (
                "resource = \"memory\"",
                "resource = \"memmory\"",
                5,
                "memmory",
            ),
            ("for = \"5s\"", "fro = \"5s\"", 6, "fro"),
            ("\"10m\"", "\"10 monkeys\"", 7, "10 monkeys"),
            ("window = \"1s\"", "window = \"20s\"", 5, "window"),
            ("stall = \"150ms\"", "stall = \"3s\"", 5, "stall"),
            ("clear = 6.5", "clear = 9.5", 12, "clear"),
            ("clear = \"2G\"", "clear = \"2M\"", 17, "clear"),
            ("name = \"full\"", "name = \"loaded\"", 15, "name"),
            ("when.load", "when.lode", 12, "lode"),
            ("unit = \"web.service\"", "unti = \"x\"", 18, "unti"),
            ("above = 8.0,", "", 12, "above"),
            ("{ unit = \"web.service\" }", "{}", 18, "action"),
            ("delay = \"2m\"", "dealy = \"2m\"", 22, "dealy"),
            ("delay = \"2m\"", "delay = \"2m\"\nfor = \"1s\"", 23, "for"),
            (
                "delay = \"2m\"",
                "delay = \"2m\"\ncool-down = \"1s\"",
                23,
                "cool-down",
            ),
            (
                "[[rule]]\nname = \"full\"",
                "[[rule]\nname = \"full\"",
                15,
                "",
            ),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from}");
            let message = parse(&text).expect_err(to);
            assert!(message.contains(field), "{to}: {message}");
            let expected = format!("line {line} ");
            // A table that has a wrong or a missing field is named by its first or last line.
            assert!(
                message.contains(&expected) || message.contains("line 14 "),
                "{to}: {message}"
            );
        }
        assert!(parse("").unwrap_err().contains("0 rules"));
    }
}
