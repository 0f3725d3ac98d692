//! CRIU's sources, as its authors released them, with the suite's programs built.
//!
//! They are an external program under a licence of their own: they stay below `target`, and nothing of them
//! comes into the project.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, released_sources};
use testbed::process;
use testbed::workspace::target_dir;

use crate::setup::{self, run};

/// What builds the suite's programs and what they call.
const PACKAGES: &[&str] = &[
    "gcc",
    "make",
    "pkg-config",
    "iproute2",
    "iptables",
    "kmod",
    "libaio-dev",
    "libbsd-dev",
    "libcap-dev",
    "libgnutls28-dev",
    "libnet1-dev",
    "libnftables-dev",
    "libnl-3-dev",
    "libnl-route-3-dev",
    "libprotobuf-c-dev",
    "libprotobuf-dev",
    "libselinux1-dev",
    "nftables",
    "procps",
    "protobuf-c-compiler",
    "protobuf-compiler",
    "python3",
    "python3-protobuf",
    "python3-yaml",
    "uuid-dev",
    "xz-utils",
];

/// Debian's own programs, also where the caller's PATH begins with others: the suite's modules are theirs.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Bit of CAP_SYS_RESOURCE in /proc/PID/status.
const CAP_SYS_RESOURCE: u32 = 24;

/// Lines of `zdtm.py` that give tests a user and a group of their own.
const IDS: [&str; 2] = ["env['ZDTM_UID'] = ", "env['ZDTM_GID'] = "];

/// The suite, built in a directory of its own for `criu`: from `source`, or fetched.
///
/// # Errors
/// The sources cannot be had, or do not build.
pub(super) fn built(source: Option<&Path>, criu: &Criu) -> Result<PathBuf> {
    let home = target_dir().join("zdtm").join(&criu.version);
    let done = home.join("built");
    if done.exists() {
        return Ok(home);
    }
    setup::install_packages(PACKAGES)?;
    if home.exists() {
        fs::remove_dir_all(&home)?;
    }
    fs::create_dir_all(&home)?;
    match source {
        Some(dir) => {
            ensure!(
                dir.join("test/zdtm.py").is_file(),
                "{}: no test/zdtm.py there: name the root of CRIU's sources",
                dir.display()
            );
            process::run(Command::new("cp").arg("-a").arg(dir.join(".")).arg(&home))?;
        }
        None => {
            let archive = released_sources(criu, &home.join("fetching"))?;
            let mut unpack = Command::new("tar");
            unpack.arg("-xf").arg(&archive).arg("-C").arg(&home);
            process::run(unpack.arg("--strip-components=1"))?;
        }
    }
    println!(
        "building the suite of CRIU {} in {}",
        criu.version,
        home.display()
    );
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let log = fs::File::create(home.join("build.log"))?;
    for words in [&["lib"][..], &["-C", "test/zdtm"]] {
        let mut make = Command::new("make");
        make.env("PATH", PATH)
            .current_dir(&home)
            .arg(format!("-j{jobs}"))
            .args(words);
        make.stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log.try_clone()?));
        run(&mut make).with_context(|| format!("see {}", home.join("build.log").display()))?;
    }
    if !may_be_other_users(&home)? {
        as_root(&home.join("test/zdtm.py"))?;
    }
    fs::write(&done, "")?;
    Ok(home)
}

/// Whether tests may run as users of their own: CRIU may read their limits, and they reach their files.
fn may_be_other_users(home: &Path) -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .context("no capabilities in /proc/self/status")?;
    let capabilities = u64::from_str_radix(capabilities.trim(), 16)?;
    let home = fs::canonicalize(home)?;
    let open = |dir: &Path| {
        fs::metadata(dir).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0)
    };
    Ok(capabilities >> CAP_SYS_RESOURCE & 1 == 1 && home.ancestors().all(open))
}

/// Lets all tests run as root.
fn as_root(program: &Path) -> Result<()> {
    let text = fs::read_to_string(program)?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for id in IDS {
        let mut found = lines.iter_mut().filter(|line| line.contains(id)).peekable();
        ensure!(
            found.peek().is_some(),
            "{}: no line with {id}",
            program.display()
        );
        for line in found {
            let indent = line.len() - line.trim_start().len();
            *line = format!("{}{id}\"0\"", &line[..indent]);
        }
    }
    println!(
        "tests run as root: without CAP_SYS_RESOURCE, or below a closed directory, other users cannot be dumped"
    );
    Ok(fs::write(program, lines.join("\n") + "\n")?)
}
