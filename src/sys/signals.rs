//! Signals as something to read, so that no handler runs in the middle of anything: sets of every signal that
//! the kernel knows. The two that the C library keeps to itself, and takes out of the masks of threads, are ignored.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use libc::c_int;
use nix::errno::Errno;
use nix::sys::signal::Signal;

/// The last signal's number.
const LAST: c_int = 64;

/// The first real-time signal that the C library leaves to programs.
const FIRST_REAL_TIME: c_int = 34;

/// A signal's number, from 1 to 64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SignalNumber(c_int);

impl SignalNumber {
    /// Whether it is `signal`.
    pub fn is(self, signal: Signal) -> bool {
        self.0 == signal as c_int
    }
}

impl fmt::Display for SignalNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Signal::try_from(self.0) {
            Ok(signal) => write!(f, "{signal}"),
            Err(_) if self.0 >= FIRST_REAL_TIME => {
                write!(f, "SIGRTMIN+{}", self.0 - FIRST_REAL_TIME)
            }
            Err(_) => write!(f, "signal {}", self.0),
        }
    }
}

/// A set of signals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SignalSet(u64);

/// What does not end a process that does nothing about it (signal(7)), or cannot be kept from doing so.
const HARMLESS: [c_int; 8] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGURG,
    libc::SIGWINCH,
];

/// What a failed write raises, which the write says too; and those of the C library, which nobody else sends.
const IGNORED: [c_int; 4] = [libc::SIGPIPE, libc::SIGXFSZ, 32, 33];

impl SignalSet {
    /// Every signal that ends a process which does nothing about it, but for SIGKILL and those that
    /// [`SignalSet::block`] ignores. SIGHUP is left out if whoever started this process has it ignored, as nohup(1) does.
    pub fn ending() -> io::Result<SignalSet> {
        let mut set = SignalSet::all_ending();
        if is_ignored(libc::SIGHUP)? {
            set.0 &= !bit(libc::SIGHUP);
        }
        Ok(set)
    }

    fn all_ending() -> SignalSet {
        let left_out = |number: &c_int| {
            *number == libc::SIGKILL || HARMLESS.contains(number) || IGNORED.contains(number)
        };
        let numbers = (1..=LAST).filter(|number| !left_out(number));
        SignalSet(numbers.fold(0, |set, number| set | bit(number)))
    }

    /// Keeps the signals of the set from their effects in this thread and those that it starts; what failed
    /// writes raise is ignored, and the C library's own two. To be called before any other thread is started.
    /// Faults of this process's own code end it as before.
    pub fn block(self) -> io::Result<()> {
        for number in IGNORED {
            // SIG_IGN, without flags, a restorer or a mask: see rt_sigaction(2).
            let action: [u64; 4] = [libc::SIG_IGN as u64, 0, 0, 0];
            // SAFETY: the kernel reads the action, which outlives the call; ignoring runs no code of this process.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    number,
                    action.as_ptr(),
                    ptr::null_mut::<u64>(),
                    size_of::<u64>(),
                )
            };
            Errno::result(result)?;
        }
        // SAFETY: the kernel reads 8 bytes at the set, which outlives the call, and writes nothing.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_BLOCK,
                &raw const self.0,
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
        Errno::result(result)?;
        Ok(())
    }
}

fn bit(number: c_int) -> u64 {
    1 << (number - 1)
}

fn is_ignored(number: c_int) -> io::Result<bool> {
    // SAFETY: zero is a value of the plain C struct.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only writes the present one to `action`.
    let result = unsafe { libc::sigaction(number, ptr::null(), &raw mut action) };
    Errno::result(result)?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// Blocked signals, readable.
///
/// A poll wakes for signals of the process that has begun to poll: to be registered anew after a fork.
#[derive(Debug)]
pub struct SignalReader(OwnedFd);

impl AsFd for SignalReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl SignalReader {
    /// Reads the signals of `set`, which are blocked.
    pub fn new(set: SignalSet) -> io::Result<SignalReader> {
        // SAFETY: the kernel reads 8 bytes at the set, which outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_signalfd4,
                -1,
                &raw const set.0,
                size_of::<u64>(),
                libc::SFD_NONBLOCK | libc::SFD_CLOEXEC,
            )
        };
        let number = c_int::try_from(Errno::result(result)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
        Ok(SignalReader(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    /// The next signal, if one has come.
    pub fn next(&self) -> Option<SignalNumber> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        // Nothing to read is the only failure of a read of this length.
        let bytes = nix::unistd::read(&self.0, &mut info).ok()?;
        // The number is the first field (signalfd(2)).
        let [a, b, c, d, ..] = info;
        let number = i32::from_ne_bytes([a, b, c, d]);
        (bytes == info.len()).then_some(SignalNumber(number))
    }

    /// Waits for the next signal.
    pub fn wait(&self) -> io::Result<SignalNumber> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            if let Some(number) = self.next() {
                return Ok(number);
            }
            let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_ends_a_process_is_among_them() {
        let set = SignalSet::all_ending();
        let has = |number| set.0 & bit(number) != 0;
        let named = Signal::iterator().filter(|signal| has(*signal as c_int));
        let named: Vec<&str> = named.map(Signal::as_str).collect();
        assert_eq!(
            named,
            [
                "SIGHUP",
                "SIGINT",
                "SIGQUIT",
                "SIGILL",
                "SIGTRAP",
                "SIGABRT",
                "SIGBUS",
                "SIGFPE",
                "SIGUSR1",
                "SIGSEGV",
                "SIGUSR2",
                "SIGALRM",
                "SIGTERM",
                "SIGSTKFLT",
                "SIGXCPU",
                "SIGVTALRM",
                "SIGPROF",
                "SIGIO",
                "SIGPWR",
                "SIGSYS"
            ]
        );
        assert!((34..=64).all(has) && !has(32) && !has(33));
    }

    #[test]
    fn signals_have_names() {
        let names = [15, 32, 34, 64].map(|number| SignalNumber(number).to_string());
        assert_eq!(names, ["SIGTERM", "signal 32", "SIGRTMIN+0", "SIGRTMIN+30"]);
    }

    #[test]
    fn what_is_blocked_is_read() {
        // In a thread of its own, whose mask ends with it; the signal goes to that thread alone.
        std::thread::spawn(|| {
            for number in [libc::SIGURG, 34] {
                let set = SignalSet(bit(number));
                set.block().unwrap();
                let reader = SignalReader::new(set).unwrap();
                assert_eq!(reader.next(), None);
                let (process, thread) = (nix::unistd::getpid(), nix::unistd::gettid());
                let to = (process.as_raw(), thread.as_raw());
                // SAFETY: the call sends a signal to this very thread, where it is blocked.
                let sent = unsafe { libc::syscall(libc::SYS_tgkill, to.0, to.1, number) };
                assert_eq!(sent, 0);
                assert_eq!(reader.wait().unwrap(), SignalNumber(number));
            }
        })
        .join()
        .unwrap();
    }
}
