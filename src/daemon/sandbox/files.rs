//! Landlock: which files and ports are in reach.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope, make_bitflags, path_beneath_rules,
};

use super::FileAccess;

/// What is refused unless a rule allows it: what was tried with this program, and no later ABI. Older kernels refuse
/// less: ports from Linux 6.7 on, signals and abstract sockets from 6.12 on.
const HANDLED: ABI = ABI::V6;

/// What every process may read: itself, limits and the number of CPUs.
const SYSTEM: [&str; 5] = [
    "/proc",
    "/sys/fs/cgroup",
    "/sys/devices/system",
    "/dev/urandom",
    "/dev/zero",
];

/// What finding the address of a host reads: configuration, and libraries that the C library loads for it.
const NAMES: [&str; 6] = [
    "/etc",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/run/systemd/resolve",
];

/// DNS over TCP, for long answers.
const DNS_PORT: u16 = 53;

/// Whether the kernel has Landlock, and it is on.
pub(super) fn is_supported() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .is_ok()
}

/// Confines this thread to `access`, and says to what.
pub(super) fn confine(access: &FileAccess) -> Result<String, String> {
    let status = restrict(access)?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi.to_string(),
        _ => return Err("the kernel has none, or it is off (lsm=)".to_owned()),
    };
    let shown = |paths: &[PathBuf]| {
        let shown: Vec<_> = paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        match shown.is_empty() {
            true => "nothing".to_owned(),
            false => shown.join(", "),
        }
    };
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("it is not in force".to_owned()),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(format!(
            "writes {}, reads {} (Landlock {abi})",
            shown(&access.write),
            shown(&access.read),
        )),
    }
}

fn restrict(access: &FileAccess) -> Result<RestrictionStatus, String> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let remove = make_bitflags!(AccessFs::{RemoveFile});
    let null = make_bitflags!(AccessFs::{ReadFile | WriteFile});
    // Images are regular files and links, in directories.
    let made = make_bitflags!(AccessFs::{MakeReg | MakeDir | MakeSym | RemoveFile | RemoveDir});
    let write = read | made | make_bitflags!(AccessFs::{WriteFile | Truncate | Refer});
    let names: &[&str] = if access.names { &NAMES } else { &[] };
    let dns = access.names.then_some(DNS_PORT);
    let ports = access.ports.iter().copied().chain(dns);
    let connect: BitFlags<AccessNet> = AccessNet::ConnectTcp.into();
    let mut rules = Vec::new();
    rules.extend(beneath(&SYSTEM, read)?);
    rules.extend(beneath(names, read)?);
    rules.extend(beneath(&["/dev/null"], null)?);
    rules.extend(beneath(&access.read, read)?);
    rules.extend(beneath(&access.remove, remove)?);
    rules.extend(beneath(&access.write, write)?);
    let ports = ports.map(|port| Ok::<_, RulesetError>(NetPort::new(port, connect)));
    let ruleset = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(HANDLED))?
            .handle_access(AccessNet::from_all(HANDLED))?
            .scope(Scope::from_all(HANDLED))?
            .create()?
            .add_rules(rules.into_iter().map(Ok::<_, RulesetError>))?
            .add_rules(ports)?
            .restrict_self()
    };
    ruleset().map_err(|error| error.to_string())
}

/// Rules that allow `access` below each of `paths` that is there.
///
/// # Errors
///
/// One that is there cannot be opened: without its rule the process could not do its work.
fn beneath(
    paths: &[impl AsRef<Path>],
    access: BitFlags<AccessFs>,
) -> Result<Vec<PathBeneath<PathFd>>, String> {
    let mut rules = Vec::new();
    for path in paths {
        let path = path.as_ref();
        let mut rule = path_beneath_rules([path], access).peekable();
        if rule.peek().is_none() && path.exists() {
            return Err(format!("cannot open {}", path.display()));
        }
        for rule in rule {
            rules.push(rule.map_err(|error| error.to_string())?);
        }
    }
    Ok(rules)
}
