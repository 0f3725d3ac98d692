//! Hosts on which container runtimes run: a Debian system with runc, crun and podman is the root directory, and
//! network, processes, control groups and `/etc` are the host's own.
//!
//! ```text
//!   /root                       home: a directory of the test's, by the side's name, where scripts begin
//!   /shared                      the test's directory, with the homes of both sides
//!   /usr/local/bin              page-server, lazy-client, pageferry
//!   /usr/local/lib/pageferry    `criu`, a link to pageferry, which stands before the real one
//!   /criu                       the directory of the real `criu`, in PATH
//! ```

mod group;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;

use crate::criu::Criu;
use crate::net::Host;
use crate::process::{Spawned, descendants, tail};
use crate::wait::{self, GENEROUS};
use crate::workspace::binary;
use group::ControlGroups;

const ENTER: &str = include_str!("enter.sh");

/// Where commands are looked for.
const PATH: &str = "/shared/tools:/usr/local/bin:/criu:/usr/sbin:/usr/bin";

/// Shows what CRIU and the daemons have logged, where podman keeps it.
const SHOW_LOGS: &str = "find /var/lib/containers /run -name '*.log' -size +0 -exec tail -v -n 25 {} + 2>/dev/null || true";

/// A host. Its processes end with it.
#[derive(Debug)]
pub struct ContainerHost {
    // Ended before its groups are removed.
    init: Spawned,
    pid: Pid,
    groups: ControlGroups,
    home: PathBuf,
    log: PathBuf,
    variables: BTreeMap<String, String>,
}

impl ContainerHost {
    /// A host in the network of `host`, with the system in `system` and the home directory `side` in `shared`.
    ///
    /// # Errors
    /// Not root, or the kernel lacks overlayfs or control groups of version 2.
    pub fn start(
        host: &Host,
        system: &Path,
        shared: &Path,
        side: &str,
        criu: &Criu,
    ) -> Result<ContainerHost> {
        let groups = ControlGroups::new(&format!("pageferry-{}", host.net.name()))?;
        let home = shared.join(side);
        let private = shared.join(format!("{side}-private"));
        fs::create_dir_all(&home)?;
        fs::create_dir_all(&private)?;
        let binaries = binary("page-server")?;
        let log = shared.join(format!("{side}.log"));
        let output = File::create(&log)?;
        let mut command = joining(&groups, &["nsenter"]);
        command.arg(format!("--net=/run/netns/{}", host.net.name()));
        command.args(["unshare", "--mount", "--pid", "--ipc", "--uts", "--cgroup"]);
        command.args(["--fork", "--kill-child", "bash", "-c", ENTER]);
        command
            .env("SYSTEM", system)
            .env("SHARED", shared)
            .env("PRIVATE", private)
            .env("HOME", &home)
            .env("SIDE", side)
            .env("CRIU", criu.path.parent().context("CRIU's directory")?)
            .env(
                "BINARIES",
                binaries.parent().context("the binaries' directory")?,
            )
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut init = Spawned::start("a host", &mut command, Some(log.clone()))?;
        let pid = wait::until("the host's first process", GENEROUS, || {
            ensure!(init.ended()?.is_none(), "the host: {}", init.log_tail());
            Ok(descendants(init.pid()).into_iter().find(|pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm"));
                name.is_ok_and(|name| name.trim() == "nsinit")
            }))
        })?;
        Ok(ContainerHost {
            init,
            pid,
            groups,
            home,
            log,
            variables: BTreeMap::new(),
        })
    }

    /// Its home directory, as the test sees it.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Sets a variable for all commands that follow.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    /// A command that runs on the host, with an empty environment but for PATH, HOME and the variables that are set.
    pub fn command(&self, words: &[&str]) -> Command {
        let target = self.pid.to_string();
        let mut enter = vec!["nsenter", "--target", &target];
        enter.extend(["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"]);
        enter.extend(["--wdns=/root", "--"]);
        enter.extend(words);
        let mut command = joining(&self.groups, &enter);
        command
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/root")
            .envs(&self.variables);
        command
    }

    /// Runs a script of a shell's in the home directory; the first command that fails is an error, which shows the
    /// logs. What the script starts in the background may go on.
    ///
    /// # Errors
    /// It fails, or does not end within a generous time.
    pub fn script(&self, script: &str) -> Result<()> {
        let output = File::options().append(true).create(true).open(&self.log)?;
        let mut command = self.command(&["bash", "-e", "-c", script]);
        command.stdout(output.try_clone()?).stderr(output);
        let mut shell = Spawned::start("the commands", &mut command, Some(self.log.clone()))?;
        let status = shell.wait(GENEROUS).map(|ended| ended.status);
        if status.as_ref().is_ok_and(ExitStatus::success) {
            return Ok(());
        }
        drop(shell);
        let logs = self.output(SHOW_LOGS).unwrap_or_default();
        bail!("{status:?}\n{script}\n{}{logs}", tail(&self.log))
    }

    /// What a script prints.
    ///
    /// # Errors
    /// It fails; the error shows what it said.
    pub fn output(&self, script: &str) -> Result<String> {
        let mut command = self.command(&["bash", "-e", "-c", script]);
        let output = command.stdin(Stdio::null()).output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{}\n{script}\n{stdout}\n{complained}",
            output.status
        );
        Ok(stdout)
    }
}

impl Drop for ContainerHost {
    fn drop(&mut self) {
        // Ends process 1, and with it all others.
        if let Err(error) = self.init.kill() {
            eprintln!("ending the host of {}: {error:#}", self.home.display());
        }
    }
}

/// A command that joins the groups before it becomes `words`.
fn joining(groups: &ControlGroups, words: &[&str]) -> Command {
    let join = groups
        .joined_by()
        .map(|file| format!("echo $$ > '{}' && ", file.display()));
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(join.collect::<String>() + "exec \"$@\"")
        .arg("sh")
        .args(words);
    command
}
