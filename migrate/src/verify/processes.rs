//! Whose memory a restore needs, from the images beside the memory.

use std::collections::BTreeSet;
use std::path::Path;

use pageferry::criu::header::Target;
use pageferry::error::Error;
use pageferry::image::dir::ImageDir;
use pageferry::image::file::Magic;
use pageferry::image::mm::Mappings;
use pageferry::image::proto::{
    Core, IMAGES_VERSION_COMPRESSED, Inventory, Memfd, Mm, PstreeEntry, TASK_DEAD,
};
use prost::Message;

use super::findings::Findings;
use super::{COMPRESSED, Criteria, name};

/// A memory that a restore reads.
pub(super) struct Needed {
    pub(super) target: Target,
    /// Where it is mapped, if that is known: shared memory has no mappings of its own.
    pub(super) mappings: Option<Mappings>,
}

/// Lists them, and tells what is wrong with the images that say so.
pub(super) fn needed(dir: &ImageDir, criteria: Criteria, findings: &mut Findings) -> Vec<Needed> {
    if criteria.memory_only {
        return whatever_is_there(dir);
    }
    inventory(dir, criteria, findings);
    let Some(pids) = processes(dir, findings) else {
        return whatever_is_there(dir);
    };
    let mut needed = Vec::new();
    let mut shared = BTreeSet::new();
    for pid in pids {
        if !has_memory(dir, pid, findings) {
            continue;
        }
        let mappings = mappings(dir, pid, findings);
        shared.extend(mappings.iter().flat_map(|maps| maps.shared_memory.clone()));
        needed.push(Needed {
            target: Target::Process(pid),
            mappings,
        });
    }
    shared.extend(memfds(dir, findings));
    let mut targets = dir.targets().unwrap_or_default();
    targets.retain(|target| needed.iter().all(|needed| needed.target != *target));
    for target in targets {
        match target {
            // Of System V segments too, which nothing here tells of.
            Target::Shmem(id) => drop(shared.insert(id)),
            Target::Process(pid) => {
                let path = dir.path().join(target.pagemap_name());
                let text = format!("pid {pid} is not in pstree.img: nobody reads this pagemap");
                findings.remark("pagemap-unused", &path, text);
            }
        }
    }
    needed.extend(shared.into_iter().map(|id| Needed {
        target: Target::Shmem(id),
        mappings: None,
    }));
    needed
}

fn whatever_is_there(dir: &ImageDir) -> Vec<Needed> {
    let targets = dir.targets().unwrap_or_default().into_iter();
    let mappings = |target| match target {
        Target::Process(pid) => dir.mappings(pid).ok(),
        Target::Shmem(_) => None,
    };
    targets
        .map(|target| Needed {
            target,
            mappings: mappings(target),
        })
        .collect()
}

fn inventory(dir: &ImageDir, criteria: Criteria, findings: &mut Findings) {
    let path = dir.path().join("inventory.img");
    let found: Option<Vec<Inventory>> = match read(dir, &path, Magic::Inventory) {
        Ok(found) => found,
        Err(error) => return findings.fault("inventory-damaged", &path, error),
    };
    let Some(inventory) = found.as_ref().and_then(|found| found.first()) else {
        let (code, what) = match found {
            None => ("inventory-missing", "it is not there"),
            Some(_) => ("inventory-damaged", "it is empty"),
        };
        let text = format!(
            "{what}: a dump writes it last, so this one is not complete (--memory-only for memory alone)"
        );
        return findings.fault(code, &path, text);
    };
    let version = inventory.img_version;
    match version {
        0..IMAGES_VERSION_COMPRESSED => {}
        IMAGES_VERSION_COMPRESSED => findings.either(
            criteria.must_be_read_before(COMPRESSED),
            "images-version",
            &path,
            "images of this version are read by CRIU from 4.3 on",
        ),
        _ => findings.fault(
            "images-version",
            &path,
            format!("images of version {version} are read by no CRIU up to 4.3"),
        ),
    }
}

fn processes(dir: &ImageDir, findings: &mut Findings) -> Option<Vec<u32>> {
    let path = dir.path().join("pstree.img");
    let found: Option<Vec<PstreeEntry>> = match read(dir, &path, Magic::Pstree) {
        Ok(found) => found,
        Err(error) => {
            findings.fault("pstree-damaged", &path, error.to_string());
            return None;
        }
    };
    match found {
        None => findings.fault(
            "pstree-missing",
            &path,
            "it is not there: no process is known",
        ),
        Some(tasks) if tasks.is_empty() => {
            findings.fault("pstree-damaged", &path, "it names no process");
        }
        Some(tasks) => return Some(tasks.iter().map(|task| task.pid).collect()),
    }
    None
}

/// Whether the process has memory. Zombies have none.
fn has_memory(dir: &ImageDir, pid: u32, findings: &mut Findings) -> bool {
    let path = dir.path().join(format!("core-{pid}.img"));
    let found: Option<Vec<Core>> = match read(dir, &path, Magic::Core) {
        Ok(found) => found,
        Err(error) => {
            findings.fault("core-damaged", &path, error.to_string());
            return true;
        }
    };
    let cores = found.into_iter().flatten();
    match cores.filter_map(|core| core.task).next() {
        Some(task) => task.task_state != TASK_DEAD,
        None => {
            let text = format!("pid {pid} of pstree.img has no state");
            findings.fault("core-missing", &path, text);
            true
        }
    }
}

fn mappings(dir: &ImageDir, pid: u32, findings: &mut Findings) -> Option<Mappings> {
    let path = dir.path().join(format!("mm-{pid}.img"));
    let found: Option<Vec<Mm>> = match read(dir, &path, Magic::Mm) {
        Ok(found) => found,
        Err(error) => {
            findings.fault("mm-damaged", &path, error.to_string());
            return None;
        }
    };
    if found.is_none_or(|found| found.is_empty()) {
        let text = format!("pid {pid} has no mappings: they are not there");
        findings.fault("mm-missing", &path, text);
        return None;
    }
    match dir.mappings(pid) {
        Ok(mappings) => {
            if !mappings.ordered {
                let text =
                    "the mappings are not in the order of their addresses: CRIU refuses them";
                findings.fault("mm-damaged", &path, text);
            }
            Some(mappings)
        }
        Err(error) => {
            findings.fault("mm-damaged", &path, error.to_string());
            None
        }
    }
}

/// The memory of memfds.
fn memfds(dir: &ImageDir, findings: &mut Findings) -> Vec<u64> {
    let path = dir.path().join("memfd.img");
    let found: Option<Vec<Memfd>> = read(dir, &path, Magic::Memfd).unwrap_or_else(|error| {
        findings.fault("memfd-damaged", &path, error);
        None
    });
    let memfds = found.into_iter().flatten();
    let filled = memfds.filter(|memfd| memfd.size > 0);
    filled.map(|memfd| memfd.shmid).collect()
}

/// The messages of an image, with errors that do not name the file once more.
fn read<M: Message + Default>(
    dir: &ImageDir,
    path: &Path,
    magic: Magic,
) -> Result<Option<Vec<M>>, String> {
    let short = |error: Error| shorten(&error, path);
    dir.messages(path, magic).map_err(short)
}

/// The error without the file's path at its beginning.
pub(super) fn shorten(error: &Error, path: &Path) -> String {
    let shown = path.display().to_string();
    error.to_string().replace(&shown, &name(path))
}
