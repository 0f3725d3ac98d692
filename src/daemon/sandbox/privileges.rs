//! Capabilities: those of the role stay, if the process has them.

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

/// What a role may still do that others may not. docs/security.md has the reasons.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Privileges {
    /// Nothing.
    None,
    /// Files of other users; large pipes and registered memory beyond the limits of a user.
    Files,
    /// A look at other processes.
    OtherProcesses,
    /// The memory of other processes, files of other users, limits.
    Memory,
}

impl Privileges {
    fn kept(self) -> CapabilitySet {
        let limits = CapabilitySet::SYS_RESOURCE | CapabilitySet::IPC_LOCK;
        let files = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
        let look = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
        match self {
            Privileges::None => CapabilitySet::empty(),
            Privileges::Files => limits | files,
            Privileges::OtherProcesses => look,
            Privileges::Memory => {
                limits | files | look | CapabilitySet::KILL | CapabilitySet::SYS_NICE
            }
        }
    }
}

/// Drops all capabilities that `privileges` lacks, and says which are left. A program that is executed gains none.
pub(super) fn drop_others(privileges: Privileges) -> Result<String, String> {
    let failed = |doing: &str, error: rustix::io::Errno| format!("cannot {doing}: {error}");
    let kept = privileges.kept();
    set_no_new_privs(true).map_err(|error| failed("forbid new privileges", error))?;
    let own = capabilities(None).map_err(|error| failed("ask for capabilities", error))?;
    if own.effective.contains(CapabilitySet::SETPCAP) {
        drop_from_bounding_set(kept).map_err(|error| failed("bound capabilities", error))?;
    }
    // Kernels before 4.3 have none.
    let _ = clear_ambient_capability_set();
    let left = own.permitted & kept;
    let sets = CapabilitySets {
        effective: left,
        permitted: left,
        inheritable: CapabilitySet::empty(),
    };
    // Who has no others need not be allowed to drop any.
    if sets != own {
        set_capabilities(None, sets).map_err(|error| failed("drop capabilities", error))?;
    }
    let names: Vec<_> = left.iter_names().map(|(name, _)| name).collect();
    Ok(match names.is_empty() {
        true => "no capabilities".to_owned(),
        false => format!("capabilities {}", names.join(", ")),
    })
}

fn drop_from_bounding_set(kept: CapabilitySet) -> rustix::io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) if !kept.contains(capability) => {
                remove_capability_from_bounding_set(capability)?;
            }
            Ok(_) => {}
            // The kernel knows no capability of this number, nor of a higher one.
            Err(_) => break,
        }
    }
    Ok(())
}
