//! System calls made by a thread of another process, by ptrace(2).
//!
//! The thread is moved to a `syscall` instruction of its vDSO, makes one step, and gets its registers back. Its
//! process must be stopped (SIGSTOP) all the while: if the tracer dies in between, the kernel lets the thread go, and
//! a thread of a stopped process stops again before its next instruction. Whoever has the [`ThreadState`] that was
//! written down before can then put the registers back.
//!
//! For x86_64; elsewhere every call says that it is not supported.

use std::fs;
use std::io;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A thread as it was before anything was injected.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ThreadState {
    /// Which thread.
    pub tid: i32,
    /// Words of struct user_regs_struct.
    registers: Vec<u64>,
    /// Blocked signals.
    signal_mask: u64,
}

/// A thread that is traced by this thread, stopped: let go when the value is dropped. Values stay with the thread that
/// made them.
#[derive(Debug)]
pub struct Tracee {
    tid: Pid,
    /// Not to be sent to another thread, which the kernel would not know as the tracer.
    _here: std::marker::PhantomData<*const ()>,
}

/// Stops of a thread before it makes a step.
const STOPS_MAX: u32 = 8;

/// Instructions of a vDSO that are looked through, bytes: it has a few pages.
const VDSO_BYTES_MAX: u64 = 1 << 20;

impl Tracee {
    /// Traces the thread `tid` and waits until it is stopped.
    pub fn attach(tid: i32) -> io::Result<Tracee> {
        let tid = Pid::from_raw(tid);
        ptrace::seize(tid, ptrace::Options::empty())?;
        let tracee = Tracee {
            tid,
            _here: std::marker::PhantomData,
        };
        ptrace::interrupt(tid)?;
        tracee.wait()?;
        Ok(tracee)
    }

    fn wait(&self) -> io::Result<WaitStatus> {
        match waitpid(self.tid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                Err(io::ErrorKind::NotFound.into())
            }
            stopped => Ok(stopped),
        }
    }

    /// What must be put back.
    pub fn state(&self) -> io::Result<ThreadState> {
        Ok(ThreadState {
            tid: self.tid.as_raw(),
            registers: machine::registers(self.tid)?,
            signal_mask: machine::signal_mask(self.tid)?,
        })
    }

    /// Puts everything back.
    pub fn restore(&self, state: &ThreadState) -> io::Result<()> {
        machine::set_registers(self.tid, &state.registers)?;
        machine::set_signal_mask(self.tid, state.signal_mask)
    }

    /// Lets the thread, which has `state`, make the system call `number`, and tells its result. The registers are not
    /// put back.
    pub fn call(&self, state: &ThreadState, number: i64, arguments: [u64; 3]) -> io::Result<i64> {
        let at = machine::syscall_instruction(self.tid)?;
        let registers = machine::with_call(&state.registers, at, number, arguments)?;
        // A signal that waits would be taken before the call.
        machine::set_signal_mask(self.tid, u64::MAX)?;
        machine::set_registers(self.tid, &registers)?;
        // A thread of a stopped process may report stops that were due before it makes the step.
        for _ in 0..STOPS_MAX {
            ptrace::step(self.tid, None)?;
            if let WaitStatus::Stopped(_, Signal::SIGTRAP) = self.wait()? {
                break;
            }
        }
        machine::result(&machine::registers(self.tid)?, at)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = ptrace::detach(self.tid, None);
    }
}

/// Start and end of the vDSO.
fn vdso(tid: Pid) -> io::Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{tid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
    let number = |text| u64::from_str_radix(text, 16).ok();
    let range = range.and_then(|(start, end)| Some((number(start)?, number(end)?)));
    range
        .filter(|(start, end)| start < end && end - start <= VDSO_BYTES_MAX)
        .ok_or_else(|| io::Error::other("the process has no vDSO"))
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use std::io;

    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    use nix::unistd::Pid;

    use super::vdso;

    type Registers = libc::user_regs_struct;

    const WORDS: usize = size_of::<Registers>() / size_of::<u64>();

    const _: () = assert!(size_of::<Registers>() == 27 * size_of::<u64>());

    /// `syscall`.
    const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

    /// The code segment of 64-bit programs.
    const USER_CS: u64 = 0x33;

    const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
    const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;

    pub(super) fn registers(tid: Pid) -> io::Result<Vec<u64>> {
        let registers = ptrace::getregs(tid)?;
        // SAFETY: the structure consists of 27 words without padding, and a word may have any value.
        let words: [u64; WORDS] = unsafe { std::mem::transmute(registers) };
        Ok(words.to_vec())
    }

    fn of_words(words: &[u64]) -> io::Result<Registers> {
        let wrong = |_| io::Error::other("these are not registers of this machine");
        let words: [u64; WORDS] = words.try_into().map_err(wrong)?;
        // SAFETY: as above, the other way round.
        Ok(unsafe { std::mem::transmute::<[u64; WORDS], Registers>(words) })
    }

    pub(super) fn set_registers(tid: Pid, words: &[u64]) -> io::Result<()> {
        Ok(ptrace::setregs(tid, of_words(words)?)?)
    }

    pub(super) fn with_call(
        words: &[u64],
        at: u64,
        number: i64,
        arguments: [u64; 3],
    ) -> io::Result<Vec<u64>> {
        let mut registers = of_words(words)?;
        if registers.cs != USER_CS {
            return Err(io::Error::other("the process is a 32-bit program"));
        }
        registers.rip = at;
        registers.rax = number.cast_unsigned();
        // No call of its own is to be restarted.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        // SAFETY: as in `registers`.
        let words: [u64; WORDS] = unsafe { std::mem::transmute(registers) };
        Ok(words.to_vec())
    }

    pub(super) fn result(words: &[u64], at: u64) -> io::Result<i64> {
        let registers = of_words(words)?;
        if registers.rip != at + INSTRUCTION.len() as u64 {
            return Err(io::Error::other("the thread has not made the call"));
        }
        match registers.rax.cast_signed() {
            error @ -4095..0 => {
                let error = i32::try_from(-error).unwrap_or(libc::EINVAL);
                Err(io::Error::from_raw_os_error(error))
            }
            result => Ok(result),
        }
    }

    pub(super) fn syscall_instruction(tid: Pid) -> io::Result<u64> {
        let (start, end) = vdso(tid)?;
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        let mut code = vec![0; length];
        let remote = RemoteIoVec {
            base: usize::try_from(start).map_err(io::Error::other)?,
            len: length,
        };
        let read = process_vm_readv(tid, &mut [io::IoSliceMut::new(&mut code)], &[remote])?;
        let found = code[..read]
            .windows(INSTRUCTION.len())
            .position(|bytes| bytes == INSTRUCTION);
        found
            .map(|at| start + at as u64)
            .ok_or_else(|| io::Error::other("the process's vDSO makes no system call"))
    }

    pub(super) fn signal_mask(tid: Pid) -> io::Result<u64> {
        let mut mask = 0_u64;
        // SAFETY: the kernel writes the 8 bytes of `mask`, as the third argument says.
        let got = unsafe {
            libc::ptrace(
                PTRACE_GETSIGMASK,
                tid.as_raw(),
                size_of::<u64>(),
                &raw mut mask,
            )
        };
        Errno::result(got)?;
        Ok(mask)
    }

    pub(super) fn set_signal_mask(tid: Pid, mask: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the 8 bytes of `mask`, as the third argument says.
        let set = unsafe {
            libc::ptrace(
                PTRACE_SETSIGMASK,
                tid.as_raw(),
                size_of::<u64>(),
                &raw const mask,
            )
        };
        Errno::result(set)?;
        Ok(())
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod machine {
    use std::io;

    use nix::unistd::Pid;

    fn unsupported<T>() -> io::Result<T> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "system calls are injected on x86_64 alone",
        ))
    }

    pub(super) fn registers(tid: Pid) -> io::Result<Vec<u64>> {
        super::vdso(tid).and(unsupported())
    }

    pub(super) fn set_registers(_: Pid, _: &[u64]) -> io::Result<()> {
        unsupported()
    }

    pub(super) fn with_call(_: &[u64], _: u64, _: i64, _: [u64; 3]) -> io::Result<Vec<u64>> {
        unsupported()
    }

    pub(super) fn result(_: &[u64], _: u64) -> io::Result<i64> {
        unsupported()
    }

    pub(super) fn syscall_instruction(_: Pid) -> io::Result<u64> {
        unsupported()
    }

    pub(super) fn signal_mask(_: Pid) -> io::Result<u64> {
        unsupported()
    }

    pub(super) fn set_signal_mask(_: Pid, _: u64) -> io::Result<()> {
        unsupported()
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use std::io::Read;
    use std::process::{Child, ChildStdout, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::owned_process::{ProcessName, ProcessStat};

    /// A process that counts to a given number, in user space and with system calls, and then tells it.
    fn counter() -> (Child, ChildStdout, ProcessName) {
        let script =
            "i=0; echo begins; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 0.01; echo $i";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 7]).unwrap();
        let name = ProcessName::of(i32::try_from(child.id()).unwrap()).unwrap();
        (child, stdout, name)
    }

    fn stop(process: &ProcessName) {
        process.signal(libc::SIGSTOP).unwrap();
        wait_until_stopped(process);
    }

    fn wait_until_stopped(process: &ProcessName) {
        let start = Instant::now();
        while ProcessStat::of(process.pid).unwrap().state != 'T' {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
    }

    fn expect_count(mut child: Child, mut stdout: ChildStdout) {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text.trim(), "200000");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_process_makes_calls_and_goes_on_as_if_it_had_not() {
        let (child, stdout, process) = counter();
        for _ in 0..20 {
            stop(&process);
            let tracee = Tracee::attach(process.pid).unwrap();
            let state = tracee.state().unwrap();
            let pid = tracee.call(&state, libc::SYS_getpid, [0; 3]).unwrap();
            assert_eq!(pid, i64::from(process.pid));
            let refused = tracee.call(&state, libc::SYS_close, [9999, 0, 0]);
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EBADF));
            tracee.restore(&state).unwrap();
            assert_eq!(tracee.state().unwrap(), state);
            drop(tracee);
            process.signal(libc::SIGCONT).unwrap();
        }
        expect_count(child, stdout);
    }

    /// What happens when the tracer is killed: the thread stops where it is, and can be put back by another.
    #[test]
    fn a_thread_whose_tracer_has_gone_is_put_back() {
        let (child, stdout, process) = counter();
        stop(&process);
        let state = std::thread::spawn(move || {
            let tracee = Tracee::attach(process.pid).unwrap();
            let state = tracee.state().unwrap();
            tracee.call(&state, libc::SYS_getpid, [0; 3]).unwrap();
            state
            // The kernel lets the thread go, with the registers of the call.
        })
        .join()
        .unwrap();
        wait_until_stopped(&process);
        let tracee = Tracee::attach(process.pid).unwrap();
        assert_ne!(tracee.state().unwrap(), state);
        tracee.restore(&state).unwrap();
        drop(tracee);
        process.signal(libc::SIGCONT).unwrap();
        expect_count(child, stdout);
    }
}
