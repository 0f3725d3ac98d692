//! CRIU's own log files: the line that says why a dump or a restore has failed, and what helps. Pure.
//!
//! CRIU marks what went wrong as `Error (file.c:NN):`. What fails first is the cause; what follows names the steps that
//! depended on it, and the last line that all has failed.

/// Ends of what CRIU says of its work as a whole, which is no cause.
const SUMMARIES: [&str; 3] = [
    "Dumping FAILED.",
    "Restoring FAILED.",
    "Pre-dumping FAILED.",
];

/// Parts of lines that CRIU marks as errors and goes on behind: where it may not raise its own limit of descriptors, it
/// does with fewer.
const HARMLESS: [&str; 1] = ["rlimit: Can't setup RLIMIT_NOFILE for self"];

/// What helps, by parts of the line that says what went wrong.
const ADVICE: &[(&[&str], &str)] = &[
    (
        &["fork for", "File exists"],
        "a process at the destination has this pid: end it, or run the agent in a PID namespace of its own \
         (unshare --pid --mount --fork --mount-proc)",
    ),
    (
        &["Pid", "do not match expected"],
        "a process at the destination has this pid: end it, or run the agent in a PID namespace of its own \
         (unshare --pid --mount --fork --mount-proc)",
    ),
    (
        &["Can't open file", "No such file"],
        "put this file at the destination under the same path, or send its directory along (--volume)",
    ),
    (
        &["has bad size"],
        "the file at the destination is another one: copy it there, or send its directory along (--volume)",
    ),
    (
        &["has bad mode"],
        "the file at the destination has other permissions: give it those of the source's",
    ),
    (
        &["has bad build-ID"],
        "the program or library at the destination is another one: install the same version there",
    ),
    (
        &["file locks"],
        "the processes hold file locks, which are not moved unless CRIU is told so: put `file-locks` into \
         /etc/criu/default.conf on both hosts",
    ),
    (
        &["tcp-established"],
        "a TCP connection is open: say --tcp established to keep it, or --tcp close",
    ),
    (
        &["dangling tty"],
        "the processes use a terminal: start them without one, or put `shell-job` into /etc/criu/default.conf on both \
         hosts",
    ),
    (
        &["external unix socket"],
        "the processes are connected to a socket of another program: close that connection before the move",
    ),
    (
        &["External socket is used"],
        "the processes are connected to a socket of another program: close that connection before the move",
    ),
    (
        &["ghost file", "limit"],
        "an open file was deleted and is larger than CRIU carries: put `ghost-limit SIZE` into /etc/criu/default.conf",
    ),
    (
        &["Can't dump file", "of that type"],
        "no CRIU can dump this kind of file: let the processes close it before the move",
    ),
    (
        &["Can't lookup mount"],
        "the processes have a file open that is outside of their mounts: let them close it before the move",
    ),
    (
        &["Can't get rlimit"],
        "run pageferry with CAP_SYS_RESOURCE, or as root",
    ),
    (
        &["Lazy pages transfer FAILED"],
        "if no client has failed, the kernel refused CRIU the pipe that it needs, and CRIU's log does not say so: run it \
         with CAP_SYS_RESOURCE, or set the sysctl fs.pipe-max-size=4194304",
    ),
    (
        &["Operation not permitted"],
        "run pageferry and CRIU as root, without what restricts them (seccomp, a security module)",
    ),
    (
        &["No space left"],
        "make room on the disk that the line names",
    ),
    (
        &["Cannot allocate memory"],
        "the host has too little memory for the processes: make room, or raise the limit of the control group",
    ),
];

/// The lines that say that something went wrong, in order.
pub fn errors(log: &str) -> impl Iterator<Item = &str> {
    let is_harmless = |line: &str| HARMLESS.iter().any(|part| line.contains(part));
    let lines = log.lines().map(str::trim);
    lines.filter(move |line| is_error(line) && !is_harmless(line))
}

/// The line that says what went wrong first; `None` if no line says so.
pub fn cause(log: &str) -> Option<&str> {
    let is_summary = |line: &str| SUMMARIES.iter().any(|end| line.ends_with(end));
    errors(log)
        .find(|line| !is_summary(line))
        .or_else(|| errors(log).next())
}

/// What helps where CRIU says this; `None` if that is not known.
pub fn advice(line: &str) -> Option<&'static str> {
    let has_parts = |parts: &[&str]| parts.iter().all(|part| line.contains(part));
    let found = ADVICE.iter().find(|(parts, _)| has_parts(parts));
    found.map(|(_, advice)| *advice)
}

/// Whether a line has `Error (file.c:NN):`.
fn is_error(line: &str) -> bool {
    let Some((_, rest)) = line.split_once("Error (") else {
        return false;
    };
    let Some((place, _)) = rest.split_once("):") else {
        return false;
    };
    let Some((file, number)) = place.rsplit_once(':') else {
        return false;
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number && file.ends_with(".c")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESTORE: &str = "\
(00.010) Running pre-restore scripts
(00.011)   Error handling is on
(00.012)     77: Error (criu/files-reg.c:2345): Can't open file srv/data on restore: No such file or directory
(00.013)     77: Error (criu/files.c:1221): Unable to open fd=3 id=0x5
(00.014) Error (criu/cr-restore.c:2557): Restoring FAILED.
";

    #[test]
    fn the_first_error_is_the_cause() {
        assert_eq!(errors(RESTORE).count(), 3);
        let cause = cause(RESTORE).unwrap();
        assert!(
            cause.starts_with("(00.012)") && cause.contains("srv/data"),
            "{cause}"
        );
        assert!(advice(cause).unwrap().contains("--volume"));
    }

    #[test]
    fn what_criu_goes_on_behind_is_no_cause() {
        let limit = "(00.031250) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted";
        assert_eq!(cause(limit), None);
        assert_eq!(cause(&format!("{limit}\n{RESTORE}")), cause(RESTORE));
    }

    #[test]
    fn a_log_that_only_says_that_it_failed_says_that() {
        let log = "(00.1) Error (criu/cr-dump.c:1800): Dumping FAILED.\n";
        assert_eq!(cause(log), Some(log.trim()));
        assert_eq!(advice(log), None);
        for log in [
            "",
            "(00.1) Dumping finished successfully\n",
            "Error: x\n",
            "Error (x.c:y):",
        ] {
            assert_eq!(cause(log), None, "{log}");
        }
    }

    #[test]
    fn each_advice_can_be_given() {
        for (parts, advice) in ADVICE {
            let line = format!("Error (criu/x.c:1): {}", parts.join(" 7: "));
            assert_eq!(super::advice(&line), Some(*advice), "{line}");
        }
    }
}
