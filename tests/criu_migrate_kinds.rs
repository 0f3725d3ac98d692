//! Every kind of mapping, and what becomes of memory between a round and the last dump, through whole migrations by real
//! CRIUs.
//!
//! A tree of two processes holds all of it: the second one has what it inherited, with pages that it wrote and the first one
//! lacks. Once the rounds are over a hook lets both change their memory; both compare all of it at the destination. Each
//! cell of the table in docs/compatibility.md is right memory, or a migration that is given up with the processes where
//! they were, which compare their memory there. Every run of the tests moves what the table calls right with one CRIU;
//! the ignored ones judge each cell with each (`MM_WAYS` and `MM_KINDS` name some), and write the table if
//! `PAGEFERRY_WRITE_TABLES` is set.

#[path = "common/kinds_table.rs"]
mod kinds_table;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kinds_table::{Cell, Layout, SUSPECTS, Seen, Table, Way, column, is_asked};
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::hugepages::HugePages;
use testbed::kinds::{CHANGES, KINDS, Kind, KindResults, Kinds, kind};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

/// For all kinds that have some, in two processes here and two at the destination.
const HUGE_PAGES: u64 = 160;

const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// Of the changes those that some version cannot dump or restore.
const SUSPECTED_CHANGES: &[&str] = &[
    "c-guard",
    "c-guard-removed",
    "c-wipe",
    "c-to-memfd-private",
    "c-to-hugetlb",
    "c-from-hugetlb",
    "c-huge-given-back",
];

/// Other kinds that some version cannot restore lazily, or on top of rounds.
const SUSPECTED_KINDS: &[&str] = &["memfd-private", "wipe", "wipe-moved", "child-wipe"];

/// What is moved by itself: with CRIUs whose names begin so it cannot be dumped or restored in some mode, or is slow.
const ALONE: &[(&str, &[&str])] = &[
    ("4", &["memfd-sealed", "guard-locked", SLOW_LAZILY]),
    (
        "4.1",
        &[
            "guard",
            "guard-edges",
            "guard-many",
            "guard-readonly",
            "guard-thp",
            "guard-wipe",
            "guard-shared",
            "guard-file",
            "child-guard",
            "parent-guard",
            "c-guard",
            "c-guard-removed",
        ],
    ),
    (
        "4.3",
        &[
            "memfd-private",
            "hugetlb-memfd-private",
            "c-to-memfd-private",
        ],
    ),
];

/// CRIU looks at each page of it in a lazy dump, for seconds in each process that has it.
const SLOW_LAZILY: &str = "reservation";

/// What CRIU alone gets wrong without a word: it loses the advice at the restore.
const WRONG_BY_CRIU: &[(&str, &str)] = &[
    ("4.1", "wipe"),
    ("4.1", "wipe-moved"),
    ("4.1", "child-wipe"),
    ("4.1", "c-wipe"),
    ("4.1", "droppable"),
];

#[test]
fn criu_4_2_1() {
    with_criu(Suite::Sid, judge_often);
}

/// Each cell, for the table in the documentation.
mod whole {
    use super::{Suite, judge_whole, with_criu};

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_1_1() {
        with_criu(Suite::Trixie, judge_whole);
    }

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_2_1() {
        with_criu(Suite::Sid, judge_whole);
    }

    #[test]
    #[ignore = "long: for the table in docs/compatibility.md"]
    fn criu_4_3() {
        with_criu(Suite::Experimental, judge_whole);
    }
}

fn layout() -> Layout {
    let way = |name| Way { name, title: name };
    Layout {
        begin: "<!-- kinds of memory by migrate: written by tests/criu_migrate_kinds.rs -->\n",
        end: "<!-- end of kinds of memory by migrate -->\n",
        rows: [KINDS, CHANGES].concat(),
        ways: MODES.into_iter().map(way).collect(),
    }
}

fn is_lazy(mode: &str) -> bool {
    matches!(mode, "post-copy" | "hybrid")
}

fn judge_often(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let _huge = HugePages::allow(HUGE_PAGES)?;
    let (column, table) = (column(criu)?, Table::committed(layout())?);
    for mode in MODES {
        let right = |kind: &&Kind| {
            let takes_long = is_lazy(mode) && kind.name == SLOW_LAZILY;
            !takes_long && table.says(**kind, mode, column)
        };
        let kinds: Vec<Kind> = layout().rows.iter().filter(right).copied().collect();
        let moved = migrate(&test_dir.path(mode), criu, &kinds, mode, &[])?;
        let Ended::Moved(said) = moved.ended else {
            anyhow::bail!("{mode}: {:?}", moved.ended);
        };
        let wrong: BTreeMap<String, String> = lacking_of(said);
        ensure!(wrong.is_empty(), "{mode}: {wrong:#?}");
    }
    let sealed = [kind("memfd-sealed").context("no such kind")?];
    let refused = migrate(&test_dir.path("refused"), criu, &sealed, "hybrid", &[])?;
    ensure!(
        matches!(refused.ended, Ended::Stayed(_)),
        "{:?}",
        refused.ended
    );
    Ok(())
}

fn judge_whole(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let _huge = HugePages::allow(HUGE_PAGES)?;
    let column = column(criu)?;
    let groups = groups(column);
    let mut seen = Seen::new();
    for mode in MODES.into_iter().filter(|mode| is_asked("MM_WAYS", mode)) {
        let began = Instant::now();
        for (n, kinds) in groups.iter().enumerate() {
            let dir = test_dir.path(&format!("{mode}-{n}"));
            seen.extend(judge_group(&dir, criu, kinds, mode)?);
        }
        eprintln!("{mode}: {:.1} s", began.elapsed().as_secs_f64());
    }
    Table::committed(layout())?.judge(column, &seen)
}

/// What is moved together: some alone, those that another CRIU cannot dump or restore, and all others.
fn groups(column: &str) -> Vec<Vec<Kind>> {
    let mut rows = layout().rows;
    rows.retain(|kind| is_asked("MM_KINDS", kind.name));
    let is_alone = |kind: &Kind| {
        ALONE
            .iter()
            .any(|(with, names)| column.starts_with(with) && names.contains(&kind.name))
    };
    let (alone, rows): (Vec<Kind>, Vec<Kind>) = rows.into_iter().partition(is_alone);
    let is_suspected = |kind: &Kind| {
        let suspected = [SUSPECTS, SUSPECTED_KINDS, SUSPECTED_CHANGES];
        suspected.iter().any(|list| list.contains(&kind.name))
    };
    let (suspected, rows): (Vec<Kind>, Vec<Kind>) = rows.into_iter().partition(is_suspected);
    let singles = alone.into_iter().map(|kind| vec![kind]);
    singles.chain([suspected, rows]).collect()
}

/// Moves `kinds` together, or if that fails each by itself.
fn judge_group(dir: &Path, criu: &Criu, kinds: &[Kind], mode: &'static str) -> Result<Seen> {
    if kinds.is_empty() {
        return Ok(Seen::new());
    }
    let seen = cells(&dir.join("all"), criu, kinds, mode)?;
    let failed = |cell: &Cell| matches!(cell, Cell::Refused | Cell::Lost(_));
    if kinds.len() == 1 || !seen.values().any(failed) {
        return Ok(seen);
    }
    // One of them takes the others along.
    let mut seen = Seen::new();
    for kind in kinds {
        seen.extend(cells(&dir.join(kind.name), criu, &[*kind], mode)?);
    }
    Ok(seen)
}

/// Moves `kinds` together, and tells what became of each.
fn cells(dir: &Path, criu: &Criu, kinds: &[Kind], mode: &'static str) -> Result<Seen> {
    let column = column(criu)?;
    let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
    let moved = migrate(dir, criu, kinds, mode, &[]);
    let moved = moved.with_context(|| format!("{mode}: {}", names.join(" ")))?;
    let cell = |kind: &Kind| match &moved.ended {
        Ended::Stayed(why) => {
            eprintln!("{} by {mode}: given up: {why}", kind.name);
            Cell::Refused
        }
        Ended::Lost(why) => {
            eprintln!("{} by {mode}: lost: {why}", kind.name);
            Cell::Lost(why.clone())
        }
        Ended::Moved(said) => match said.get(kind.name).cloned().flatten() {
            None => Cell::Right,
            Some(_) if WRONG_BY_CRIU.contains(&(column, kind.name)) => Cell::Criu,
            Some(wrong) => {
                eprintln!("{} by {mode}: {wrong}", kind.name);
                Cell::Wrong(wrong)
            }
        },
    };
    for (kind, why) in &moved.lacking {
        eprintln!("{kind} is lacking: {why}");
    }
    let known = kinds
        .iter()
        .filter(|kind| !moved.lacking.contains_key(kind.name));
    Ok(known.map(|kind| ((*kind, mode), cell(kind))).collect())
}

/// What became of a tree.
struct Migrated {
    ended: Ended,
    /// Kinds that this kernel lacks.
    lacking: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Ended {
    /// It lives at the destination, and says this of its memory.
    Moved(KindResults),
    /// It lives here, and its memory is right.
    Stayed(String),
    /// It lives nowhere, or its memory is wrong here.
    Lost(String),
}

/// Moves a tree with `kinds`, which change when the rounds are over.
fn migrate(
    dir: &Path,
    criu: &Criu,
    kinds: &[Kind],
    mode: &'static str,
    options: &[&str],
) -> Result<Migrated> {
    let mut kinds = Kinds::start_tree(&dir.join("load"), kinds)?;
    let agent = Agent::start(&criu.path, &dir.join("agent"), None, &[])?;
    let (change, check) = (kinds.change_command(), kinds.ask_command(1));
    let moves = Move::new(criu, dir.join("source"), mode)
        .with(&["--mode", mode, "--pre-freeze", &change])
        .with(&["--post-resume", &check])
        .with(options);
    let pid = kinds.pid().to_string();
    let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
    let ended = command.wait(GENEROUS)?;
    let ended = match ended.status.success() {
        true => {
            kinds.wait_until_gone()?;
            moved(&kinds).unwrap_or_else(|error| Ended::Lost(format!("{error:#}")))
        }
        false => {
            let why = problem(&moves).unwrap_or_else(|| command.log_tail());
            stayed(&kinds, &why).unwrap_or_else(|error| Ended::Lost(format!("{why}: {error:#}")))
        }
    };
    if let Ended::Lost(_) = ended {
        eprintln!("{}{}", command.log_tail(), agent.log());
    }
    // They were made here, but for a migration that is given up before the hook.
    kinds.change()?;
    kinds.wait_until_changed()?;
    let lacking = kinds.lacking.clone();
    Ok(Migrated { ended, lacking })
}

/// Why a migration was given up, if it had begun.
fn problem(moves: &Move<'_>) -> Option<String> {
    let report = moves.report().ok()?;
    report["problem"].as_str().map(str::to_owned)
}

/// What is said while pages come, and when all are there.
fn moved(kinds: &Kinds) -> Result<Ended> {
    let at_once = kinds.answer(1)?;
    kinds.ask(2)?;
    let mut said = kinds.answer(2)?;
    for (kind, wrong) in at_once {
        let own = said.entry(kind).or_default();
        *own = wrong
            .map(|wrong| format!("at once: {wrong}"))
            .or(own.take());
    }
    Ok(Ended::Moved(said))
}

fn stayed(kinds: &Kinds, why: &str) -> Result<Ended> {
    kinds.ask(1)?;
    let wrong = lacking_of(kinds.answer(1)?);
    ensure!(wrong.is_empty(), "here: {wrong:?}");
    Ok(Ended::Stayed(why.to_owned()))
}

fn lacking_of(said: KindResults) -> BTreeMap<String, String> {
    let wrong = said.into_iter();
    wrong
        .filter_map(|(kind, wrong)| Some((kind, wrong?)))
        .collect()
}
