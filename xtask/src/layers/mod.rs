//! Checks which modules import which, by their `use` lines.
//!
//! - No modules of a crate import each other in a circle; tests of several files are crates too. That a module uses its own parent is no
//!   circle: the two are one unit, and the parent draws it.
//! - The library's modules import downwards alone, in the order that ARCHITECTURE.md draws.
//!
//! The order stands in ARCHITECTURE.md in lines of this form, lowest first; what stands between two `<`
//! does not import each other:
//!
//! ```text
//! layers of NAME: a, b < c < d, e       the children of module NAME (`library`: those of the root)
//! pure: a, c                            these import none but each other
//! ```
//!
//! - The pure modules build from few crates: see `Cargo.toml`, feature `engine`.
//! - No source file has more than [`FILE_LINES_MAX`] lines. Functions are measured by clippy (`clippy.toml`).
//! - `unsafe` is allowed in [`UNSAFE_FOLDERS`] alone.

mod imports;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use testbed::workspace;

use imports::imports_below;

use crate::tracked;

/// The library's folder, to which the order applies.
const LIBRARY: &str = "src";

/// Fewer crates than this, our own included, build the pure modules.
const PURE_CRATES: usize = 40;

/// Longest source file, lines.
const FILE_LINES_MAX: usize = 500;

/// Where the lint against `unsafe` may be switched off: one folder for the programs, one for the tests.
const UNSAFE_FOLDERS: [&str; 2] = ["src/sys", "testbed/src/sys"];

/// What switches it off. In two parts, so that this file does not have it.
const ALLOWS_UNSAFE: &str = concat!("allow(", "unsafe_code");

/// A module's path within its crate; empty for the root.
type Module = Vec<String>;

/// Who imports whom.
type Imports = BTreeMap<Module, BTreeSet<Module>>;

#[derive(clap::Args)]
pub(crate) struct Args {}

/// Checks the whole workspace.
pub(crate) fn run(_args: &Args) -> Result<()> {
    let root = workspace::root();
    let mut problems = Vec::new();
    let crates = crate_folders(root)?;
    for folder in &crates {
        let imports = imports_below(folder, &crates)?;
        let name = folder.strip_prefix(root).unwrap_or(folder);
        problems.extend(circles(&imports).into_iter().map(|circle| {
            format!(
                "{}: these import each other in a circle: {}",
                name.display(),
                circle.join(" -> ")
            )
        }));
        if name == Path::new(LIBRARY) {
            let path = root.join("ARCHITECTURE.md");
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            problems.extend(against_order(&imports, &Order::parse(&text)?));
        }
    }
    problems.extend(bad_files(root)?);
    let crates = pure_crates(root)?;
    if crates.len() >= PURE_CRATES {
        problems.push(format!(
            "the pure modules need {} crates, {PURE_CRATES} are too many: {}",
            crates.len(),
            Vec::from_iter(crates).join(", ")
        ));
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

/// The source files that are too long, or allow `unsafe` where it has no place.
fn bad_files(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for path in tracked::files(root, "*.rs")? {
        let text = fs::read_to_string(root.join(&path))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (lines, shown) = (text.lines().count(), path.display());
        if lines > FILE_LINES_MAX {
            problems.push(format!(
                "{shown} has {lines} lines, {FILE_LINES_MAX} are the most"
            ));
        }
        let may = UNSAFE_FOLDERS.iter().any(|folder| path.starts_with(folder));
        if !may && text.contains(ALLOWS_UNSAFE) {
            let folders = UNSAFE_FOLDERS.join(" and ");
            problems.push(format!("{shown} allows unsafe code: {folders} may"));
        }
    }
    Ok(problems)
}

/// The folders that hold the modules of one crate each: libraries, binaries, and tests of several files.
fn crate_folders(root: &Path) -> Result<BTreeSet<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(serde::Deserialize)]
    struct Package {
        targets: Vec<Target>,
    }
    #[derive(serde::Deserialize)]
    struct Target {
        src_path: PathBuf,
    }
    let text = cargo(root, "metadata --locked --no-deps --format-version 1")?;
    let metadata: Metadata = serde_json::from_str(&text).context("cargo metadata")?;
    let targets = metadata
        .packages
        .into_iter()
        .flat_map(|package| package.targets);
    let roots = targets.map(|target| target.src_path).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        matches!(name, Some("lib.rs" | "main.rs"))
    });
    let folders: BTreeSet<_> = roots
        .filter_map(|path| Some(path.parent()?.to_owned()))
        .collect();
    ensure!(
        folders.contains(&root.join(LIBRARY)),
        "cargo metadata does not name the library"
    );
    Ok(folders)
}

/// What cargo prints.
fn cargo(root: &Path, arguments: &str) -> Result<String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(arguments.split(' '))
        .current_dir(root)
        .output()
        .with_context(|| format!("cannot run cargo {arguments}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo {arguments}: {stderr}");
    String::from_utf8(output.stdout).with_context(|| format!("cargo {arguments}"))
}

/// The crates that the library's pure modules are built from.
fn pure_crates(root: &Path) -> Result<BTreeSet<String>> {
    let list = cargo(
        root,
        "tree --locked -p pageferry --no-default-features --edges normal,build --prefix none --format {p}",
    )?;
    let names = list.lines().filter_map(|line| line.split(' ').next());
    Ok(names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The order that ARCHITECTURE.md draws.
#[derive(Debug, Default)]
struct Order {
    /// For the path of a parent: the height of each of its children.
    heights: BTreeMap<Module, BTreeMap<String, usize>>,
    pure: BTreeSet<String>,
}

impl Order {
    fn parse(text: &str) -> Result<Order> {
        let mut order = Order::default();
        for line in text.lines() {
            if let Some((name, layers)) = line
                .strip_prefix("layers of ")
                .and_then(|rest| rest.split_once(':'))
            {
                let parent = match name {
                    "library" => Module::new(),
                    path => path.split("::").map(str::to_owned).collect(),
                };
                let heights = layers
                    .split('<')
                    .enumerate()
                    .flat_map(|(height, names)| names_in(names).map(move |name| (name, height)));
                order.heights.insert(parent, heights.collect());
            } else if let Some(names) = line.strip_prefix("pure:") {
                order.pure = names_in(names).collect();
            }
        }
        if order.heights.is_empty() || order.pure.is_empty() {
            bail!("ARCHITECTURE.md has no lines `layers of NAME: ...` and `pure: ...`");
        }
        Ok(order)
    }
}

fn names_in(list: &str) -> impl Iterator<Item = String> {
    list.split(',').map(|name| name.trim().to_owned())
}

/// What breaks the order.
fn against_order(imports: &Imports, order: &Order) -> Vec<String> {
    let mut problems = BTreeSet::new();
    for (from, targets) in imports {
        for (parent, heights) in &order.heights {
            let child = |module: &Module| {
                let below = module.strip_prefix(&parent[..])?;
                below.first().cloned()
            };
            let Some(importer) = child(from) else {
                continue;
            };
            let Some(height) = heights.get(&importer) else {
                problems.insert(format!(
                    "ARCHITECTURE.md gives {} no place in the order",
                    from[..=parent.len()].join("::")
                ));
                continue;
            };
            for target in targets {
                let Some(imported) = child(target).filter(|name| *name != importer) else {
                    continue;
                };
                if heights.get(&imported).is_none_or(|other| other >= height) {
                    problems.insert(format!(
                        "{} imports {}, which does not lie below it in ARCHITECTURE.md",
                        from.join("::"),
                        target.join("::")
                    ));
                }
            }
        }
        let is_pure = |module: &Module| module.first().is_some_and(|top| order.pure.contains(top));
        for target in targets.iter().filter(|_| is_pure(from)) {
            if !is_pure(target) {
                problems.insert(format!(
                    "{} is pure and imports {}, which is not",
                    from.join("::"),
                    target.join("::")
                ));
            }
        }
    }
    problems.into_iter().collect()
}

/// Circles of imports, each once, as the modules on the way round.
fn circles(imports: &Imports) -> Vec<Vec<String>> {
    let mut found: BTreeMap<BTreeSet<Module>, Vec<String>> = BTreeMap::new();
    for start in imports.keys() {
        if let Some(way) = way_back(imports, start) {
            let names = way.iter().map(|module| module.join("::"));
            let members = way.iter().cloned().collect();
            // Each of them finds it: the first one's way is told.
            found.entry(members).or_insert_with(|| names.collect());
        }
    }
    found.into_values().collect()
}

/// The shortest way from `start` back to it.
fn way_back(imports: &Imports, start: &Module) -> Option<Vec<Module>> {
    let mut seen = BTreeSet::new();
    let mut ways = vec![vec![start.clone()]];
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in imports.get(way.last()?).into_iter().flatten() {
                let mut way = way.clone();
                way.push(next.clone());
                if next == start {
                    return Some(way);
                }
                if seen.insert(next.clone()) {
                    longer.push(way);
                }
            }
        }
        ways = longer;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Module {
        path.split("::").map(str::to_owned).collect()
    }

    fn imports(pairs: &[(&str, &str)]) -> Imports {
        let mut imports = Imports::new();
        for (from, to) in pairs {
            imports.entry(module(from)).or_default().insert(module(to));
        }
        imports
    }

    #[test]
    fn the_workspace_has_no_circles_and_keeps_its_order() {
        run(&Args {}).unwrap();
    }

    #[test]
    fn each_crate_of_several_files_is_looked_at() {
        let root = workspace::root();
        let crates = crate_folders(root).unwrap();
        for name in [
            "criu-shim/src",
            "lazy-client/src",
            "migrate/src",
            "page-server/src",
            "src",
            "testbed/src",
            "testbed/src/bin/memkinds",
            "tests/sim_ferry",
            "xtask/src",
        ] {
            assert!(crates.contains(&root.join(name)), "{name}: {crates:?}");
        }
        let testbed = imports_below(&root.join("testbed/src"), &crates).unwrap();
        assert!(!testbed.contains_key(&module("bin::memkinds::make")));
    }

    #[test]
    fn the_pure_modules_need_neither_clap_nor_tls() {
        let crates = pure_crates(workspace::root()).unwrap();
        for needed in ["pageferry", "prost", "zstd"] {
            assert!(crates.contains(needed), "{needed}: {crates:?}");
        }
        for other in ["clap", "rustls", "indicatif", "nix", "tracing"] {
            assert!(!crates.contains(other), "{other}: {crates:?}");
        }
    }

    #[test]
    fn a_circle_is_found_and_named() {
        let two = imports(&[("a::b", "a::c"), ("a::c", "a::b"), ("d", "a::b")]);
        assert_eq!(circles(&two), [["a::b", "a::c", "a::b"]]);
        assert!(circles(&imports(&[("a", "b"), ("b", "c"), ("a", "c")])).is_empty());
    }

    #[test]
    fn an_import_upwards_or_out_of_the_pure_modules_is_found() {
        let order = Order::parse("layers of library: a < b, c < d\npure: a, b\n").unwrap();
        assert!(against_order(&imports(&[("d", "a"), ("b::x", "a::y")]), &order).is_empty());
        for wrong in [
            ("a", "b"),
            ("b", "c"),
            ("c", "d"),
            ("d", "new"),
            ("new", "a"),
        ] {
            let problems = against_order(&imports(&[wrong]), &order);
            assert!(!problems.is_empty(), "{wrong:?}");
        }
        let impure = Order::parse("layers of library: a < b\npure: b\n").unwrap();
        assert_eq!(against_order(&imports(&[("b", "a")]), &impure).len(), 1);
    }

    #[test]
    fn without_an_order_nothing_is_checked_and_that_is_an_error() {
        assert!(Order::parse("# The modules\n").is_err());
    }
}
