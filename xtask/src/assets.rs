//! Man pages, completions and the reference, from the programs' own definitions.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, ValueEnum};
use clap_complete::Shell;
use testbed::workspace::root;

mod fields;
mod metrics;
mod options;
mod outputs;

/// Where the reference stands in the repository.
const REFERENCE: &str = "docs/reference/options.md";

/// Where the metrics stand in the repository.
const METRICS: &str = "docs/reference/metrics.md";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory for man/, completions/ and options.md, made if it is missing
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,

    /// Bring docs/reference/ up to date as well: options, fields, metrics, schemas
    #[arg(long)]
    docs: bool,
}

/// Writes them.
pub(crate) fn run(args: &Args) -> Result<()> {
    write_all(&args.output)?;
    write(&args.output.join("options.md"))?;
    if args.docs {
        write(&root().join(REFERENCE))?;
        let path = root().join(METRICS);
        fs::write(&path, metrics::page()?).with_context(|| path.display().to_string())?;
        outputs::write(root())?;
    }
    println!("{}", args.output.display());
    Ok(())
}

/// Writes man/ and completions/ below `output`.
pub(crate) fn write_all(output: &Path) -> Result<()> {
    let (man, completions) = (output.join("man"), output.join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    for program in programs() {
        clap_mangen::generate_to(program.clone(), &man).context("man pages")?;
        for shell in Shell::value_variants() {
            let name = program.get_name().to_owned();
            let mut program = program.clone();
            clap_complete::generate_to(*shell, &mut program, name, &completions)
                .context("completions")?;
        }
    }
    Ok(())
}

fn write(path: &Path) -> Result<()> {
    fs::write(path, options::text(&programs())).with_context(|| path.display().to_string())
}

/// The programs that people run.
pub(crate) fn programs() -> [Command; 3] {
    [
        pageferry_cli::command(),
        page_server::command(),
        lazy_client::command(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns of a line of `-h` that an option's text may take.
    const SHORT_COLUMNS: usize = 84;

    #[test]
    fn the_reference_of_options_is_current() {
        let committed = fs::read_to_string(root().join(REFERENCE)).unwrap_or_default();
        let same = committed == options::text(&programs());
        assert!(
            same,
            "{REFERENCE} is not current: cargo xtask assets --docs -o DIR writes it"
        );
    }

    #[test]
    fn the_reference_of_metrics_is_current() {
        let committed = fs::read_to_string(root().join(METRICS)).unwrap_or_default();
        let same = committed == metrics::page().unwrap();
        assert!(
            same,
            "{METRICS} is not current: cargo xtask assets --docs -o DIR writes it"
        );
    }

    #[test]
    fn each_option_has_a_heading_and_a_short_line() {
        let mut wrong = Vec::new();
        for program in programs() {
            let name = program.get_name().to_owned();
            for command in std::iter::once(&program).chain(program.get_subcommands()) {
                if command.is_hide_set() {
                    continue;
                }
                let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
                for arg in shown.filter(|arg| arg.get_long().is_some()) {
                    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                    let id = arg.get_id();
                    if arg.get_help_heading().is_none() {
                        wrong.push(format!(
                            "{name} {}: {id} has no heading",
                            command.get_name()
                        ));
                    }
                    if help.is_empty() || help.chars().count() > SHORT_COLUMNS {
                        wrong.push(format!("{name} {}: {id}: {help:?}", command.get_name()));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn man_pages_and_completions_are_made_for_each_command() {
        let dir = std::env::temp_dir().join(format!("pageferry-assets-{}", std::process::id()));
        run(&Args {
            output: dir.clone(),
            docs: false,
        })
        .expect("assets");
        let page = fs::read_to_string(dir.join("man/pageferry-verify.1")).expect("a man page");
        for file in [
            "man/page-server.1",
            "man/lazy-client.1",
            "completions/_pageferry",
        ] {
            assert!(dir.join(file).exists(), "{file}");
        }
        let bash = fs::read_to_string(dir.join("completions/page-server.bash")).expect("bash");
        fs::remove_dir_all(dir).expect("removed");
        assert!(page.contains("Exit codes") && bash.contains("--split-lazy"));
    }
}
