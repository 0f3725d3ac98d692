//! A real systemd as the manager of services: a user's, in namespaces of its own.
//!
//! ```text
//!   mount and cgroup namespace
//!     /sys/fs/cgroup   the unified hierarchy, from a control group of the test's own on
//!     DIR/systemd/root a tmpfs: usr of the unpacked packages; /proc, /sys, /dev, the test directory and the binaries of the host
//!       chroot: systemd --user ── services
//! ```
//!
//! The PID and network namespaces are the host's: services see the test's processes, and it sees them. Invariants: no
//! file of the host is written outside the test directory; the control group goes with the guard, and all processes in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::criu::Suite;
use crate::debian::unpacked;
use crate::process::{Spawned, run};
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// Prepares the namespaces and becomes systemd. Words: the test directory's directory, `usr` to have, the directory of the binaries,
/// the control group's name. It begins in a mount namespace of its own.
const START: &str = r#"set -eu
work=$1/systemd usr=$2 binaries=$3 group=$4
mount --make-rprivate /
mkdir -p "$work/groups" "$work/root" "$work/units/systemd/user"
mount -t cgroup2 none "$work/groups"
mkdir "$work/groups/$group"
echo $$ > "$work/groups/$group/cgroup.procs"
exec unshare --cgroup sh -euc '
work=$1/systemd usr=$2 binaries=$3 root=$1/systemd/root
umount "$work/groups"
mount -t tmpfs none "$root"
mkdir "$root/usr" "$root/proc" "$root/sys" "$root/dev" "$root/etc" "$root/run" "$root/root" "$root/tmp"
mkdir -p "$root/run/systemd/system" "$root/run/user" "$root$1" "$root$binaries"
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done
echo "root:x:0:0:root:/root:/bin/sh" > "$root/etc/passwd"
mount --bind "$usr" "$root/usr"
for dir in proc dev sys; do mount --rbind "/$dir" "$root/$dir"; done
umount -R -l "$root/sys/fs/cgroup" || true
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount --bind "$1" "$root$1"
mount --bind "$binaries" "$root$binaries"
exec env -i PATH=/usr/bin:/usr/sbin HOME=/root XDG_RUNTIME_DIR=/run/user XDG_CONFIG_HOME="$work/units" \
    chroot "$root" /usr/lib/systemd/systemd --user --log-target=console --unit=basic.target
' sh "$@"
"#;

/// Ends all that is left in the control group, and removes it. Words: a directory, the control group's name.
const CLEAN: &str = r#"set -eu
mount --make-rprivate /
mount -t cgroup2 none "$1"
[ -d "$1/$2" ] || exit 0
echo 1 > "$1/$2/cgroup.kill"
for attempt in $(seq 500); do
    find "$1/$2" -depth -type d -exec rmdir {} + 2> /dev/null && exit 0
    sleep 0.01
done
exit 1
"#;

/// A running manager. Its services end with it.
#[derive(Debug)]
pub struct Systemd {
    manager: Spawned,
    work: PathBuf,
    group: String,
}

impl Systemd {
    /// The directory `usr` of a systemd, fetched unless it is here.
    ///
    /// # Errors
    /// No Debian archive, no network, or no such package.
    pub fn fetched() -> Result<PathBuf> {
        Ok(unpacked(Suite::Trixie, "systemd")?.join("usr"))
    }

    /// Starts that of `usr` in the directory `test_dir`, which services see under the same path, as they see the binaries of
    /// this workspace.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn start(usr: &Path, test_dir: &Path) -> Result<Systemd> {
        let binaries = workspace::binary("lazy-client")?;
        let binaries = binaries.parent().context("a directory of binaries")?;
        let work = test_dir.join("systemd");
        fs::create_dir_all(work.join("units/systemd/user"))?;
        let log = work.join("systemd.log");
        let group = test_dir.file_name().context("a name")?;
        // The directory's name is no other test's.
        let group = format!("{}-{}", group.display(), std::process::id());
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", START, "sh"])
            .args([test_dir, usr, binaries])
            .arg(&group)
            .stdout(fs::File::create(&log)?)
            .stderr(fs::File::options().append(true).open(&log)?);
        let manager = Spawned::start("systemd", &mut command, Some(log))?;
        let mut systemd = Systemd {
            manager,
            work,
            group,
        };
        wait::until("systemd to come up", GENEROUS, || {
            let ended = systemd.manager.ended()?;
            ensure!(ended.is_none(), "systemd has ended: {ended:?}");
            Ok(systemd.control(&["is-active", "basic.target"]).ok())
        })
        .with_context(|| systemd.manager.log_tail())?;
        Ok(systemd)
    }

    /// Writes the unit `name`.
    ///
    /// # Errors
    /// The file cannot be written, or systemd does not read it.
    pub fn write_unit(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.work.join("units/systemd/user").join(name), text)?;
        self.control(&["daemon-reload"]).map(drop)
    }

    /// Runs `systemctl` with these words, and returns what it says.
    ///
    /// # Errors
    /// It fails; the error tells what it says.
    pub fn control(&self, words: &[&str]) -> Result<String> {
        let pid = self.manager.pid().to_string();
        let mut command = Command::new("nsenter");
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("XDG_RUNTIME_DIR", "/run/user")
            .args(["--target", &pid, "--mount", "--root", "--wd=/"])
            .args(["/usr/bin/systemctl", "--user", "--no-pager"])
            .args(words);
        let output = run(&mut command)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A property of a unit.
    ///
    /// # Errors
    /// systemctl fails.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.control(&["show", "--value", "--property", name, unit])
    }

    /// Waits until a property of a unit has a value.
    ///
    /// # Errors
    /// It keeps others; the error tells the unit's state.
    pub fn wait_for(&self, unit: &str, name: &str, value: &str) -> Result<()> {
        let waited = wait::until(&format!("{name}={value} of {unit}"), GENEROUS, || {
            Ok((self.property(unit, name)? == value).then_some(()))
        });
        waited.with_context(|| {
            let words = "ActiveState,SubState,Result,NRestarts,ExecMainStatus,NFileDescriptorStore";
            let state = self.control(&["show", "--property", words, unit]);
            format!("{state:?}{}", self.manager.log_tail())
        })
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if let Err(error) = self.manager.kill() {
            eprintln!("ending systemd: {error:#}");
        }
        let mut clean = Command::new("unshare");
        clean
            .args(["--mount", "sh", "-c", CLEAN, "sh"])
            .arg(self.work.join("groups"))
            .arg(&self.group);
        if let Err(error) = run(&mut clean) {
            eprintln!("removing the control group of systemd: {error:#}");
        }
    }
}
