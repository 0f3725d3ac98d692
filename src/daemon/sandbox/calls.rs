//! seccomp: which system calls are left.
//!
//! A call that is not in the list fails with ENOSYS, as on a kernel that does not know it: so the C library falls back
//! to an older one (`clone3` to `clone`, whose flags a filter can see). What calls do through io_uring a filter does not
//! see; no operation of io_uring executes a program, and Landlock confines those that open files.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Which calls a role makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Calls {
    /// Files, sockets, threads, memory of its own.
    Server,
    /// The same, and the sockets of other processes.
    Reader,
    /// The same, and the memory and life of other processes.
    Client,
}

/// Leaves the calls of `calls` alone. Unless the process `writes`, it opens no file to be written, and makes and renames
/// none.
pub(super) fn filter(calls: Calls, writes: bool) -> Result<String, String> {
    let failed = |error: BackendError| error.to_string();
    let arch = TargetArch::try_from(ARCH).map_err(failed)?;
    // The second one allows no third.
    let read_only = (!writes).then(|| compiled(reading(), Refused::Listed, arch));
    let allowed = compiled(allowed(calls), Refused::Others, arch);
    for program in read_only.into_iter().chain([allowed]) {
        apply_filter(&program.map_err(failed)?).map_err(|error| error.to_string())?;
    }
    Ok(match writes {
        true => "system calls are filtered".to_owned(),
        false => "system calls are filtered, files are only read".to_owned(),
    })
}

/// Which calls a filter refuses.
#[derive(Clone, Copy)]
enum Refused {
    /// Those with rules that match.
    Listed,
    /// All but those.
    Others,
}

/// Calls, with alternatives for their arguments; none stands for any arguments.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compiled(
    rules: Result<Rules, BackendError>,
    refused: Refused,
    arch: TargetArch,
) -> Result<BpfProgram, BackendError> {
    let (other, listed) = match refused {
        Refused::Listed => (
            SeccompAction::Allow,
            SeccompAction::Errno(errno(libc::EPERM)),
        ),
        Refused::Others => (
            SeccompAction::Errno(errno(libc::ENOSYS)),
            SeccompAction::Allow,
        ),
    };
    SeccompFilter::new(rules?, other, listed, arch)?.try_into()
}

fn errno(number: i32) -> u32 {
    number.unsigned_abs()
}

/// The arguments number `argument` whose bits `mask` are `value`.
fn masked(argument: u8, mask: i32, value: i32) -> Result<SeccompRule, BackendError> {
    let [mask, value] = [mask, value].map(|bits| u64::from(bits.cast_unsigned()));
    let op = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        op,
        value,
    )?])
}

/// What makes or changes names, or opens to write.
fn reading() -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let changes = |argument| {
        [
            masked(argument, libc::O_ACCMODE, libc::O_WRONLY),
            masked(argument, libc::O_ACCMODE, libc::O_RDWR),
            masked(argument, libc::O_CREAT, libc::O_CREAT),
            masked(argument, libc::O_TRUNC, libc::O_TRUNC),
        ]
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_openat, changes(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, changes(1)?);
    rules.extend(MAKING.iter().map(|call| (*call, Vec::new())));
    Ok(rules)
}

fn allowed(calls: Calls) -> Result<Rules, BackendError> {
    let of_role: &[i64] = match calls {
        Calls::Server => &[],
        Calls::Reader => OTHER_SOCKETS,
        Calls::Client => OTHER_PROCESSES,
    };
    let lists = [
        FILES, MAKING, MEMORY, SOCKETS, EVENTS, PROCESS, TIME, OLD, of_role,
    ];
    let any = lists.into_iter().flatten().map(|call| (*call, Vec::new()));
    let mut rules = Rules::from_iter(any);
    // Threads, and no processes: all of these are there together when a thread is started.
    let thread = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    // No memory is written and executed.
    let not_executable = || masked(2, libc::PROT_EXEC, 0);
    let not_writable = masked(2, libc::PROT_WRITE, 0)?;
    rules.insert(libc::SYS_mmap, vec![not_executable()?, not_writable]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    // The C library asks a netlink socket for the addresses of this host when it sorts those of another.
    let families = [
        libc::AF_UNIX,
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
    ];
    let families: Result<Vec<_>, _> = families
        .map(|family| masked(0, -1, family))
        .into_iter()
        .collect();
    rules.insert(libc::SYS_socket, families?);
    Ok(rules)
}

/// Reading and writing what is open, and looking at files.
const FILES: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_memfd_create,
];

/// Making, renaming and changing files by name.
const MAKING: &[i64] = &[
    libc::SYS_mkdirat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    libc::SYS_renameat,
    libc::SYS_symlinkat,
];

const MEMORY: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_membarrier,
];

const SOCKETS: &[i64] = &[
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
];

const EVENTS: &[i64] = &[
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// This process and its threads.
const PROCESS: &[i64] = &[
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_tgkill,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_capget,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
];

const TIME: &[i64] = &[
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_times,
];

/// What older C libraries call instead of newer ones.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_unlink,
    libc::SYS_rmdir,
    libc::SYS_getrlimit,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// The socket of a dump that holds its last bytes back.
const OTHER_SOCKETS: &[i64] = &[libc::SYS_pidfd_open, libc::SYS_pidfd_getfd];

/// The processes whose memory a lazy-client fills: looked at, advised about, ended.
const OTHER_PROCESSES: &[i64] = &[
    libc::SYS_kill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_userfaultfd,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_programs_or_rules_others_is_on_no_list() {
        let refused = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_seccomp,
            libc::SYS_setuid,
            libc::SYS_capset,
            libc::SYS_init_module,
            libc::SYS_openat2,
            libc::SYS_mknodat,
            libc::SYS_linkat,
        ];
        for calls in [Calls::Server, Calls::Reader, Calls::Client] {
            let rules = allowed(calls).unwrap();
            assert!(refused.iter().all(|call| !rules.contains_key(call)));
        }
        for calls in [Calls::Server, Calls::Reader] {
            assert!(!allowed(calls).unwrap().contains_key(&libc::SYS_kill));
        }
    }

    #[test]
    fn both_filters_are_accepted_by_the_compiler() {
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            compiled(reading(), Refused::Listed, arch).unwrap();
            compiled(allowed(Calls::Client), Refused::Others, arch).unwrap();
        }
    }
}
