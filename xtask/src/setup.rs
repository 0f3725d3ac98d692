//! What the tests, the demo and the benchmarks need on a machine, brought there.

use std::env;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};
use testbed::wait::{self, retried};
use testbed::workspace::{BIN_DIR_VARIABLE, BUILT_BESIDE_TESTS, root, target_dir};

/// A program and the Debian package that it comes in.
pub(crate) struct Needed {
    program: &'static str,
    package: &'static str,
}

/// What unpacks released sources.
pub(crate) const SOURCES: &[Needed] = &[Needed {
    program: "xz",
    package: "xz-utils",
}];

/// Two hosts on one machine.
pub(crate) const NETWORK: &[Needed] = &[
    Needed {
        program: "ip",
        package: "iproute2",
    },
    Needed {
        program: "tc",
        package: "iproute2",
    },
    Needed {
        program: "unshare",
        package: "util-linux",
    },
    Needed {
        program: "nsenter",
        package: "util-linux",
    },
    Needed {
        program: "nft",
        package: "nftables",
    },
];

/// Processes with a heap of objects.
pub(crate) const PYTHON: &[Needed] = &[Needed {
    program: "python3",
    package: "python3",
}];

/// The same on a virtual machine, and what compiles for it.
pub(crate) const JDK: &[Needed] = &[
    Needed {
        program: "java",
        package: "default-jdk-headless",
    },
    Needed {
        program: "javac",
        package: "default-jdk-headless",
    },
];

/// Containers; CRIU locks their network by iptables while it dumps them.
pub(crate) const CONTAINERS: &[Needed] = &[
    Needed {
        program: "runc",
        package: "runc",
    },
    Needed {
        program: "crun",
        package: "crun",
    },
    Needed {
        program: "iptables-restore",
        package: "iptables",
    },
    Needed {
        program: "nft",
        package: "nftables",
    },
];

/// Fails unless run by root, whom CRIU and namespaces need.
pub(crate) fn require_root() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "run this as root: CRIU and network namespaces need it"
    );
    Ok(())
}

/// Installs the packages of programs that are not there.
pub(crate) fn install(needed: &[Needed]) -> Result<()> {
    let mut missing: Vec<&str> = needed
        .iter()
        .filter(|needed| find_program(needed.program).is_none())
        .map(|needed| needed.package)
        .collect();
    missing.dedup();
    add(&missing)
}

/// Installs those of these Debian packages that the machine lacks.
pub(crate) fn install_packages(packages: &[&'static str]) -> Result<()> {
    let is_there = |package: &str| {
        let state = Command::new("dpkg-query")
            .args(["-W", "-f=${db:Status-Status}", package])
            .stderr(Stdio::null())
            .output();
        state.is_ok_and(|state| state.stdout == b"installed")
    };
    let missing = packages.iter().filter(|package| !is_there(package));
    add(&missing.copied().collect::<Vec<&str>>())
}

fn add(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(", "));
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-y", "-qq"])
            .args(args);
        run(command.stdout(Stdio::null()))
    };
    // Lists may be missing or old on a fresh machine.
    retried("apt-get", || apt(&["update"]))?;
    let install = [&["install", "--no-install-recommends"], missing].concat();
    retried("apt-get", || apt(&install))
}

fn find_program(name: &str) -> Option<PathBuf> {
    // Debian's users may lack the directories of the administrator's programs.
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// Runs a command with the output of this one. If this one is to end, so is the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = testbed::process::command_line(command);
    let mut child = command
        .stdin(Stdio::null())
        // A terminal's Ctrl-C reaches it through this program alone: nextest takes a second signal for haste.
        .process_group(0)
        .spawn()
        .with_context(|| line.clone())?;
    let mut told = false;
    let status = wait::undisturbed(&line, Duration::MAX, || {
        let status = child.try_wait()?;
        if status.is_none() && wait::is_interrupted() && !told {
            told = true;
            killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        }
        Ok(status)
    })?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// A cargo command at the root of the workspace.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Builds all binaries once, quickly and with all assertions, and tells their directory.
pub(crate) fn debug_binaries() -> Result<PathBuf> {
    run(cargo().arg("build").args(BUILT_BESIDE_TESTS))?;
    Ok(target_dir().join("debug"))
}

/// The directory of binaries as users run them: one that the environment names, or built here.
pub(crate) fn release_binaries() -> Result<PathBuf> {
    if let Some(dir) = env::var_os(BIN_DIR_VARIABLE) {
        return Ok(dir.into());
    }
    let packages = ["page-server", "lazy-client", "pageferry-cli", "testbed"];
    let packages = packages.iter().flat_map(|package| ["-p", package]);
    run(cargo()
        .args(["build", "--release", "--bins"])
        .args(packages))?;
    Ok(target_dir().join("release"))
}
