//! Which CPUs the threads of a measurement run on.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::Unsupported;

/// The calling thread.
const THIS_THREAD: Pid = Pid::from_raw(0);

/// Two CPUs that this process may use; the second is the first if there is no other.
///
/// # Errors
/// The kernel does not tell.
pub(super) fn two() -> Result<(usize, Option<usize>)> {
    let allowed = sched_getaffinity(THIS_THREAD).context("sched_getaffinity")?;
    let mut usable = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let first = usable.next().context("this process may use no CPU")?;
    Ok((first, usable.next()))
}

/// The second of [`two`].
pub(super) fn other() -> Result<usize> {
    let why = || Unsupported("this process may use one CPU alone".to_owned());
    Ok(two()?.1.ok_or_else(why)?)
}

/// Binds the calling thread to a CPU.
pub(super) fn stay_on(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("CPU number")?;
    sched_setaffinity(THIS_THREAD, &set).with_context(|| format!("sched_setaffinity to CPU {cpu}"))
}
