//! The reference of options as a page.

use std::fmt::Write;

use clap::{Arg, Command};

/// What stands above it.
const HEAD: &str = "\
# Options

Written by `cargo xtask assets --docs -o DIR` from the programs' definitions; a test checks that it is current.
Defaults of `page-server` and `lazy-client` may come from CRIU's configuration files:
[configuration.md](../configuration.md).
";

/// The heading of options that have none.
const OTHERS: &str = "Options";

/// The page for `programs` and their commands.
pub(super) fn text(programs: &[Command]) -> String {
    let mut page = HEAD.to_owned();
    for program in programs {
        let name = program.get_name();
        command(&mut page, name, program);
        for sub in program.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            command(&mut page, &format!("{name} {}", sub.get_name()), sub);
        }
    }
    page
}

fn command(page: &mut String, name: &str, command: &Command) {
    let about = command.get_long_about().or(command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    // Writing to a string does not fail.
    let _ = write!(page, "\n## {name}\n\n{}\n", sentence(&about));
    let shown = |arg: &&Arg| !arg.is_hide_set();
    let arguments: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    let operands: Vec<&Arg> = arguments
        .iter()
        .copied()
        .filter(|arg| arg.is_positional())
        .collect();
    table(page, "Operands", &operands);
    let mut headings: Vec<&str> = Vec::new();
    for arg in arguments.iter().filter(|arg| !arg.is_positional()) {
        let heading = arg.get_help_heading().unwrap_or(OTHERS);
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    for heading in headings {
        let under = |arg: &&Arg| {
            !arg.is_positional() && arg.get_help_heading().unwrap_or(OTHERS) == heading
        };
        let under: Vec<&Arg> = arguments.iter().copied().filter(under).collect();
        table(page, heading, &under);
    }
}

fn table(page: &mut String, heading: &str, arguments: &[&Arg]) {
    if arguments.is_empty() {
        return;
    }
    let _ = write!(
        page,
        "\n### {heading}\n\n| option | what it does |\n|---|---|\n"
    );
    for arg in arguments {
        let _ = writeln!(
            page,
            "| `{}` | {} |",
            spelling(arg),
            meaning(arg).replace('|', "\\|")
        );
    }
}

/// `-D, --images-dir DIR`.
fn spelling(arg: &Arg) -> String {
    let takes_value = arg.get_action().takes_values();
    let value = arg.get_value_names().unwrap_or_default().join(" ");
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let names: Vec<String> = short.into_iter().chain(long).collect();
    match (names.is_empty(), takes_value) {
        (true, _) => value,
        (false, true) => format!("{} {value}", names.join(", ")),
        (false, false) => names.join(", "),
    }
}

/// The whole text, with values and the default.
fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let mut parts = vec![paragraphs(&help)];
    let values = arg.get_possible_values();
    if arg.get_action().takes_values() && !values.is_empty() {
        let values = values.iter().map(|value| match value.get_help() {
            Some(help) => format!("`{}`: {help}", value.get_name()),
            None => format!("`{}`", value.get_name()),
        });
        parts.push(format!(
            "Values: {}.",
            values.collect::<Vec<_>>().join("; ")
        ));
    }
    let defaults = arg.get_default_values();
    if arg.get_action().takes_values() && !defaults.is_empty() {
        let defaults = defaults
            .iter()
            .map(|value| format!("`{}`", value.to_string_lossy()));
        parts.push(format!(
            "Default: {}.",
            defaults.collect::<Vec<_>>().join(" ")
        ));
    }
    parts.join(" ")
}

/// Paragraphs as sentences of one.
fn paragraphs(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(|part| sentence(part.trim()));
    paragraphs.collect::<Vec<_>>().join(" ")
}

fn sentence(text: &str) -> String {
    let text = text.replace('\n', " ");
    match text.ends_with(['.', ':', ']']) || text.is_empty() {
        true => text,
        false => format!("{text}."),
    }
}
