//! A child that lives on beside the process, is dumped and restored with it, and checks its own memory.
//!
//! ```text
//! check(n) ──> go-n ──> the process: out-n.json
//!                  └──> each partner: NAME-n.json, which the process waits for
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, alarm};
use serde::de::DeserializeOwned;
use testbed::sys;

use crate::LIFETIME_S;
use crate::check::check_all;
use crate::make::{Made, Span};

/// How long a partner may take for its answer.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const PAUSE: Duration = Duration::from_millis(2);

/// Where a child answers the `n`th check.
pub(crate) fn answer_of(dir: &Path, name: &str, n: u32) -> PathBuf {
    dir.join(format!("{name}-{n}.json"))
}

/// Forks a partner. What it holds is what `change` returns, which runs in it first.
///
/// # Errors
/// It cannot be forked, or its change fails.
pub(crate) fn start(
    name: &str,
    dir: &Path,
    change: impl FnOnce() -> Result<Vec<Span>>,
) -> Result<()> {
    if let ForkResult::Child = sys::fork().context("fork")? {
        let served = serve(name, dir, change);
        let _ = fs::write(dir.join("failure.txt"), format!("{name}: {served:?}"));
        sys::exit_now(1);
    }
    // Its first answer tells that its change is done.
    let wrong: Option<String> = answer(dir, name, 0)?;
    ensure!(wrong.is_none(), "its partner: {wrong:?}");
    Ok(())
}

/// Of a child: it ends with its parent, and after the limit in any case.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn end_with_parent() -> Result<()> {
    // Only this thread exists, and it came out of a process that may have ended by now: the alarm is for that.
    set_pdeathsig(Signal::SIGKILL)?;
    alarm::set(LIFETIME_S);
    Ok(())
}

fn serve(name: &str, dir: &Path, change: impl FnOnce() -> Result<Vec<Span>>) -> Result<()> {
    end_with_parent()?;
    let made = Made {
        spans: change()?,
        ..Made::default()
    };
    let all = BTreeMap::from([(name.to_owned(), made)]);
    for n in 0.. {
        let go = dir.join(format!("go-{n}"));
        while n > 0 && !go.exists() {
            std::thread::sleep(PAUSE);
        }
        let said = check_all(&all, dir)?.remove(name).flatten();
        crate::publish(&answer_of(dir, name, n), &said)?;
    }
    Ok(())
}

/// What the child called `name` says to the `n`th check.
///
/// # Errors
/// It says nothing.
pub(crate) fn answer<T: DeserializeOwned>(dir: &Path, name: &str, n: u32) -> Result<T> {
    let path = answer_of(dir, name, n);
    let began = Instant::now();
    while !path.exists() {
        ensure!(began.elapsed() < LIMIT, "{name} says nothing");
        std::thread::sleep(PAUSE);
    }
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}
