//! Whole Debian systems, as directories: programs that start themselves or each other (podman, runc, PostgreSQL) do
//! not work under a loader of another system, so a host of the tests has one of these as its root.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{PrivateApt, Suite, lock};
use crate::process::run;
use crate::workspace::target_dir;

/// What a shell's commands are, what CRIU and `pageferry` call, and what makes a system's directories.
const BASE: &[&str] = &[
    "iptables",
    "nftables",
    "busybox-static",
    "base-files",
    "bash",
    "coreutils",
    "debianutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "libc-bin",
    "mawk",
    "mount",
    "procps",
    "sed",
    "tar",
    "util-linux",
];

/// The runtimes, what they call, and a Go compiler with go-criu.
const RUNTIMES: &[&str] = &[
    "runc",
    "crun",
    "podman",
    "conmon",
    "golang-github-containers-common",
    "criu",
    "libcriu2",
    "golang-go",
    "golang-github-checkpoint-restore-go-criu-dev",
    "golang-golang-x-sys-dev",
    "checkpointctl",
    "skopeo",
    "umoci",
];

/// What the packages' scripts would link, relative to `/usr`: a name, and what it is.
const LINKS: &[(&str, &str)] = &[
    ("bin/sh", "bash"),
    ("bin/awk", "mawk"),
    ("sbin/iptables", "xtables-nft-multi"),
    ("sbin/iptables-save", "xtables-nft-multi"),
    ("sbin/iptables-restore", "xtables-nft-multi"),
    ("sbin/ip6tables", "xtables-nft-multi"),
    ("sbin/ip6tables-save", "xtables-nft-multi"),
    ("sbin/ip6tables-restore", "xtables-nft-multi"),
];

/// What an administrator has set, or the packages' scripts: a file, and its contents.
const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\nservice:x:70:70::/tmp:/bin/sh\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nservice:x:70:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n"),
    // Hosts of the tests have no controllers in their control groups and no bridges.
    (
        "etc/containers/containers.conf",
        "[containers]\npids_limit = 0\nnetns = \"none\"\n[engine]\ncgroup_manager = \"cgroupfs\"\n",
    ),
];

/// Where a system tells which packages it was made of.
const LIST: &str = "packages";

/// Programs whose versions are told, and how they are asked.
const VERSIONS: &[&[&str]] = &[
    &["runc", "--version"],
    &["crun", "--version"],
    &["podman", "--version"],
    &["conmon", "--version"],
    &["criu", "--version"],
];

/// The directory of the system with the runtimes, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or not root.
pub fn runtimes() -> Result<PathBuf> {
    system("system", RUNTIMES)
}

/// The directory `name` of a system with `packages` of sid, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or not root.
pub fn system(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let dir = target_dir().join("debian");
    let _lock = lock(&dir)?;
    let home = dir.join(name);
    let wanted = [BASE, packages].concat().join("\n");
    if home.exists() {
        if fs::read_to_string(home.join(LIST)).is_ok_and(|list| list == wanted) {
            return Ok(home);
        }
        // One of an earlier version of the tests, with other packages.
        fs::remove_dir_all(&home)?;
    }
    let work = dir.join(format!("fetching-{name}"));
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let apt = PrivateApt::new(&work.join("apt"), Suite::Sid)?;
    apt.download(&[BASE, packages].concat())
        .with_context(|| format!("fetching {}", packages.join(", ")))?;
    let root = work.join("root");
    apt.unpack(&root)?;
    finish(&root).with_context(|| format!("setting up a system with {}", packages.join(", ")))?;
    fs::write(root.join(LIST), wanted)?;
    fs::rename(&root, &home)?;
    fs::remove_dir_all(&work)?;
    Ok(home)
}

fn finish(root: &Path) -> Result<()> {
    for (name, of) in LINKS {
        let link = root.join("usr").join(name);
        if !link.is_symlink() {
            symlink(of, &link).with_context(|| link.display().to_string())?;
        }
    }
    for (name, contents) in FILES {
        let file = root.join(name);
        fs::create_dir_all(file.parent().context("a file's directory")?)?;
        fs::write(&file, contents).with_context(|| file.display().to_string())?;
    }
    run(Command::new("chroot").arg(root).arg("/sbin/ldconfig")).map(drop)
}

/// The first line of what each of the runtimes says of its version.
///
/// # Errors
/// One of them does not start.
pub fn versions(root: &Path) -> Result<Vec<String>> {
    let ask = |words: &&[&str]| -> Result<String> {
        // crun looks for itself in /proc.
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child"])
            .arg(format!("--mount-proc={}", root.join("proc").display()))
            .arg("chroot")
            .arg(root)
            .args(*words);
        let output = run(&mut command)?;
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = output.lines().next().unwrap_or_default();
        // CRIU does not say who it is.
        Ok(line.replace("Version:", "criu version"))
    };
    VERSIONS.iter().map(ask).collect()
}
