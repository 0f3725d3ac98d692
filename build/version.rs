//! Tells the programs which commit they are built from and which TLS library they have.
//!
//! A build from a package's sources, without git, names the commit by `PAGEFERRY_COMMIT`.

use std::env;
use std::fs;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=PAGEFERRY_COMMIT");
    let commit = env::var("PAGEFERRY_COMMIT").ok().or_else(commit);
    let commit = commit.unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=PAGEFERRY_COMMIT={commit}");
    let rustls = rustls().unwrap_or_else(|| "of unknown version".to_owned());
    println!("cargo::rustc-env=PAGEFERRY_RUSTLS={rustls}");
}

fn commit() -> Option<String> {
    // It is written with every commit, also of a branch and in a work tree.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    if fs::metadata(&log).is_ok() {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// The version of rustls in the lock file.
fn rustls() -> Option<String> {
    println!("cargo::rerun-if-changed=../Cargo.lock");
    let lock = fs::read_to_string("../Cargo.lock").ok()?;
    let (_, behind) = lock.split_once("name = \"rustls\"\nversion = \"")?;
    behind.split('"').next().map(str::to_owned)
}
