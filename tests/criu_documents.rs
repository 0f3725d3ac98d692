//! Every command block of README.md and docs/ is run as it stands, in order, with a real CRIU.
//!
//! A block of commands is fenced as `sh`. It is run on one of two hosts, each with a network, processes and a
//! directory of its own: on the source, until a comment `# on the destination` (or `# on the source`) says
//! otherwise. `$PID` is a process at the source, `$SOURCE` and `$DESTINATION` are the hosts' addresses. Each section
//! (heading) begins with fresh hosts and empty directories. `scp` between them is played by a small script.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use testbed::bed::Bed;
use testbed::criu::{Criu, Suite};
use testbed::net::{Host, TwoHosts};
use testbed::process::{Spawned, descendants};
use testbed::suite::with_criu;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::{binary, root};

/// Blocks that are not run, by a word of theirs, and why.
const NOT_RUN: &[(&str, &str)] = &[
    (
        "cargo xtask",
        "it builds and runs for minutes, this test among others",
    ),
    ("cargo build", "it builds for minutes"),
    (
        "runc ",
        "it needs a container, and is run by runc_checkpoint",
    ),
    (
        "podman ",
        "podman is not among the packages that tests fetch",
    ),
    ("crun ", "crun is not among the packages that tests fetch"),
    ("systemctl ", "it needs systemd"),
    ("apt-get ", "it changes the machine"),
    (
        "--tls ",
        "the certificates are the reader's own; criu_tls runs it with others",
    ),
];

/// Programs whose lines are commands: an unmarked block that begins with one has escaped the test.
const PROGRAMS: &[&str] = &[
    "criu ",
    "page-server ",
    "lazy-client ",
    "pageferry ",
    "cargo ",
    "runc ",
    "podman ",
    "crun ",
    "sudo ",
];

/// The first pid of the process that moves: nobody has it at the destination.
const FIRST_PID: u32 = 20_000;

/// A fenced block.
struct Block {
    /// Where it is, for messages.
    place: String,
    /// The number of its section in the document.
    section: usize,
    language: String,
    text: String,
}

#[test]
fn command_blocks_run_as_they_stand() {
    with_criu(Suite::Experimental, |bed, criu| {
        let (mut run, mut skipped) = (0, 0);
        for document in documents()? {
            let mut sections: BTreeMap<usize, Vec<Block>> = BTreeMap::new();
            for block in blocks(&document)? {
                if block.language != "sh" {
                    let first = block.text.lines().next().unwrap_or_default();
                    let escaped = PROGRAMS.iter().any(|program| first.starts_with(program));
                    ensure!(
                        !escaped,
                        "{}: commands that are not marked as sh",
                        block.place
                    );
                    continue;
                }
                match NOT_RUN.iter().find(|(word, _)| block.text.contains(word)) {
                    Some((_, why)) => {
                        skipped += 1;
                        println!("not run: {}: {why}", block.place);
                    }
                    None => sections.entry(block.section).or_default().push(block),
                }
            }
            for (number, blocks) in sections {
                let name = document.file_stem().unwrap_or_default().to_string_lossy();
                let stage = Stage::new(bed, criu, &format!("{name}-{number}"))?;
                let restores = blocks
                    .iter()
                    .any(|block| block.text.contains("criu restore"));
                for block in blocks {
                    println!("running {}", block.place);
                    stage.run(&block).with_context(|| block.place.clone())?;
                    run += 1;
                }
                if restores {
                    let arrived = stage.script(1, "kill -0 $PID");
                    arrived.with_context(|| {
                        format!("section {number}: the process has not arrived")
                    })?;
                }
            }
        }
        println!("{run} blocks were run, {skipped} were not");
        ensure!(run >= 5, "only {run} blocks were found");
        Ok(())
    });
}

/// README.md and all documents below docs/.
fn documents() -> Result<Vec<PathBuf>> {
    let mut found = vec![root().join("README.md")];
    let mut dirs = vec![root().join("docs")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn blocks(document: &Path) -> Result<Vec<Block>> {
    let text = fs::read_to_string(document)?;
    let name = document.strip_prefix(root()).unwrap_or(document).display();
    let (mut blocks, mut open, mut section) = (Vec::new(), None::<Block>, 0);
    for (line, number) in text.lines().zip(1..) {
        match (&mut open, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => {
                open = Some(Block {
                    place: format!("{name}:{number}"),
                    section,
                    language: language.trim().to_owned(),
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => section += usize::from(line.starts_with('#')),
        }
    }
    Ok(blocks)
}

/// One of the two hosts.
struct Machine {
    dir: PathBuf,
    /// Process 1 of its namespace; all others end with it.
    init: Spawned,
    pid: Pid,
}

/// The two hosts of a section.
struct Stage {
    // Ended before their networks go.
    machines: [Machine; 2],
    hosts: TwoHosts,
    path: String,
    process: String,
}

impl Stage {
    fn new(bed: &Bed, criu: &Criu, name: &str) -> Result<Stage> {
        let hosts = TwoHosts::new(None)?;
        let dir = bed.path(name);
        let tools = dir.join("tools");
        fs::create_dir_all(&tools)?;
        write_scp(&tools, &dir)?;
        let machines = [
            Machine::start(&hosts.source, dir.join("source"))?,
            Machine::start(&hosts.destination, dir.join("destination"))?,
        ];
        let binaries = binary("page-server")?;
        let binaries = binaries
            .parent()
            .context("the binaries' directory")?
            .to_owned();
        let criu = criu.path.parent().context("CRIU's directory")?;
        let dirs = [tools.as_path(), &binaries, criu];
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        let path = format!("{}:{}", dirs.join(":"), std::env::var("PATH")?);
        let mut stage = Stage {
            machines,
            hosts,
            path,
            process: String::new(),
        };
        stage.process = stage.start_process()?;
        Ok(stage)
    }

    /// Starts the process that moves, with no file open; returns its pid there.
    fn start_process(&self) -> Result<String> {
        let script = format!(
            "echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid\n\
             for fd in $(ls /proc/$$/fd); do [ $fd -lt 3 ] || eval \"exec $fd<&-\"; done\n\
             setsid sleep 100000 <&- >&- 2>&- &\n\
             echo $! > pid\n"
        );
        self.script(0, &script)?;
        let pid = fs::read_to_string(self.machines[0].dir.join("pid"))?;
        fs::remove_file(self.machines[0].dir.join("pid"))?;
        Ok(pid.trim().to_owned())
    }

    fn run(&self, block: &Block) -> Result<()> {
        let (mut at, mut script) = (0, String::new());
        for line in block.text.lines() {
            let next = match line.trim() {
                comment if comment.starts_with("# on the source") => 0,
                comment if comment.starts_with("# on the destination") => 1,
                _ => at,
            };
            if next != at {
                self.script(at, &std::mem::take(&mut script))?;
                at = next;
            }
            script.push_str(line);
            script.push('\n');
        }
        self.script(at, &script)
    }

    /// Runs commands on a host; the first that fails is an error.
    fn script(&self, at: usize, script: &str) -> Result<()> {
        if script.trim().is_empty() {
            return Ok(());
        }
        let machine = &self.machines[at];
        let log = machine.dir.with_extension("log");
        let output = fs::File::options().append(true).create(true).open(&log)?;
        let mut command = Command::new("nsenter");
        command
            .args(["--mount", "--pid", "--net", "--target"])
            .arg(machine.pid.to_string())
            .args(["--", "bash", "-e", "-c"])
            .arg(format!("cd {}\n{script}", machine.dir.display()))
            .env("PATH", &self.path)
            .env("PID", &self.process)
            .env("SOURCE", self.hosts.source.address.to_string())
            .env("DESTINATION", self.hosts.destination.address.to_string())
            .stdout(output.try_clone()?)
            .stderr(output)
            .stdin(Stdio::null());
        let mut shell = Spawned::start("the commands", &mut command, Some(log.clone()))?;
        let ended = shell.wait(GENEROUS)?;
        if !ended.status.success() {
            bail!("{}\n{script}\n{}", ended.status, fs::read_to_string(&log)?);
        }
        Ok(())
    }
}

impl Machine {
    fn start(host: &Host, dir: PathBuf) -> Result<Machine> {
        fs::create_dir_all(&dir)?;
        let mut command = host.net.command("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"])
            .arg(binary("nsinit")?)
            .arg("--record")
            .arg(dir.with_extension("ends"))
            .args(["sleep", "100000"])
            .current_dir(&dir);
        let init = Spawned::start("a host", &mut command, None)?;
        let pid = wait::until("the host's first process", GENEROUS, || {
            Ok(descendants(init.pid()).into_iter().find(|pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm"));
                name.is_ok_and(|name| name.trim() == "nsinit")
            }))
        })?;
        Ok(Machine { dir, init, pid })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Ends unshare, and with it the host's first process and all others.
        if let Err(error) = self.init.kill() {
            eprintln!("ending the host of {}: {error:#}", self.dir.display());
        }
    }
}

/// Writes an `scp` that copies from one host's directory to the other's.
fn write_scp(tools: &Path, stage: &Path) -> Result<()> {
    let path = tools.join("scp");
    let stage = stage.display();
    // The last word is HOST:PATH, all others are options and what is copied.
    let script = format!(
        "#!/bin/sh -e\nfor last; do :; done\n[ \"${{last%%:*}}\" = \"$DESTINATION\" ]\n\
         while [ $# -gt 1 ]; do case $1 in -*) ;; *) cp -a \"$1\" \"{stage}/destination/${{last#*:}}\";; esac; shift; done\n"
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
