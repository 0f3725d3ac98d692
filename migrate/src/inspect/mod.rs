//! `pageferry inspect DIR`: what is in an image directory and its parents, and where each page is.

mod contents;
mod report;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry::error::{Kind, Result};
use pageferry::image::dir::ImageDir;
use pageferry::observe::schema::Output;

use crate::images::open;
use report::Report;

/// Nothing could be looked at.
const EXIT_USAGE: u8 = 2;

/// Tells what an image directory and its parents hold.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The image directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Print JSON
    ///
    /// The fields are described in docs/reference/fields.md.
    #[arg(long)]
    json: bool,

    /// Read no page: sizes and places alone
    ///
    /// Zero and duplicate pages are not counted then, which takes as long as reading all memory.
    #[arg(long)]
    no_read: bool,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("inspect", "pageferry inspect --json DIR")
}

/// Prints what there is. Fails if `DIR` holds no images.
pub(crate) fn run(args: &Args) -> ExitCode {
    match survey(&args.dir, !args.no_read) {
        Ok(report) => {
            match args.json {
                true => crate::print_json(&report),
                false => table::print(&report),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            match error.kind() {
                Kind::Usage => ExitCode::from(EXIT_USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn survey(dir: &Path, read: bool) -> Result<Report> {
    let dir: ImageDir = open(dir)?;
    let mut report = Report::of(&dir)?;
    report.resolve(&dir, read)?;
    Ok(report)
}
