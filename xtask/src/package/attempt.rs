//! The packages in a clean root: installed, looked at, and used for a dump and a restore.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use testbed::debian::{Suite, bootstrap};

use crate::setup::{install_packages, require_root, run};

/// Runs in the root, in PID and mount namespaces of its own, with the package's files in /packages.
const SCRIPT: &str = include_str!("try.sh");

/// Installs the packages in a fresh root of the oldest suite that has a CRIU, and uses them there.
/// Static programs, if there are any, are used there for a lazy restore under TLS.
pub(super) fn install_and_use(
    packages: &[PathBuf],
    static_dir: Option<&Path>,
    place: &Path,
) -> Result<()> {
    require_root()?;
    install_packages(&["debootstrap", "iproute2"])?;
    let clean = place.join("root");
    println!("making a clean root");
    bootstrap(
        Suite::Trixie,
        &["criu", "iptables", "openssl", "systemd"],
        &clean,
    )?;
    let dir = clean.join("packages");
    fs::create_dir_all(&dir)?;
    for package in packages {
        let name = package.file_name().context("a package without a name")?;
        fs::copy(package, dir.join(name)).with_context(|| package.display().to_string())?;
    }
    if let Some(from) = static_dir {
        let to = dir.join("static");
        fs::create_dir_all(&to)?;
        let from = from.join("pageferry");
        fs::copy(&from, to.join("pageferry")).with_context(|| from.display().to_string())?;
    }
    fs::write(dir.join("try.sh"), SCRIPT)?;
    let began = Instant::now();
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--pid",
            "--net",
            "--fork",
            "--kill-child",
            "--propagation=private",
        ])
        .args(["sh", "-ec", ENTER, "enter"])
        .arg(&clean);
    run(&mut command)?;
    println!(
        "installed and used in {:.1} s; the root is {}",
        began.elapsed().as_secs_f64(),
        clean.display()
    );
    Ok(())
}

/// Makes the directory the root of this mount namespace: CRIU wants one that is a mount.
const ENTER: &str = r#"
ip link set lo up
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs sys sys
mount --rbind /dev dev
mount -t tmpfs tmp tmp
mkdir -p old
pivot_root . old
umount -l /old
exec /bin/sh -e /packages/try.sh
"#;
