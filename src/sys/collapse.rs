//! Putting the small pages of another process together into huge ones: process_madvise(MADV_COLLAPSE), Linux 6.1.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::owned_process::{ProcessName, pidfd_open};
use crate::units::PageRange;

/// MADV_COLLAPSE of linux/mman.h.
const MADV_COLLAPSE: i32 = 25;

/// What became of one region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Collapsed {
    /// It is a huge page now, or was one already.
    Huge,
    /// Something was in the way for now (EAGAIN): a page was being moved or written out.
    Again,
    /// A page is missing or zero under a userfaultfd, or is pinned; or its control group is full (EBUSY).
    Busy,
    /// There is no memory for a huge page, or a page is not mapped (ENOMEM).
    NoMemory,
    /// It can be none: not mapped as one piece, advised against, poisoned, guarded or empty (EINVAL).
    Refused,
    /// The process has ended (ESRCH).
    Ended,
    /// This process may not do it, or the kernel cannot (EPERM, ENOSYS, and what is not known).
    Impossible(Errno),
}

/// A process whose memory can be advised. It names one process for good.
#[derive(Debug)]
pub struct AdvisedProcess(OwnedFd);

impl AdvisedProcess {
    /// The process `name`.
    ///
    /// # Errors
    ///
    /// It has ended, or the kernel has no pidfd.
    pub fn open(name: ProcessName) -> io::Result<AdvisedProcess> {
        let pidfd = pidfd_open(name.pid)?;
        match name.is_alive() {
            true => Ok(AdvisedProcess(pidfd)),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Makes `region`, as long as a huge page and aligned to it, one huge page. No content changes, whatever is mapped
    /// there by now.
    pub fn collapse(&self, region: PageRange) -> Collapsed {
        let Ok(length) = usize::try_from(region.bytes()) else {
            return Collapsed::Refused;
        };
        let part = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(
                usize::try_from(region.start().get()).unwrap_or(0),
            ),
            iov_len: length,
        };
        // SAFETY: `part` is one valid iovec that outlives the call. It names memory of the other process, of which
        // the kernel changes no content; this process's memory is not touched.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.0.as_raw_fd(),
                &raw const part,
                1_usize,
                MADV_COLLAPSE,
                0_u32,
            )
        };
        match advised {
            0.. => Collapsed::Huge,
            _ => Collapsed::of(Errno::last()),
        }
    }
}

impl Collapsed {
    fn of(errno: Errno) -> Collapsed {
        match errno {
            Errno::EAGAIN | Errno::EINTR => Collapsed::Again,
            Errno::EBUSY => Collapsed::Busy,
            Errno::ENOMEM => Collapsed::NoMemory,
            Errno::EINVAL | Errno::EFAULT => Collapsed::Refused,
            Errno::ESRCH => Collapsed::Ended,
            other => Collapsed::Impossible(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_errno_has_its_meaning() {
        let meanings = [
            (Errno::EAGAIN, Collapsed::Again),
            (Errno::EBUSY, Collapsed::Busy),
            (Errno::ENOMEM, Collapsed::NoMemory),
            (Errno::EINVAL, Collapsed::Refused),
            (Errno::ESRCH, Collapsed::Ended),
            (Errno::EPERM, Collapsed::Impossible(Errno::EPERM)),
            (Errno::ENOSYS, Collapsed::Impossible(Errno::ENOSYS)),
        ];
        for (errno, meaning) in meanings {
            assert_eq!(Collapsed::of(errno), meaning);
        }
    }

    #[test]
    fn a_process_that_has_ended_is_not_opened() {
        let own = ProcessName::of(std::process::id().cast_signed()).unwrap();
        assert!(AdvisedProcess::open(own).is_ok());
        let other = ProcessName {
            started: own.started + 1,
            ..own
        };
        assert!(AdvisedProcess::open(other).is_err());
    }

    #[test]
    fn nothing_is_mapped_at_the_bottom() {
        let own = ProcessName::of(std::process::id().cast_signed()).unwrap();
        let own = AdvisedProcess::open(own).unwrap();
        let collapsed = own.collapse(PageRange::new(0, 2 << 20));
        assert!(
            !matches!(collapsed, Collapsed::Huge | Collapsed::Ended),
            "{collapsed:?}"
        );
    }
}
