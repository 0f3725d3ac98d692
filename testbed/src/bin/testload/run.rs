//! The main loop: count, dirty pages, carry out commands.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{alarm, getpid};
use testbed::exchange;
use testbed::load::content::mix;
use testbed::load::page_words;
use testbed::load::report::{Report, StepReport};
use testbed::load::spec::{LoadSpec, Mapping, OnLostPage};
use testbed::load::steps::{Command, Order, Pass, Step, command_file};
use testbed::sys;

use crate::fork::{fork_and_verify, fork_often, grow_tree, leave_zombies, write_json};
use crate::memory::{Memory, to_u32};
use crate::pass::{verify, visits};
use crate::probe::Probe;

/// How often the main loop turns: looks for a command, dirties its share of pages.
const TURN: Duration = Duration::from_millis(2);
/// How long bytes may take through the connection: a lost packet is sent again after a second or two.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(30);
/// How often an idle thread counts.
const THREAD_TURN: Duration = Duration::from_millis(10);

struct Process {
    spec: LoadSpec,
    process: u32,
    nonce: u64,
    counter: u64,
    threads: Vec<Arc<AtomicU64>>,
    memory: Memory,
    connection: Option<[TcpStream; 2]>,
    probe: Option<Probe>,
    dirty_pages_per_s: u32,
    dirty_cursor: u64,
    turned: Instant,
}

/// Sets everything up, says so in report 0, and serves commands until one of them says exit.
pub(crate) fn run(spec: LoadSpec) -> Result<()> {
    exchange::lead_session()?;
    if spec.areas.iter().any(|area| area.mapping == Mapping::SysV) {
        // Ids of segments begin with 0 in a new one.
        unshare(CloneFlags::CLONE_NEWIPC).context("a new IPC namespace")?;
    }
    let mut memory = Memory::new(&spec, page_words() * sys::WORD_BYTES)?;
    let process = grow_tree(&spec)?;
    alarm::set(spec.lifetime_s);
    memory.rewrite_after_fork(process);
    if process == 0 {
        leave_zombies(spec.zombies)?;
    }
    if spec.on_lost_page == OnLostPage::Count {
        sys::mark_lost_pages()?;
    }
    if spec.pin_own_memory {
        memory.pin_everything_else()?;
    }
    let threads = if process == 0 {
        start_threads(spec.threads)
    } else {
        Vec::new()
    };
    let connection = match process == 0 && spec.connected {
        true => Some(connection()?),
        false => None,
    };
    let probe = match spec.probed_at {
        Some(port) if process == 0 => Some(Probe::start(port)?),
        _ => None,
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let nonce = mix(u64::from(std::process::id()) ^ u64::from(now.subsec_nanos()));
    let mut process = Process {
        spec,
        process,
        nonce,
        counter: 0,
        threads,
        memory,
        connection,
        probe,
        dirty_pages_per_s: 0,
        dirty_cursor: 0,
        turned: Instant::now(),
    };
    process.report(0, Vec::new())?;
    process.serve()
}

fn start_threads(count: u32) -> Vec<Arc<AtomicU64>> {
    let start = |_| {
        let counter = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&counter);
        std::thread::spawn(move || {
            // Counted on the stack, told through the heap: both must survive.
            let mut turns = 0;
            loop {
                std::thread::sleep(THREAD_TURN);
                turns += 1;
                shared.store(turns, Ordering::Relaxed);
            }
        });
        counter
    };
    (0..count).map(start).collect()
}

/// Both ends of a connection over loopback.
fn connection() -> Result<[TcpStream; 2]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a connection")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    for end in [&near, &far] {
        end.set_read_timeout(Some(CONNECTION_PATIENCE))?;
    }
    Ok([near, far])
}

/// Reads a command and removes its file; `None` if there is no such file.
fn take(path: &Path) -> Result<Option<Command>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("command"),
    };
    fs::remove_file(path)?;
    Ok(Some(serde_json::from_slice(&bytes).context("command")?))
}

impl Process {
    fn serve(&mut self) -> Result<()> {
        loop {
            std::thread::sleep(TURN);
            self.counter += 1;
            self.dirty_a_share();
            // Looked up anew each time: a restored process is in another namespace than it was.
            let namespace = fs::read_link("/proc/self/ns/pid")?;
            for namespace in [None, Some(namespace.as_path())] {
                let file = command_file(self.process, namespace);
                if let Some(command) = take(&self.spec.dir.join(file))? {
                    self.pass_bytes().context("the connection")?;
                    let carry_out = |step: &Step| self.carry_out(*step);
                    let steps = command.steps.iter().map(carry_out).collect();
                    self.report(command.seq, steps)?;
                }
            }
        }
    }

    /// Passes bytes through the connection, both ways.
    fn pass_bytes(&self) -> Result<()> {
        let Some([near, far]) = &self.connection else {
            return Ok(());
        };
        for (mut from, mut to) in [(near, far), (far, near)] {
            let (sent, mut heard) = (self.counter.to_le_bytes(), [0; 8]);
            from.write_all(&sent)?;
            to.read_exact(&mut heard)?;
            ensure!(heard == sent, "{heard:?} came instead of {sent:?}");
        }
        Ok(())
    }

    fn report(&self, seq: u64, steps: Vec<StepReport>) -> Result<()> {
        let path = self
            .spec
            .dir
            .join(format!("report-{}-{seq}.json", self.process));
        let report = Report {
            seq,
            process: self.process,
            pid: u32::try_from(getpid().as_raw())?,
            nonce: self.nonce,
            counter: self.counter,
            longest_pause_us: self.probe.as_ref().map_or(0, Probe::take),
            thread_counters: self
                .threads
                .iter()
                .map(|n| n.load(Ordering::Relaxed))
                .collect(),
            steps,
        };
        write_json(&path, &report)
    }

    fn carry_out(&mut self, step: Step) -> StepReport {
        let started = Instant::now();
        let mut report = self.try_step(step).unwrap_or_else(|error| StepReport {
            failure: Some(format!("{error:#}")),
            ..StepReport::default()
        });
        if report.step.is_empty() {
            report.step = format!("{step:?}");
        }
        if report.wall_us == 0 {
            report.wall_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        }
        report
    }

    fn try_step(&mut self, step: Step) -> Result<StepReport> {
        match step {
            Step::Status => {}
            Step::Verify(pass) => return verify(&self.memory, pass),
            Step::Fork { depth, pass } => {
                return fork_and_verify(&self.memory, &self.spec, depth, pass);
            }
            Step::ForkOften {
                per_s,
                children,
                lifetime_ms,
            } => {
                let lifetime = Duration::from_millis(lifetime_ms.into());
                return fork_often(&self.memory, per_s, children, lifetime);
            }
            Step::Move(part) => self.memory.move_part(part)?,
            Step::Grow { area, pages } => self.memory.grow(area, pages)?,
            Step::Unmap { part, map_again } => self.memory.unmap(part, map_again)?,
            Step::Drop { part, advice } => self.memory.drop_content(part, advice)?,
            Step::Protect(part) => {
                self.memory.protect(part, false)?;
                let report = verify(&self.memory, Pass::full(Order::Ascending));
                self.memory.protect(part, true)?;
                return report;
            }
            Step::Write { every, order } => {
                let stride = (every as usize).max(1);
                for (area, index) in visits(&self.memory, order, 0).into_iter().step_by(stride) {
                    self.memory.rewrite(area, index);
                }
            }
            Step::Dirty { pages_per_s } => {
                self.dirty_pages_per_s = pages_per_s;
                self.turned = Instant::now();
            }
            Step::Exit { code } => sys::exit_now(code),
        }
        Ok(StepReport::default())
    }

    /// Rewrites as many pages as the set rate asks for since the last turn.
    fn dirty_a_share(&mut self) {
        let elapsed = self.turned.elapsed();
        let due = u128::from(self.dirty_pages_per_s) * elapsed.as_micros() / 1_000_000;
        if due == 0 {
            return;
        }
        self.turned = Instant::now();
        let areas = self.memory.areas.len() as u64;
        for _ in 0..due {
            self.dirty_cursor += 1;
            let draw = mix(self.dirty_cursor);
            let area = usize::try_from(draw % areas).expect("a remainder of a usize");
            let pages = self.memory.areas[area].cells.len() as u64;
            if pages > 0 {
                let index = u32::try_from((draw >> 16) % pages).expect("a remainder of a u32");
                self.memory.rewrite(to_u32(area), index);
            }
        }
    }
}
