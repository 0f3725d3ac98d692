//! Reads the `use` lines of a crate.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Imports, Module};

/// Who imports whom in the crate whose root lies in `folder`; unit tests and the other `crates` are left out.
pub(super) fn imports_below(folder: &Path, crates: &BTreeSet<PathBuf>) -> Result<Imports> {
    let mut files = Vec::new();
    find_sources(folder, crates, &mut files)?;
    let modules: BTreeMap<Module, PathBuf> = files
        .into_iter()
        .map(|path| (module_of(path.strip_prefix(folder).unwrap_or(&path)), path))
        .filter(|(module, _)| {
            let name = module.last().map(String::as_str);
            !matches!(name, Some("tests" | "schedules"))
        })
        .collect();
    let mut imports = Imports::new();
    for (module, path) in &modules {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let targets = imports_of(&text)
            .into_iter()
            .filter_map(|import| resolve(module, &import, |path| modules.contains_key(path)))
            // A parent and its children are one unit.
            .filter(|target| !module.starts_with(target));
        imports.insert(module.clone(), targets.collect());
    }
    Ok(imports)
}

fn find_sources(folder: &Path, crates: &BTreeSet<PathBuf>, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            if !crates.contains(&path) {
                find_sources(&path, crates, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The module that the file at `path`, relative to the crate's root, holds.
fn module_of(path: &Path) -> Module {
    let mut module: Module = path
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if matches!(
        module.last().map(String::as_str),
        Some("mod" | "lib" | "main")
    ) {
        module.pop();
    }
    module
}

/// The paths that the `use` lines of a file name, before its tests.
fn imports_of(text: &str) -> Vec<Vec<String>> {
    let mut lines = text
        .lines()
        .take_while(|line| !line.starts_with("mod tests"))
        .map(|line| line.split("//").next().unwrap_or_default().trim());
    let mut paths = Vec::new();
    while let Some(line) = lines.next() {
        let public = match line.strip_prefix("pub(") {
            Some(rest) => rest.split_once(") ").map_or("", |(_, rest)| rest),
            None => line.strip_prefix("pub ").unwrap_or(line),
        };
        let Some(tree) = public.strip_prefix("use ") else {
            continue;
        };
        let mut tree = tree.to_owned();
        while !tree.contains(';') {
            let Some(more) = lines.next() else { break };
            tree.push_str(more);
        }
        expand(
            &mut Vec::new(),
            tree.split(';').next().unwrap_or_default(),
            &mut paths,
        );
    }
    paths
}

/// Adds every path of a use tree that stands below `prefix`.
fn expand(prefix: &mut Vec<String>, tree: &str, paths: &mut Vec<Vec<String>>) {
    let (front, list) = match tree.split_once('{') {
        Some((front, rest)) => (front, rest.rsplit_once('}').map(|(list, _)| list)),
        None => (tree, None),
    };
    let front = front.split(" as ").next().unwrap_or_default();
    let parts = front
        .split("::")
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let before = prefix.len();
    prefix.extend(parts.map(str::to_owned));
    match list {
        None => paths.push(prefix.clone()),
        Some(list) => {
            let mut depth = 0;
            let is_end = |letter: char| {
                depth += i32::from(letter == '{') - i32::from(letter == '}');
                letter == ',' && depth == 0
            };
            for item in list.split(is_end).filter(|item| !item.trim().is_empty()) {
                expand(prefix, item.trim(), paths);
            }
        }
    }
    prefix.truncate(before);
}

/// The module of this crate that `import`, which stands in `module`, leads to.
fn resolve(
    module: &Module,
    import: &[String],
    exists: impl Fn(&[String]) -> bool,
) -> Option<Module> {
    let mut path = module.clone();
    let mut rest = import;
    match rest.first()?.as_str() {
        "crate" => {
            path.clear();
            rest = &rest[1..];
        }
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|part| part == "super") {
                path.pop();
                rest = &rest[1..];
            }
        }
        // A child, or another crate.
        child => {
            path.push(child.to_owned());
            if !exists(&path) {
                return None;
            }
            rest = &rest[1..];
        }
    }
    path.extend(rest.iter().cloned());
    while !exists(&path) && path.pop().is_some() {}
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_use_is_read() {
        let text = "//! use crate::no::doc;\n#![allow(x)]\nmod a;\nuse crate::a::B;\npub(in crate::x) use super::c::{self, d::E as F,\n    g::{H, I}};\n\
                    fn f() {\n    use self::j::k;\n}\npub use l;\n#[cfg(test)]\nmod tests { use crate::no::test; }\n";
        let paths: Vec<String> = imports_of(text)
            .iter()
            .map(|path| path.join("::"))
            .collect();
        let expected = [
            "crate::a::B",
            "super::c::self",
            "super::c::d::E",
            "super::c::g::H",
            "super::c::g::I",
            "self::j::k",
            "l",
        ];
        for path in expected {
            assert!(paths.iter().any(|found| found == path), "{path}: {paths:?}");
        }
        assert!(!paths.iter().any(|path| path.contains("no")), "{paths:?}");
    }
}
