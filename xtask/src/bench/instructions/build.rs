//! The workloads, built against two trees.
//!
//! Each build is a crate of its own in a temporary directory, with a copy of the workloads' sources. Its manifest names a
//! tree of pageferry, and its lock file is that tree's. So nothing of either tree is touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use testbed::workspace::{root, target_dir};

use crate::setup;

/// Where the workloads' sources lie in a tree.
const SOURCES: &str = "benches/workloads/src";

/// A tree of pageferry's sources in a temporary directory; it goes with the value.
pub(super) struct Tree {
    /// The commit, shortened.
    pub(super) commit: String,
    dir: TempDir,
}

impl Tree {
    /// The sources of a revision.
    pub(super) fn of_revision(revision: &str) -> Result<Tree> {
        let named = git(&["rev-parse", "--verify", "--short=12", "--end-of-options"])
            .arg(format!("{revision}^{{commit}}"))
            .output()
            .context("git")?;
        ensure!(
            named.status.success(),
            "--against {revision}: git knows no such revision"
        );
        let commit = String::from_utf8_lossy(&named.stdout).trim().to_owned();
        let dir = TempDir::with_prefix("pageferry-instructions-")?;
        let tree = Tree { commit, dir };
        let path = tree.path();
        setup::run(
            git(&["worktree", "add", "--quiet", "--detach"])
                .arg(&path)
                .arg(&tree.commit),
        )?;
        Ok(tree)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("tree")
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let removed = git(&["worktree", "remove", "--force"])
            .arg(self.path())
            .output();
        if !removed.is_ok_and(|output| output.status.success()) {
            eprintln!(
                "the work tree {} stays: git worktree prune",
                self.path().display()
            );
        }
    }
}

fn git(words: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.current_dir(root()).args(words);
    git
}

/// A program that does the workloads.
pub(super) struct Build {
    /// Its path.
    pub(super) program: PathBuf,
}

impl Build {
    /// The names of its workloads, and how often each is to be done.
    pub(super) fn workloads(&self) -> Result<Vec<(String, u32)>> {
        let list = Command::new(&self.program).arg("list").output();
        let list = list.with_context(|| self.program.display().to_string())?;
        ensure!(list.status.success(), "{}", self.program.display());
        let text = String::from_utf8_lossy(&list.stdout);
        let of = |line: &str| {
            let (name, times) = line.split_once(' ')?;
            Some((name.to_owned(), times.parse().ok()?))
        };
        let read: Option<Vec<_>> = text.lines().map(of).collect();
        read.with_context(|| format!("{} list says {text:?}", self.program.display()))
    }
}

/// Both builds.
pub(super) struct Builds {
    pub(super) this: Build,
    pub(super) against: Build,
    /// Whose workloads the other one does.
    pub(super) how: &'static str,
    _dir: TempDir,
}

/// Builds the workloads against this tree and against `other`.
pub(super) fn both(other: &Tree) -> Result<Builds> {
    let dir = TempDir::with_prefix("pageferry-workloads-")?;
    let ours = root().join(SOURCES);
    println!("building against this tree");
    let this = build(&dir.path().join("this"), root(), &ours)?;
    println!("building against {}", other.commit);
    let path = dir.path().join("against");
    let (against, how) = match build(&path, &other.path(), &ours) {
        Ok(built) => (built, "both do today's work"),
        Err(error) => {
            let theirs = other.path().join(SOURCES);
            if !theirs.is_dir() {
                bail!("{error:#}; {}", first_comparable());
            }
            println!(
                "today's workloads do not fit {}: its own are taken",
                other.commit
            );
            (
                build(&path, &other.path(), &theirs)?,
                "each does its own work",
            )
        }
    };
    Ok(Builds {
        this,
        against,
        how,
        _dir: dir,
    })
}

/// Says which revision is the first that has the workloads.
fn first_comparable() -> String {
    let added = git(&["log", "--diff-filter=A", "--format=%h", "--", SOURCES]).output();
    let added = added.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    match added.unwrap_or_default().lines().last() {
        Some(first) => format!(
            "today's workloads do not fit this revision's interface, and it has none of its own: {first} is the first \
             that has"
        ),
        None => "no revision has workloads of its own".to_owned(),
    }
}

/// Builds a crate in `dir` from the workloads' `sources`, against the pageferry in `tree`.
fn build(dir: &Path, tree: &Path, sources: &Path) -> Result<Build> {
    let source_dir = dir.join("src");
    fs::create_dir_all(&source_dir)?;
    for entry in fs::read_dir(sources).with_context(|| sources.display().to_string())? {
        let entry = entry?;
        fs::copy(entry.path(), source_dir.join(entry.file_name()))?;
    }
    fs::write(dir.join("Cargo.toml"), manifest(tree))?;
    // The same crates as in that tree, and no look at what is newer.
    fs::copy(tree.join("Cargo.lock"), dir.join("Cargo.lock")).context("Cargo.lock")?;
    let target = target_dir().join("instructions");
    setup::run(
        setup::cargo()
            .args(["build", "--release", "--quiet", "--manifest-path"])
            .arg(dir.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target),
    )
    .with_context(|| format!("the workloads against {}", tree.display()))?;
    // The next build would replace it.
    let program = dir.join("workloads");
    fs::copy(target.join("release/workloads"), &program).context("the built program")?;
    Ok(Build { program })
}

/// A manifest that stands alone: the same for both builds, so that only pageferry differs.
fn manifest(tree: &Path) -> String {
    // A string of JSON is one of TOML too.
    let tree = serde_json::Value::from(tree.to_string_lossy().as_ref());
    format!(
        "[workspace]\n\n[package]\nname = \"workloads\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nfastrand = \"2\"\npageferry = {{ path = {tree} }}\ntempfile = \"3\"\n\n\
         [profile.release]\npanic = \"abort\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_names_its_tree() {
        let text = manifest(Path::new("/tmp/a \"tree\""));
        let read: toml::Table = text.parse().unwrap();
        let path = &read["dependencies"]["pageferry"]["path"];
        assert_eq!(path.as_str(), Some("/tmp/a \"tree\""));
        // What the workloads' own manifest needs is in this one.
        let own = fs::read_to_string(root().join("benches/workloads/Cargo.toml")).unwrap();
        let own: toml::Table = own.parse().unwrap();
        let names = |table: &toml::Table| -> Vec<String> {
            let crates = table["dependencies"].as_table().unwrap();
            crates.keys().cloned().collect()
        };
        assert_eq!(names(&own), names(&read));
    }
}
