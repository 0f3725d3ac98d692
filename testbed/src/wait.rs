//! Waiting for a condition, with a deadline: never for a time. And for a network that fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Long enough for anything that works, on a loaded machine of two cores too.
pub const GENEROUS: Duration = Duration::from_secs(120);

const PAUSE: Duration = Duration::from_millis(5);

/// Downloads are tried so often, with a growing pause between.
const TRIES: u32 = 4;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets every [`until`] of this program fail from now on, so that it unwinds and its guards clean
/// up: for a Ctrl-C.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Lets Ctrl-C and its like [`interrupt`] this program. By handlers and not by a mask, which the programs that it
/// starts would inherit: they could not be ended then.
///
/// # Errors
/// The handlers cannot be set.
pub fn interrupt_on_signals() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    thread::spawn(move || signals.forever().for_each(|_| interrupt()));
    Ok(())
}

/// Whether [`interrupt`] was called.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Asks `ready` until it gives a value, an error, or `limit` has passed.
///
/// # Errors
/// That of `ready`; the time is over; or the program was interrupted.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    undisturbed(what, limit, || {
        ensure!(!is_interrupted(), "interrupted");
        ready()
    })
}

/// The same for cleaning up, which goes on after an interruption.
///
/// # Errors
/// That of `ready`, or the time is over.
pub fn undisturbed<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = ready().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        if started.elapsed() > limit {
            bail!("{what} did not come within {} s", limit.as_secs());
        }
        thread::sleep(PAUSE);
    }
}

/// Carries out a step that depends on the network, again if it fails.
///
/// # Errors
/// The last failure.
pub fn retried<T>(what: &str, mut step: impl FnMut() -> Result<T>) -> Result<T> {
    let mut attempt = 1;
    loop {
        match step() {
            Err(error) if attempt < TRIES && !is_interrupted() => {
                eprintln!("{what} failed, try {attempt} of {TRIES}: {error:#}");
                thread::sleep(Duration::from_secs(2u64.pow(attempt)));
                attempt += 1;
            }
            result => return result,
        }
    }
}
