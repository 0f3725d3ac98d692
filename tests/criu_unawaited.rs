//! What the kernel reads of a process's memory without asking a userfaultfd: it must be there before.
//!
//! A restored process that holds a robust lock is killed before it has touched the page with its list of locks.
//! Without that page the kernel tells nobody that the lock's owner has died, and others wait for ever.
//!
//! The command line and the environment of a restored process are looked at from outside, in /proc. While their pages
//! are missing the kernel shows nothing there.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::exchange;
use testbed::for_each_criu;
use testbed::images::copy_without_lazy_pages;
use testbed::migration::{Dump, Restore, Restored};
use testbed::net::free_port;
use testbed::process::Spawned;
use testbed::test_dir::TestDir;
use testbed::wait;
use testbed::workspace;

const LIMIT: Duration = Duration::from_secs(60);

/// FUTEX_OWNER_DIED of linux/futex.h.
const OWNER_DIED: u32 = 0x4000_0000;

for_each_criu!(
    a_lock_is_given_up_by_its_owners_end,
    the_command_line_and_the_environment_are_shown,
);

/// Where the pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Local,
    PageServer,
    Dump,
}

fn a_lock_is_given_up_by_its_owners_end(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for source in [Source::Local, Source::PageServer, Source::Dump] {
        let dir = test_dir.path(&format!("{source:?}"));
        let word = end_while_pages_are_missing(criu, source, &dir)?;
        let told = word & OWNER_DIED != 0;
        ensure!(
            told,
            "{source:?}: the lock's word is {word:#x}: its owner's end was not told"
        );
    }
    Ok(())
}

fn the_command_line_and_the_environment_are_shown(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for source in [Source::Local, Source::PageServer, Source::Dump] {
        let dir = test_dir.path(&format!("{source:?}"));
        let moved = moved_on_demand(criu, source, &dir)?;
        let pids = moved.restored.pids().into_iter();
        let mut of_process = pids.filter_map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name.trim() == "robust").then_some(pid)
        });
        let pid = of_process.next().context("no restored process")?;
        let shown = |file| fs::read(format!("/proc/{pid}/{file}"));
        // Nothing else brings these pages: the process does not look at them, and only what faults comes.
        wait::until("the environment", LIMIT, || {
            let text = shown("environ")?;
            let whole = text.split(|byte| *byte != b'x').any(|xs| xs.len() >= LONG);
            Ok(whole.then_some(()))
        })
        .with_context(|| format!("{source:?}"))?;
        let command_line = shown("cmdline")?;
        let dir = moved.shared.to_string_lossy();
        let parts: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
        ensure!(
            parts.contains(&&b"--dir"[..]) && parts.contains(&dir.as_bytes()),
            "{source:?}: {:?}",
            String::from_utf8_lossy(&command_line)
        );
    }
    Ok(())
}

/// The lock's word after its restored owner was killed; nothing but what faults was brought.
fn end_while_pages_are_missing(criu: &Criu, source: Source, dir: &Path) -> Result<u32> {
    let moved = moved_on_demand(criu, source, dir)?;
    let (shared, pid) = (&moved.shared, moved.pid);
    // The end of the dumped process was an end as well.
    let lock = File::options().write(true).open(shared.join("lock"))?;
    lock.write_all_at(&pid.as_raw().to_le_bytes(), 0)?;
    fs::write(shared.join("go"), "")?;
    let how = moved
        .restored
        .wait_for_end(pid.as_raw().unsigned_abs(), LIMIT)?;
    ensure!(
        how.contains("SIGKILL"),
        "the restored process ended otherwise: {how}"
    );
    let word = fs::read(shared.join("lock"))?;
    let word: [u8; 4] = word.first_chunk().copied().context("an empty lock")?;
    Ok(u32::from_le_bytes(word))
}

/// Bytes of a variable of the environment: many pages, most of which nobody looks at.
const LONG: usize = 60_000;

/// A restored process whose pages come when it touches them.
struct Moved {
    restored: Restored,
    /// Its pid in its namespace, which it had before.
    pid: Pid,
    /// Where it exchanges files.
    shared: PathBuf,
    _client: LazyDaemon,
    _source: Option<PageSource>,
    /// What was dumped: it stands still while the dump has its pages.
    _dumped: Spawned,
}

fn moved_on_demand(criu: &Criu, source: Source, dir: &Path) -> Result<Moved> {
    let shared = dir.join("shared");
    fs::create_dir_all(&shared)?;
    let mut command = Command::new(workspace::binary("robust")?);
    command
        .arg("--dir")
        .arg(&shared)
        .env("LONG", "x".repeat(LONG));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let owner = exchange::start_command("robust", &mut command, &shared, "ready")?;
    let pid = owner.pid();
    let images = dir.join("images");
    let dump = Dump::new(criu, pid, &images);
    let mut page_source = None;
    let (from, address) = match source {
        Source::Local => {
            dump.run()?;
            (images.clone(), None)
        }
        Source::PageServer => {
            dump.run()?;
            let here = dir.join("here");
            ensure!(
                copy_without_lazy_pages(&images, &here)? > 0,
                "nothing is lazy"
            );
            let server = PageServer::serving(Make::Ours, &Options::new(&images))?;
            let address = server.address();
            page_source = Some(PageSource::Server(server));
            (here, Some(address))
        }
        Source::Dump => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            page_source = Some(PageSource::Dump(dump.serve_lazily(address)?));
            (images.clone(), Some(address))
        }
    };
    let options = Options::new(&from)
        .with(&["--on-demand"])
        .log_to("lazy.log");
    let client = LazyDaemon::start(Make::Ours, &options, address)?;
    let mut restored = Restore::new(criu, &from).lazily().start()?;
    restored.wait_until_resumed(LIMIT)?;
    Ok(Moved {
        restored,
        pid,
        shared,
        _client: client,
        _source: page_source,
        _dumped: owner,
    })
}

/// What has the pages, for as long as they are needed.
#[expect(dead_code, reason = "held for its end")]
enum PageSource {
    Server(PageServer),
    Dump(Spawned),
}
