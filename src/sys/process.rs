//! What a process does to itself and asks about its system: fork, descriptors that it inherited, the
//! size of a page.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::{ForkResult, SysconfVar, dup2_stderr, dup2_stdin, dup2_stdout, fork, sysconf};

use crate::units::PageSize;

/// The size of this system's pages, which CRIU's images and connections silently share.
pub fn page_size() -> io::Result<PageSize> {
    let bytes = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or_default();
    let size = u64::try_from(bytes).ok().and_then(PageSize::new);
    size.ok_or_else(|| io::Error::other(format!("pages of {bytes} bytes are of no known size")))
}

/// Forks while this process has only one thread, so that the child may do anything that the parent
/// may. Fails if there are several threads.
pub fn fork_single_threaded() -> io::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "{threads} threads are running; only a process with one can be forked safely"
        )));
    }
    // SAFETY: no other thread exists (just counted, and only this one could start another), so no
    // lock is held by a thread that the child lacks.
    unsafe { fork() }.map_err(io::Error::from)
}

/// Descriptors that were taken over: each has one owner.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes over descriptor `number`, which whoever started this process left open for it and named on
/// the command line. It is closed on exec from now on. A standard stream is taken over as a copy, and
/// leads to /dev/null from then on: its number must never come to mean some file that is opened later.
///
/// # Errors
///
/// No such descriptor is open, or it has been taken over before.
pub fn inherited_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "it is named for two purposes",
        ));
    }
    let owned = take_over(number)?;
    taken.push(number);
    Ok(owned)
}

/// Closes every descriptor but `kept` and the standard streams. For a forked process that is done with all that it has
/// inherited: values that own a closed descriptor must be neither used nor dropped from now on.
pub fn close_all_but(kept: BorrowedFd<'_>) {
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if first <= last {
            // Linux 5.8 and older has no such call: what was inherited stays open.
            // SAFETY: the call touches no memory. The caller uses none of what owned the descriptors, as it promises.
            let _ = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn take_over(number: RawFd) -> io::Result<OwnedFd> {
    match number {
        0 => replaced(io::stdin().as_fd(), dup2_stdin),
        1 => replaced(io::stdout().as_fd(), dup2_stdout),
        2 => replaced(io::stderr().as_fd(), dup2_stderr),
        _ => open_descriptor(number),
    }
}

/// A copy of `stream`, in whose place `replace` then puts /dev/null.
fn replaced(
    stream: BorrowedFd<'_>,
    replace: impl FnOnce(File) -> nix::Result<()>,
) -> io::Result<OwnedFd> {
    let copy = stream.try_clone_to_owned()?;
    replace(File::options().read(true).write(true).open("/dev/null")?)?;
    Ok(copy)
}

fn open_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is only asked about, with fcntl, before it is taken for a descriptor.
    let open = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if open < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and no other part of this process owns a descriptor that it was started
    // with: they are only taken over here, each once, as `TAKEN` sees to.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(owned)
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_page_is_as_large_as_the_kernel_maps() {
        let page = page_size().unwrap();
        assert!(page.bytes() >= 4096);
    }

    #[test]
    fn only_open_descriptors_are_taken_over() {
        assert!(inherited_descriptor(-1).is_err());
        assert!(inherited_descriptor(RawFd::MAX).is_err());
        let (read, _write) = nix::unistd::pipe().unwrap();
        let taken = inherited_descriptor(read.into_raw_fd()).unwrap();
        let flags = fcntl(&taken, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
    }

    #[test]
    fn several_threads_are_not_forked() {
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(fork_single_threaded().is_err()));
        });
    }
}
