//! A child that lives on beside the process, is dumped and restored with it, and checks its own memory.
//!
//! ```text
//! check(n) ──> go-n ──> the process: out-n.json
//!                  └──> each partner: KIND-n.json, which the process waits for
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, alarm};
use testbed::kinds::KindResults;
use testbed::sys;

use crate::LIFETIME_S;
use crate::check::wrong;
use crate::make::{HAVE_PARTNERS, Made, Span};

/// How long a partner may take for its answer.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const PAUSE: Duration = Duration::from_millis(2);

fn answer_of(dir: &Path, kind: &str, n: u32) -> PathBuf {
    dir.join(format!("{kind}-{n}.json"))
}

/// Forks a partner. What it holds is what `change` returns, which runs in it first.
///
/// # Errors
/// It cannot be forked, or its change fails.
pub(crate) fn start(
    kind: &str,
    dir: &Path,
    change: impl FnOnce() -> Result<Vec<Span>>,
) -> Result<()> {
    if let ForkResult::Child = sys::fork().context("fork")? {
        let served = serve(kind, dir, change);
        let _ = fs::write(dir.join("failure.txt"), format!("{served:?}"));
        sys::exit_now(1);
    }
    // Its first answer tells that its change is done.
    answer(kind, dir, 0).and_then(|wrong| {
        ensure!(wrong.is_none(), "its partner: {wrong:?}");
        Ok(())
    })
}

fn serve(kind: &str, dir: &Path, change: impl FnOnce() -> Result<Vec<Span>>) -> Result<()> {
    // Only this thread exists, and it came out of a process that may have ended by now: the alarm is for that.
    set_pdeathsig(Signal::SIGKILL)?;
    alarm::set(LIFETIME_S);
    let made = Made {
        spans: change()?,
        ..Made::default()
    };
    for n in 0.. {
        let go = dir.join(format!("go-{n}"));
        while n > 0 && !go.exists() {
            std::thread::sleep(PAUSE);
        }
        let said = wrong(&made, |span| span.expect);
        crate::publish(&answer_of(dir, kind, n), &said)?;
    }
    Ok(())
}

/// Adds what the partners of kinds say to the `n`th check, where this process found nothing wrong.
///
/// # Errors
/// One says nothing.
pub(crate) fn add_answers(said: &mut KindResults, dir: &Path, n: u32) -> Result<()> {
    for kind in HAVE_PARTNERS {
        let Some(own) = said.get_mut(*kind) else {
            continue;
        };
        let wrong = answer(kind, dir, n)?;
        if own.is_none() {
            *own = wrong.map(|wrong| format!("in its partner: {wrong}"));
        }
    }
    Ok(())
}

/// What the partner of a kind says to the `n`th check.
///
/// # Errors
/// It says nothing.
fn answer(kind: &str, dir: &Path, n: u32) -> Result<Option<String>> {
    let path = answer_of(dir, kind, n);
    let began = Instant::now();
    while !path.exists() {
        ensure!(
            began.elapsed() < LIMIT,
            "the partner of {kind} says nothing"
        );
        std::thread::sleep(PAUSE);
    }
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}
