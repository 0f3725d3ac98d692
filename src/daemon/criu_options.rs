//! The names of CRIU's own command-line options, and which of them take a value.
//!
//! Read from `criu --help` of 3.17 to 4.3 and tried on the real ones. A wrapper hands over a whole
//! criu command line; with this table an option that means nothing here can be skipped together
//! with its value instead of being taken for a mistake.

/// Whether an option takes a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Value {
    /// It is a switch; `--no-NAME` turns it off again.
    Switch,
    /// A value must follow.
    Needed,
    /// A value may follow `=` or stand in the same word.
    Optional,
}

/// Long options, in the order of `criu --help`.
pub(super) const LONG: &[(&str, Value)] = &[
    ("tree", Value::Needed),
    ("restore-detached", Value::Switch),
    ("restore-sibling", Value::Switch),
    ("leave-stopped", Value::Switch),
    ("leave-running", Value::Switch),
    ("images-dir", Value::Needed),
    ("pidfile", Value::Needed),
    ("work-dir", Value::Needed),
    ("cpu-cap", Value::Optional),
    ("exec-cmd", Value::Switch),
    ("freeze-cgroup", Value::Needed),
    ("weak-sysctls", Value::Switch),
    ("lazy-pages", Value::Switch),
    ("stream", Value::Switch),
    ("mntns-compat-mode", Value::Switch),
    ("network-lock", Value::Needed),
    ("unprivileged", Value::Switch),
    ("allow-uprobes", Value::Switch),
    ("external", Value::Needed),
    ("tcp-established", Value::Switch),
    ("skip-in-flight", Value::Switch),
    ("tcp-close", Value::Switch),
    ("root", Value::Needed),
    ("evasive-devices", Value::Switch),
    ("link-remap", Value::Switch),
    ("ghost-limit", Value::Needed),
    ("ghost-fiemap", Value::Switch),
    ("action-script", Value::Needed),
    ("shell-job", Value::Switch),
    ("file-locks", Value::Switch),
    ("libdir", Value::Needed),
    ("plugin-option", Value::Needed),
    ("timeout", Value::Needed),
    ("force-irmap", Value::Switch),
    ("irmap-scan-path", Value::Needed),
    ("manage-cgroups", Value::Optional),
    ("cgroup-root", Value::Needed),
    ("cgroup-props", Value::Needed),
    ("cgroup-props-file", Value::Needed),
    ("cgroup-dump-controller", Value::Needed),
    ("cgroup-yard", Value::Needed),
    ("lsm-profile", Value::Needed),
    ("lsm-mount-context", Value::Needed),
    ("skip-mnt", Value::Needed),
    ("enable-fs", Value::Needed),
    ("inherit-fd", Value::Needed),
    ("empty-ns", Value::Needed),
    ("join-ns", Value::Needed),
    ("file-validation", Value::Needed),
    ("image-io-mode", Value::Needed),
    ("skip-file-rwx-check", Value::Switch),
    ("extra", Value::Switch),
    ("experimental", Value::Switch),
    ("all", Value::Switch),
    ("feature", Value::Needed),
    ("log-file", Value::Needed),
    ("log-pid", Value::Switch),
    ("verbosity", Value::Optional),
    ("display-stats", Value::Switch),
    ("track-mem", Value::Switch),
    ("prev-images-dir", Value::Needed),
    ("page-server", Value::Switch),
    ("auto-dedup", Value::Switch),
    ("pre-dump-mode", Value::Needed),
    ("address", Value::Needed),
    ("port", Value::Needed),
    ("ps-socket", Value::Needed),
    ("daemon", Value::Switch),
    ("status-fd", Value::Needed),
    ("tls-cacert", Value::Needed),
    ("tls-cacrl", Value::Needed),
    ("tls-cert", Value::Needed),
    ("tls-key", Value::Needed),
    ("tls", Value::Switch),
    ("tls-no-cn-verify", Value::Switch),
    ("config", Value::Needed),
    ("no-default-config", Value::Switch),
    ("help", Value::Switch),
    ("version", Value::Switch),
    // Not in the help text any more, but still taken.
    ("close", Value::Needed),
    ("ext-unix-sk", Value::Optional),
    ("ext-mount-map", Value::Needed),
    ("veth-pair", Value::Needed),
    ("enable-external-sharing", Value::Switch),
    ("enable-external-masters", Value::Switch),
    ("deprecated", Value::Switch),
    ("ms", Value::Switch),
];

/// One-letter options and the long ones that they stand for.
pub(super) const SHORT: &[(char, &str)] = &[
    ('t', "tree"),
    ('d', "daemon"),
    ('S', "restore-sibling"),
    ('s', "leave-stopped"),
    ('R', "leave-running"),
    ('D', "images-dir"),
    ('W', "work-dir"),
    ('r', "root"),
    ('j', "shell-job"),
    ('l', "file-locks"),
    ('L', "libdir"),
    ('J', "join-ns"),
    ('o', "log-file"),
    ('v', "verbosity"),
    ('h', "help"),
    ('V', "version"),
    ('x', "ext-unix-sk"),
    ('M', "ext-mount-map"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What the real CRIUs 4.1.1 to 4.3 answered when each option was given without and with a value.
    #[test]
    fn every_option_of_a_real_criu_is_known() {
        for line in include_str!("criu_options.txt").lines() {
            let (name, kind) = line.split_once(' ').unwrap();
            let known = LONG.iter().find(|(long, _)| *long == name);
            let (_, value) = known.unwrap_or_else(|| panic!("--{name} is unknown"));
            let expected = match kind {
                "switch" => Value::Switch,
                "needed" => Value::Needed,
                _ => Value::Optional,
            };
            assert_eq!(*value, expected, "--{name}");
        }
    }
}
