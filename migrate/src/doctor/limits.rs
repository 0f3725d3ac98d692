//! Limits of this process and of the system.

use nix::sys::resource::{Resource, getrlimit, rlim_t};

use super::Checks;
use super::kernel::read;

/// Descriptors with which a lazy restore of hundreds of processes works: one each, and as many for the standby.
const DESCRIPTORS: rlim_t = 4096;

/// Bytes of a pipe that `criu dump --lazy-pages` asks for at most, as far as was seen.
const LAZY_DUMP_PIPE_BYTES: u64 = 4 << 20;

/// Bytes of a pipe that page-server moves large frames through.
const SPLICE_PIPE_BYTES: u64 = 1 << 20;

/// Fills `checks`.
pub(super) fn check(checks: &mut Checks) {
    checks.area("limits");
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let value = format!("{} now, {} at most", shown(soft), shown(hard));
        match hard >= DESCRIPTORS {
            true => checks.works("open files", value),
            false => checks.limited(
                "open files",
                value,
                "raise it (ulimit -Hn, LimitNOFILE=) for lazy restores of many processes",
            ),
        }
    }
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) {
        let value = format!("{} bytes now, {} at most", shown(soft), shown(hard));
        checks.works("locked memory", value);
    }
    pipes(checks);
    for name in [
        "fs/pipe-user-pages-soft",
        "fs/pipe-user-pages-hard",
        "vm/overcommit_memory",
        "vm/max_map_count",
    ] {
        if let Some(value) = read(format!("/proc/sys/{name}")) {
            checks.works(name.replace('/', "."), value);
        }
    }
}

fn pipes(checks: &mut Checks) {
    let Some(value) = read("/proc/sys/fs/pipe-max-size") else {
        return;
    };
    let most: u64 = value.parse().unwrap_or_default();
    let value = format!("{most} bytes");
    let privileged = holds_sys_resource();
    match most {
        _ if privileged || most >= LAZY_DUMP_PIPE_BYTES => checks.works("fs.pipe-max-size", value),
        SPLICE_PIPE_BYTES.. => checks.limited(
            "fs.pipe-max-size",
            value,
            "`criu dump --lazy-pages` of large processes fails (splice: Bad file descriptor) without \
             CAP_SYS_RESOURCE: sysctl fs.pipe-max-size=4194304",
        ),
        _ => checks.limited(
            "fs.pipe-max-size",
            value,
            "page-server moves large frames in smaller pieces: sysctl fs.pipe-max-size=4194304",
        ),
    }
}

/// Bit 24 of CapEff, CAP_SYS_RESOURCE: its holders' pipes have no limit.
fn holds_sys_resource() -> bool {
    super::kernel::effective_capabilities() & (1 << 24) != 0
}

fn shown(limit: rlim_t) -> String {
    match limit {
        nix::sys::resource::RLIM_INFINITY => "unlimited".to_owned(),
        limit => limit.to_string(),
    }
}
