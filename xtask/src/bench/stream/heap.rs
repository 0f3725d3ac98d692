//! Programs whose memory is a heap of objects, as an interpreter and as a virtual machine lay it out.
//!
//! ```text
//!   bench                      program COUNT SHARE DIRECTORY
//!     | <-- file ready-0 ------- COUNT entries are there
//!     | --- SIGUSR1 -----------> makes a SHARE of them anew
//!     | <-- file ready-1 -------
//! ```
//!
//! Both keep the same: per entry a map with a number, a name of six words out of eleven, a random
//! floating-point number and a random number below 2^40. Neither has a file open while it waits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use testbed::net::NetNs;
use testbed::process::{Spawned, run};
use testbed::wait::{self, GENEROUS};

use super::in_session;

/// What an entry of the Python program takes, roughly.
const PYTHON_ENTRY_BYTES: u64 = 560;
/// What an entry of the Java program takes, roughly: with references of 32 bits, as JVMs have them in
/// heaps below 32 GiB.
const JAVA_ENTRY_BYTES: u64 = 410;

/// A heap of objects as programs have them. Writes its `ready-N` files by renaming: CRIU finds no
/// file open.
const PYTHON_HEAP: &str = r#"
import gc, os, random, signal, sys
count, changed, directory = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
random.seed(5)
words = "process memory page old then written between another session request answer".split()
def entry(number):
    return {"id": number, "name": " ".join(random.choices(words, k=6)) + str(number),
            "price": random.random(), "stock": random.randrange(1 << 40)}
heap = [entry(number) for number in range(count)]
gc.disable()
rounds = 0
while True:
    path = os.path.join(directory, "ready-%d" % rounds)
    os.close(os.open(path + ".new", os.O_CREAT | os.O_WRONLY))
    os.rename(path + ".new", path)
    signal.sigwait({signal.SIGUSR1})
    for number in random.sample(range(count), int(count * changed)):
        heap[number] = entry(number)
    rounds += 1
"#;

/// The same for a JVM.
const JAVA_HEAP: &str = include_str!("Heap.java");

/// What a JVM is told, besides the size of its heap.
const JVM_FLAGS: [&str; 4] = [
    // Would be a file in /tmp that is mapped shared and written to all the time.
    "-XX:-UsePerfData",
    // Classes come into the process's own memory instead of a mapped archive of the installation.
    "-Xshare:off",
    // One collector without threads of its own, whose generations stay where they are.
    "-XX:+UseSerialGC",
    // An end is noticed; an exception in a thread of the JVM's own is not.
    "-XX:+ExitOnOutOfMemoryError",
];

/// A program that waits for its heap to be changed.
pub(super) struct Heap {
    program: Spawned,
    dir: PathBuf,
    rounds: u32,
}

impl Heap {
    /// A Python with about `mib` MiB, of which each change makes `percent` anew.
    pub(super) fn python(mib: u32, percent: u32, dir: &Path, net: Option<&NetNs>) -> Result<Heap> {
        let script = dir.join("heap.py");
        fs::write(&script, PYTHON_HEAP)?;
        let mut command = in_session(net, Path::new("python3"));
        command.arg(&script);
        let entries = entries(mib, PYTHON_ENTRY_BYTES);
        Heap::start("python3", command, entries, percent, dir)
    }

    /// A JVM with a heap of `mib` MiB, of which each change makes `percent` of the entries anew. Half
    /// of it are entries: the rest is what a collector needs, mostly garbage of the young generation.
    pub(super) fn java(mib: u32, percent: u32, dir: &Path, net: Option<&NetNs>) -> Result<Heap> {
        let source = dir.join("Heap.java");
        fs::write(&source, JAVA_HEAP)?;
        let mut compiler = Command::new("javac");
        compiler.args(["-proc:none", "-d"]).arg(dir).arg(&source);
        run(without_options(&mut compiler)).context("compiling the Java program")?;
        let mut command = in_session(net, Path::new("java"));
        without_options(&mut command)
            .args(JVM_FLAGS)
            .args([format!("-Xms{mib}m"), format!("-Xmx{mib}m")])
            .arg("-cp")
            .arg(dir)
            .arg("Heap");
        let entries = entries(mib, JAVA_ENTRY_BYTES) / 2;
        Heap::start("java", command, entries, percent, dir)
    }

    /// Starts `command`, which lacks the operands that all programs take, and waits for its heap.
    fn start(
        name: &str,
        mut command: Command,
        entries: u64,
        percent: u32,
        dir: &Path,
    ) -> Result<Heap> {
        command
            .args([entries.to_string(), format!("0.{percent:02}")])
            .arg(dir);
        let mut heap = Heap {
            program: Spawned::start_ungrouped(name, &mut command, None)?,
            dir: dir.to_owned(),
            rounds: 0,
        };
        heap.wait()?;
        Ok(heap)
    }

    pub(super) fn pid(&self) -> Pid {
        self.program.pid()
    }

    /// Makes a part of the entries anew.
    pub(super) fn change(&mut self) -> Result<()> {
        self.program.signal(Signal::SIGUSR1)?;
        self.rounds += 1;
        self.wait()
    }

    fn wait(&mut self) -> Result<()> {
        let ready = self.dir.join(format!("ready-{}", self.rounds));
        let program = &mut self.program;
        let what = format!("the heap of {}", program.name());
        wait::until(&what, GENEROUS, || {
            ensure!(program.ended()?.is_none(), "{} has ended", program.name());
            Ok(ready.exists().then_some(()))
        })
    }
}

/// How many entries of so many bytes `mib` MiB hold.
fn entries(mib: u32, entry_bytes: u64) -> u64 {
    (u64::from(mib) << 20) / entry_bytes
}

/// Keeps options away that the environment holds for all programs on a JVM.
fn without_options(command: &mut Command) -> &mut Command {
    command
        .env_remove("JAVA_TOOL_OPTIONS")
        .env_remove("JDK_JAVA_OPTIONS")
        .env_remove("JDK_JAVAC_OPTIONS")
}
