//! What is dumped: processes with memory of a known kind, of which a known part changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::unistd::Pid;
use serde::Serialize;
use testbed::criu::Suite;
use testbed::debian;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Step};
use testbed::load::{Load, page_words};
use testbed::net::NetNs;
use testbed::process::{Spawned, run};
use testbed::sys::WORD_BYTES;
use testbed::wait::{self, GENEROUS};

use super::heap::Heap;
use super::in_session;

/// Bytes of each value that redis-benchmark sets.
const REDIS_VALUE_BYTES: u32 = 100;
/// What a key with such a value takes of Redis' memory, roughly.
const REDIS_KEY_BYTES: u64 = 230;

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
    /// A Python process with a heap of maps of strings and numbers.
    Python,
    /// A JVM, half of whose heap is such maps; left out where no JDK can be installed.
    Jvm,
}

impl Memory {
    pub(super) const ALL: [Memory; 6] = [
        Memory::Mixed,
        Memory::Random,
        Memory::Zero,
        Memory::Redis,
        Memory::Python,
        Memory::Jvm,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Memory::Mixed => "mixed pages",
            Memory::Random => "random pages",
            Memory::Zero => "zero pages",
            Memory::Redis => "Redis",
            Memory::Python => "Python heap",
            Memory::Jvm => "JVM heap",
        }
    }

    /// What changes between two rounds, as its program counts.
    pub(super) fn counts(self) -> &'static str {
        match self {
            Memory::Mixed | Memory::Random | Memory::Zero => "pages",
            Memory::Redis => "keys",
            Memory::Python | Memory::Jvm => "entries",
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
    /// A Python or a JVM.
    Heap(Heap),
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
            Memory::Python => return Heap::python(mib, percent, dir, net).map(Subject::Heap),
            Memory::Jvm => return Heap::java(mib, percent, dir, net).map(Subject::Heap),
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

    pub(super) fn pid(&self) -> Pid {
        match self {
            Subject::Load { load, .. } => load.pid(),
            Subject::Redis { server, .. } => server.pid(),
            Subject::Heap(heap) => heap.pid(),
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
            Subject::Heap(heap) => heap.change(),
        }
    }
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
