//! What the kernel has, and lets this process have.

use std::fs;
use std::path::Path;

use nix::sys::utsname::uname;
use pageferry::sys::owned_process::check_pidfd_getfd;
use pageferry::sys::pagemap::Pagemap;
use pageferry::sys::process::page_size;
use pageferry::sys::ring::Ring;
use pageferry::sys::uffd;
use pageferry::units::PageRange;

use super::{Checks, Job};

/// Features of userfaultfd, and what is done without them. The others are of no use here.
const USED: &[(&str, &str)] = &[
    ("EVENT_FORK", ""),
    ("EVENT_REMAP", ""),
    ("EVENT_REMOVE", ""),
    ("EVENT_UNMAP", ""),
    (
        "POISON",
        "processes whose pages are lost are held and not killed by SIGBUS (Linux 6.6 has it)",
    ),
];

/// Bits of CapEff in /proc/PID/status, from linux/capability.h, with what takes them.
const CAPABILITIES: &[(u32, &str, &str)] = &[
    (
        12,
        "CAP_NET_ADMIN",
        "CRIU cannot lock the network of dumped processes",
    ),
    (
        19,
        "CAP_SYS_PTRACE",
        "neither dump nor lazy restore of processes of others",
    ),
    (
        21,
        "CAP_SYS_ADMIN",
        "CRIU dumps no namespaces and no containers",
    ),
    (
        24,
        "CAP_SYS_RESOURCE",
        "CRIU cannot exceed fs.pipe-max-size (4194304 is enough for lazy dumps) and hard limits",
    ),
    (
        40,
        "CAP_CHECKPOINT_RESTORE",
        "CRIU cannot give restored processes their pids",
    ),
];

/// Fills `checks`.
pub(super) fn check(checks: &mut Checks) {
    checks.area("kernel");
    if let Ok(names) = uname() {
        let release = names.release().to_string_lossy();
        let machine = names.machine().to_string_lossy();
        checks.works("Linux", format!("{release} {machine}"));
    }
    match page_size() {
        Ok(page) => checks.works("page size", format!("{} bytes", page.bytes())),
        Err(error) => {
            let all = [Job::CarryMemory, Job::LazyRestore];
            checks.missing("page size", error.to_string(), "use another kernel", &all);
        }
    }
    userfaultfd(checks);
    io_uring(checks);
    pagemap_scan(checks);
    soft_dirty(checks);
    match check_pidfd_getfd() {
        Ok(()) => checks.works("pidfd_getfd", "permitted"),
        Err(error) => {
            let advice = "Linux 5.6 has it; a seccomp profile may refuse it";
            checks.limited("pidfd_getfd", error.to_string(), advice);
        }
    }
    huge_pages(checks);
    capabilities(checks);
}

fn userfaultfd(checks: &mut Checks) {
    let sysctl = "/proc/sys/vm/unprivileged_userfaultfd";
    if let Some(value) = read(sysctl) {
        let meaning = match value.as_str() {
            "0" => "only privileged processes have it for faults in the kernel",
            _ => "every process has it",
        };
        checks.works("vm.unprivileged_userfaultfd", format!("{value}: {meaning}"));
    }
    if let Err(error) = uffd::check_permitted() {
        let advice = "a lazy restore needs it: CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1; a seccomp \
                      profile may refuse it, and a kernel without CONFIG_USERFAULTFD has none";
        return checks.missing(
            "userfaultfd",
            error.to_string(),
            advice,
            &[Job::LazyRestore],
        );
    }
    checks.works("userfaultfd", "permitted, with events");
    let features = uffd::features().unwrap_or_default();
    for (bit, name) in uffd::FEATURES.iter().enumerate() {
        let shown = format!("UFFD_FEATURE_{name}");
        let used = USED.iter().find(|(used, _)| used == name);
        match (features & (1 << bit) != 0, used) {
            (true, _) => checks.works(shown, "there"),
            (false, None) => checks.absent(shown),
            (false, Some((_, ""))) => {
                let advice = "use a newer kernel: Linux 4.11 has it";
                checks.missing(shown, "not there", advice, &[Job::LazyRestore]);
            }
            (false, Some((_, without))) => checks.limited(shown, "not there", *without),
        }
    }
}

fn io_uring(checks: &mut Checks) {
    let disabled = read("/proc/sys/kernel/io_uring_disabled");
    match Ring::new() {
        Ok(_) => checks.works("io_uring", "permitted, with all that is needed"),
        Err(error) => {
            let value = match disabled.as_deref() {
                None | Some("0") => error.to_string(),
                Some(value) => format!("{error} (kernel.io_uring_disabled is {value})"),
            };
            let advice = "page-server uses epoll in its place, with somewhat more CPU";
            checks.limited("io_uring", value, advice);
        }
    }
}

fn pagemap_scan(checks: &mut Checks) {
    let none = PageRange::new(0, 0);
    let tried =
        Pagemap::open(Path::new("/proc/self/pagemap")).and_then(|map| map.first_guard(none));
    match tried {
        Ok(_) => checks.works("PAGEMAP_SCAN", "there, with guard regions"),
        Err(error) => checks.limited(
            "PAGEMAP_SCAN",
            error.to_string(),
            "Linux 6.7 has it, 6.15 with guard regions: rounds are slower, and guard regions go unseen",
        ),
    }
}

/// Kernels that have it mark each mapping that is new.
fn soft_dirty(checks: &mut Checks) {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut flags = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"));
    match flags.any(|flags| flags.split_whitespace().any(|flag| flag == "sd")) {
        true => checks.works("soft-dirty", "there: `criu pre-dump` works"),
        false => checks.limited(
            "soft-dirty",
            "not there (CONFIG_MEM_SOFT_DIRTY): `criu pre-dump` and --track-mem fail",
            "use `pageferry migrate`, `page-server --forward` or pageferry's `criu` (docs/shim.md), which do without",
        ),
    }
}

fn huge_pages(checks: &mut Checks) {
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = transparent.split(['[', ']']).nth(1).unwrap_or("unknown");
    checks.works("transparent huge pages", chosen);
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten();
    let mut found: Vec<String> = Vec::new();
    for size in sizes.flatten() {
        let name = size.file_name().to_string_lossy().replace("hugepages-", "");
        let count = |file: &str| read(size.path().join(file)).unwrap_or_default();
        found.push(format!(
            "{name}: {} free of {}",
            count("free_hugepages"),
            count("nr_hugepages")
        ));
    }
    found.sort();
    match found.is_empty() {
        true => checks.works("huge pages", "none"),
        false => checks.works("huge pages", found.join(", ")),
    }
}

fn capabilities(checks: &mut Checks) {
    checks.area("permissions");
    let held = effective_capabilities();
    checks.works("user", format!("uid {}", nix::unistd::geteuid()));
    for (bit, name, without) in CAPABILITIES {
        match held & (1 << bit) != 0 {
            true => checks.works(*name, "held"),
            false => checks.limited(*name, "not held", *without),
        }
    }
    if let Some(scope) = read("/proc/sys/kernel/yama/ptrace_scope")
        && scope == "3"
    {
        let advice = "no process can be dumped until the next boot without it";
        checks.missing("ptrace_scope", scope, advice, &[Job::DumpAndRestore]);
    }
}

/// The capabilities of this process, a bit each.
pub(super) fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    held.unwrap_or_default()
}

/// A small file without the white space around it.
pub(super) fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}
