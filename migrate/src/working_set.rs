//! `pageferry working-set FILE...`: what recordings of lazy-client name, and several of them as one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::image::working_set::{WorkingSetFile, read};
use pageferry::lazy::working_set::WorkingSet;
use pageferry::observe::schema::Output;
use schemars::JsonSchema;
use serde::Serialize;

/// Tells which pages working sets name, and merges them.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Working sets, such as working-set.img of an image directory
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Write all of them as one to FILE
    ///
    /// A page that several name counts as touched at the earliest time.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Print JSON
    ///
    /// The fields are described in docs/reference/fields.md.
    #[arg(long)]
    json: bool,
}

/// What one file names.
#[derive(Serialize, JsonSchema)]
struct Named {
    /// Its path, as it was given.
    file: PathBuf,
    /// Size of a page, bytes.
    page_bytes: u64,
    /// How many pages it names.
    pages: u64,
    /// In how many runs.
    extents: usize,
    /// What it names of each process, in the order of the tree.
    processes: Vec<Process>,
}

/// What it names of one process.
#[derive(Serialize, JsonSchema)]
struct Process {
    /// The number of the process in the tree, from 0.
    place: usize,
    /// How many mappings have pages that are named.
    mappings: usize,
    /// How many pages are named.
    pages: u64,
    /// In how many runs.
    extents: usize,
    /// When the last run began to be touched, from the first touch, ms.
    last_ms: u32,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Vec<Named>>("working-set", "pageferry working-set --json FILE...")
}

impl Named {
    fn of(file: &Path, set: &WorkingSet) -> Named {
        let process = |(place, part): (usize, pageferry::lazy::working_set::Totals)| Process {
            place,
            mappings: part.mappings,
            pages: part.pages,
            extents: part.extents,
            last_ms: part.last_ms,
        };
        Named {
            file: file.to_owned(),
            page_bytes: set.page().bytes(),
            pages: set.pages(),
            extents: set.extents(),
            processes: set.totals().enumerate().map(process).collect(),
        }
    }
}

/// Prints what there is, and writes what is asked for.
pub(crate) fn run(args: &Args) -> ExitCode {
    match show(args) {
        Ok(named) => {
            match args.json {
                true => crate::print_json(&named),
                false => named.iter().for_each(print),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(args: &Args) -> Result<Vec<Named>> {
    let sets = args.files.iter().map(|file| Ok((file, read(file)?)));
    let sets: Vec<(&PathBuf, WorkingSet)> = sets.collect::<Result<_>>()?;
    let mut named: Vec<Named> = sets
        .iter()
        .map(|(file, set)| Named::of(file, set))
        .collect();
    if let (Some(output), Some((_, first))) = (&args.output, sets.first()) {
        let mut merged = first.clone();
        for (file, set) in &sets[1..] {
            let differ = |error| {
                Error::wrap(
                    Kind::Usage,
                    format!("cannot merge {}", file.display()),
                    error,
                )
            };
            merged.merge(set).map_err(differ)?;
        }
        WorkingSetFile::create(output)?.complete(&merged)?;
        named.push(Named::of(output, &merged));
    }
    Ok(named)
}

fn print(named: &Named) {
    println!(
        "{}: {} pages of {} bytes in {} runs",
        named.file.display(),
        named.pages,
        named.page_bytes,
        named.extents
    );
    for process in &named.processes {
        println!(
            "  process {}: {} pages of {} mappings in {} runs, touched within {} ms",
            process.place, process.pages, process.mappings, process.extents, process.last_ms
        );
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pageferry::lazy::working_set::{Mapping, MappingKind, Recorder};
    use pageferry::units::{PageRange, PageSize, Vaddr};

    use super::*;

    fn recorded(pages: &[u64]) -> WorkingSet {
        let mut recorder = Recorder::new(PageSize::KIB_4);
        for page in pages {
            recorder.touch(0, Vaddr(page << 12), page * 1000);
        }
        let mapping = Mapping {
            range: PageRange::new(0, 1 << 30),
            kind: MappingKind::default(),
        };
        recorder.finish(&BTreeMap::from([(0, vec![mapping])]))
    }

    #[test]
    fn several_become_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, pages) in [("a", [1, 2, 9]), ("b", [2, 3, 4])] {
            let file = WorkingSetFile::create(&path(name)).unwrap();
            file.complete(&recorded(&pages)).unwrap();
        }
        let mut args = Args {
            files: vec![path("a"), path("b")],
            output: Some(path("both")),
            json: false,
        };
        let named = show(&args).unwrap();
        let pages: Vec<u64> = named.iter().map(|named| named.pages).collect();
        assert_eq!(pages, [3, 3, 5]);
        assert_eq!(read(&path("both")).unwrap().pages(), 5);
        args.files.push(path("none"));
        assert!(show(&args).is_err_and(|error| error.to_string().contains("none")));
    }
}
