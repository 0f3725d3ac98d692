//! `pageferry verify DIR`: whether a restore finds all memory in an image directory and its parents.
//!
//! ```text
//! processes   inventory, pstree, core, mm   ->  whose memory is needed, and where it is mapped
//! memory      pagemaps, pages files, parents ->  each entry, each hole, each block
//! findings    codes, words, what is a fault
//! ```
//!
//! Judged is what CRIU does with such images, not what their format allows: what CRIU restores right is no fault.

pub(crate) mod findings;
mod memory;
mod processes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::image::dir::ImageDir;
use pageferry::migration::messages::CriuVersion;
use pageferry::observe::schema::Output;
use schemars::JsonSchema;
use serde::Serialize;

use crate::images::open;
use crate::programs::{reads_compressed, version_of};
use findings::{Finding, Findings, Severity};

/// Names the fields' meaning: another one when a field changes or goes.
const SCHEMA: &str = "pageferry-verify-1";

/// Faults were found.
const EXIT_FAULTS: u8 = 1;

/// Nothing could be looked at.
const EXIT_USAGE: u8 = 2;

/// The first CRIU that writes and reads page counts of 64 bits.
const LONG_COUNTS: CriuVersion = CriuVersion([4, 2, 0]);

/// The first CRIU that reads compressed pages, if it is built with LZ4, and that checks entries.
const COMPRESSED: CriuVersion = CriuVersion([4, 3, 0]);

/// Tells whether a restore finds all memory in an image directory and its parents.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The image directory, complete
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Print JSON
    ///
    /// docs/reference/fields.md describes the fields, docs/reference/commands.md the codes of what is found.
    #[arg(long)]
    json: bool,

    /// The images are to be restored lazily
    ///
    /// Pages that a lazy restore leaves out may be missing: they come from the source of a lazy dump or from a
    /// page server.
    #[arg(long)]
    lazy: bool,

    /// The CRIU that is to restore: a version, or a program [default: any that can]
    ///
    /// What it cannot read is a fault then. Without this option that is a remark, as long as some version can. A
    /// program (a path with a slash) is asked for its version and whether it is built with LZ4.
    #[arg(long, value_name = "CRIU", value_parser = criu)]
    criu: Option<Criu>,

    /// That CRIU is built without LZ4: compressed pages are faults
    #[arg(long)]
    without_lz4: bool,

    /// Memory alone: the rest of the dump is elsewhere
    ///
    /// For directories that a page server has filled, with no dump's other images beside them.
    #[arg(long)]
    memory_only: bool,

    /// Read no page: sizes and places alone
    #[arg(long)]
    no_read: bool,
}

/// Who is to restore.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Criu {
    Version(CriuVersion),
    Program(PathBuf),
}

/// What is asked of images.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Criteria {
    lazy: bool,
    criu: Option<CriuVersion>,
    lz4: bool,
    memory_only: bool,
    read: bool,
}

impl Criteria {
    fn of(args: &Args) -> Result<Criteria> {
        let (criu, lz4) = match &args.criu {
            None => (None, true),
            Some(Criu::Version(version)) => (Some(*version), true),
            Some(Criu::Program(path)) => {
                let asked = async {
                    let version = version_of(path).await.ok_or_else(|| {
                        let text = format!("{} is not a CRIU that starts (--criu)", path.display());
                        Error::new(Kind::Usage, text)
                    })?;
                    Ok((Some(version), reads_compressed(path).await))
                };
                crate::block_on(asked)?
            }
        };
        Ok(Criteria {
            lazy: args.lazy,
            criu,
            lz4: lz4 && !args.without_lz4,
            memory_only: args.memory_only,
            read: !args.no_read,
        })
    }

    /// Whether that a CRIU before `version` cannot read something is a fault.
    fn must_be_read_before(&self, version: CriuVersion) -> bool {
        self.criu.is_some_and(|criu| criu < version)
    }
}

/// How much was checked.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Checked {
    memories: u64,
    pages: u64,
    blocks: u64,
}

/// Whether a restore would find all memory in images.
#[derive(Serialize, JsonSchema)]
struct Report {
    /// Name of this format. It changes if a field gets another meaning or is removed.
    #[schemars(extend("const" = SCHEMA))]
    schema: &'static str,
    /// Absolute path.
    directory: String,
    /// Whether no finding is a fault.
    good: bool,
    /// How many directories were checked: this one and its parents.
    directories: usize,
    /// How many processes and pieces of shared memory.
    memories: u64,
    /// Their pages.
    pages: u64,
    /// Of these, pages in compressed blocks.
    compressed_pages: u64,
    /// What was found.
    findings: Vec<Finding>,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("verify", "pageferry verify --json DIR")
}

/// Exits with 0 if the images are good, 1 if not, 2 if `DIR` holds none.
pub(crate) fn run(args: &Args) -> ExitCode {
    let opened = Criteria::of(args).and_then(|criteria| Ok((open(&args.dir)?, criteria)));
    let report = match opened {
        Ok((dir, criteria)) => verify(&dir, criteria),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match args.json {
        true => crate::print_json(&report),
        false => print(&report),
    }
    match report.good {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(EXIT_FAULTS),
    }
}

fn verify(dir: &ImageDir, criteria: Criteria) -> Report {
    let mut findings = Findings::default();
    let mut checked = Checked::default();
    let chain_dirs = chain_dirs(dir, &mut findings);
    let needed = processes::needed(dir, criteria, &mut findings);
    let directories = chain_dirs.as_ref().map_or(1, Vec::len);
    if let Some(chain_dirs) = chain_dirs {
        memory::check(&chain_dirs, &needed, criteria, &mut findings, &mut checked);
    }
    Report {
        schema: SCHEMA,
        directory: dir.path().display().to_string(),
        good: !findings.any_fault(),
        directories,
        memories: checked.memories,
        pages: checked.pages,
        compressed_pages: checked.blocks,
        findings: findings.into_list(),
    }
}

/// The directory and its parents; `None` if they cannot be followed.
fn chain_dirs(dir: &ImageDir, findings: &mut Findings) -> Option<Vec<ImageDir>> {
    let link = dir.path().join(pageferry::image::dir::PARENT_LINK);
    if link.is_symlink() && !link.exists() {
        let text =
            "nothing is behind the link to the parent: CRIU takes the images for a whole dump";
        findings.remark("parent-dangling", &link, text);
    }
    let chain_dirs = dir.chain_dirs();
    let unusable = |error: Error| findings.fault("parent-unusable", &link, error.to_string());
    chain_dirs.map_err(unusable).ok()
}

fn print(report: &Report) {
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Fault => "fault",
            Severity::Remark => "remark",
        };
        let Finding {
            file, text, code, ..
        } = finding;
        println!("{severity:<7} {file}: {text} [{code}]");
    }
    let verdict = match report.good {
        true => "good",
        false => "not good",
    };
    println!(
        "{verdict}: {} pages of {} processes and shared segments, in {} directories; {} pages compressed",
        report.pages, report.memories, report.directories, report.compressed_pages
    );
}

/// `4.2`, `4.2.1`, or a path with a slash.
fn criu(text: &str) -> std::result::Result<Criu, String> {
    if text.contains('/') {
        return Ok(Criu::Program(text.into()));
    }
    let digits = text.chars().all(|c| c.is_ascii_digit() || c == '.');
    let version = CriuVersion::parse(&format!("Version: {text}")).filter(|_| digits);
    let wrong =
        || format!("{text:?} is neither a version, as 4.2.1 is one, nor a path with a slash");
    version.map(Criu::Version).ok_or_else(wrong)
}

/// The file's name, for texts that name its directory already.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}
