//! What is dumped: processes with memory of a known kind, of which a known part changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::Serialize;
use testbed::criu::Suite;
use testbed::debian;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Step};
use testbed::load::{Load, page_words};
use testbed::net::{NetNs, command_in};
use testbed::process::{Spawned, run};
use testbed::sys::WORD_BYTES;
use testbed::wait::{self, GENEROUS};

/// Bytes of each value that redis-benchmark sets.
const REDIS_VALUE_BYTES: u32 = 100;
/// What a key with such a value takes of Redis' memory, roughly.
const REDIS_KEY_BYTES: u64 = 230;
/// What an entry of the Python program takes, roughly.
const PYTHON_ENTRY_BYTES: u64 = 560;

/// A heap of objects as programs have them. Writes its `ready-N` files by renaming: CRIU finds no
/// file open. After each SIGUSR1 it changes a part of its entries, the n-th `ready` tells that.
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

/// Kinds of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Memory {
    /// Pages of text, of noise, of one word, and zero pages.
    Mixed,
    /// Pages that cannot be compressed.
    Random,
    /// Pages of zeros, and what is needed to make them.
    Zero,
    /// A Redis, filled and changed by redis-benchmark.
    Redis,
    /// A Python process with a large heap.
    Python,
}

impl Memory {
    pub(super) const ALL: [Memory; 5] = [
        Memory::Mixed,
        Memory::Random,
        Memory::Zero,
        Memory::Redis,
        Memory::Python,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Memory::Mixed => "mixed pages",
            Memory::Random => "random pages",
            Memory::Zero => "zero pages",
            Memory::Redis => "Redis",
            Memory::Python => "Python heap",
        }
    }

    /// What changes between two rounds, as its program counts.
    pub(super) fn counts(self) -> &'static str {
        match self {
            Memory::Mixed | Memory::Random | Memory::Zero => "pages",
            Memory::Redis => "keys",
            Memory::Python => "entries",
        }
    }
}

/// A running process.
pub(super) enum Subject {
    /// `testload`: every `every`th page gets new contents.
    Load { load: Load, every: u32 },
    /// redis-server.
    Redis {
        server: Spawned,
        keys: u64,
        changed: u64,
        benchmark: PathBuf,
        socket: PathBuf,
    },
    /// The program above.
    Python {
        program: Spawned,
        dir: PathBuf,
        rounds: u32,
    },
}

impl Subject {
    /// Starts one with about `mib` MiB of `memory`, of which each round changes `percent`.
    pub(super) fn start(
        memory: Memory,
        mib: u32,
        percent: u32,
        dir: &Path,
        net: Option<&NetNs>,
    ) -> Result<Subject> {
        fs::create_dir_all(dir)?;
        let content = match memory {
            Memory::Mixed => Content::Mixed,
            Memory::Random => Content::Random,
            Memory::Zero => Content::Zero,
            Memory::Redis => return Subject::redis(mib, percent, dir, net),
            Memory::Python => return Subject::python(mib, percent, dir, net),
        };
        let page_bytes = u32::try_from(page_words() * WORD_BYTES)?;
        let pages = mib * ((1 << 20) / page_bytes);
        let area = AreaSpec::new(Mapping::Private, pages, content);
        Ok(Subject::Load {
            load: Load::start(LoadSpec::new(dir, vec![area]), net)?,
            every: 100 / percent,
        })
    }

    fn redis(mib: u32, percent: u32, dir: &Path, net: Option<&NetNs>) -> Result<Subject> {
        let server = debian::program(Suite::Trixie, "redis-server", "bin/redis-server")?;
        let benchmark = debian::program(Suite::Trixie, "redis-server", "bin/redis-benchmark")?;
        let socket = dir.join("redis.sock");
        let mut command = in_session(net, &server);
        command
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket);
        let mut server = Spawned::start_ungrouped("redis-server", &mut command, None)?;
        wait::until("Redis", GENEROUS, || {
            ensure!(server.ended()?.is_none(), "redis-server has ended");
            Ok(socket.exists().then_some(()))
        })?;
        let keys = (u64::from(mib) << 20) / REDIS_KEY_BYTES;
        fill_redis(&benchmark, &socket, keys * 2, keys)?;
        Ok(Subject::Redis {
            server,
            keys,
            changed: keys * u64::from(percent) / 100,
            benchmark,
            socket,
        })
    }

    fn python(mib: u32, percent: u32, dir: &Path, net: Option<&NetNs>) -> Result<Subject> {
        let script = dir.join("heap.py");
        fs::write(&script, PYTHON_HEAP)?;
        let entries = (u64::from(mib) << 20) / PYTHON_ENTRY_BYTES;
        let mut command = in_session(net, Path::new("python3"));
        command
            .arg(&script)
            .args([entries.to_string(), format!("0.{percent:02}")])
            .arg(dir);
        let program = Spawned::start_ungrouped("python3", &mut command, None)?;
        let mut subject = Subject::Python {
            program,
            dir: dir.to_owned(),
            rounds: 0,
        };
        subject.wait_for_python()?;
        Ok(subject)
    }

    pub(super) fn pid(&self) -> Pid {
        match self {
            Subject::Load { load, .. } => load.pid(),
            Subject::Redis { server, .. } => server.pid(),
            Subject::Python { program, .. } => program.pid(),
        }
    }

    /// Changes what changes between two rounds.
    pub(super) fn change(&mut self) -> Result<()> {
        match self {
            Subject::Load { load, every } => {
                let write = Step::Write {
                    every: *every,
                    order: Order::Random,
                };
                load.run(0, &[write]).map(drop)
            }
            Subject::Redis {
                keys,
                changed,
                benchmark,
                socket,
                ..
            } => fill_redis(benchmark, socket, *changed, *keys),
            Subject::Python {
                program, rounds, ..
            } => {
                program.signal(Signal::SIGUSR1)?;
                *rounds += 1;
                self.wait_for_python()
            }
        }
    }

    fn wait_for_python(&mut self) -> Result<()> {
        let Subject::Python {
            program,
            dir,
            rounds,
        } = self
        else {
            return Ok(());
        };
        let ready = dir.join(format!("ready-{rounds}"));
        wait::until("the Python program", GENEROUS, || {
            ensure!(program.ended()?.is_none(), "the Python program has ended");
            Ok(ready.exists().then_some(()))
        })
    }
}

/// A command in a session of its own and without open files: as CRIU wants it.
fn in_session(net: Option<&NetNs>, program: &Path) -> Command {
    let mut command = command_in(net, "setsid");
    command
        .arg(program)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Sets `requests` random keys out of `keys`.
fn fill_redis(benchmark: &Path, socket: &Path, requests: u64, keys: u64) -> Result<()> {
    let mut command = Command::new(benchmark);
    command
        .arg("-s")
        .arg(socket)
        .args(["-t", "set", "-P", "64"]);
    command.args(["-d", &REDIS_VALUE_BYTES.to_string()]);
    command.args(["-n", &requests.max(1).to_string()]);
    command.args(["-r", &keys.to_string(), "-q"]);
    run(&mut command).map(drop).context("filling Redis")
}
