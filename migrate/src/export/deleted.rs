//! Files that processes have open and that have no name any more.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;

use super::report::DeletedFile;
use crate::runtime::resources;

/// Those of a container, or of the processes of the control group of `root` at least.
pub(crate) fn open_in_container(root: i32) -> Vec<DeletedFile> {
    let mut pids = resources::processes_in_group(root);
    pids.push(root);
    pids.sort_unstable();
    pids.dedup();
    let mut found: Vec<DeletedFile> = pids.into_iter().flat_map(of_process).collect();
    found.sort_by_key(|file| (file.pid, file.fd));
    found
}

/// Those of a process; none if it is gone.
pub(super) fn of_process(pid: i32) -> Vec<DeletedFile> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let one = |entry: fs::DirEntry| {
        let fd = entry.file_name().to_str()?.parse().ok()?;
        let meta = fs::metadata(entry.path()).ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        let path = target.to_string_lossy();
        (is_deleted(&meta) && !path.starts_with("/memfd:")).then(|| DeletedFile {
            pid,
            fd,
            path: path.trim_end_matches(" (deleted)").to_owned(),
            bytes: meta.len(),
        })
    };
    entries.flatten().filter_map(one).collect()
}

fn is_deleted(meta: &Metadata) -> bool {
    meta.is_file() && meta.nlink() == 0
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_deleted_file_of_this_process_is_found() {
        let tmp = tempfile::tempdir().unwrap();
        let (kept, gone) = (tmp.path().join("kept"), tmp.path().join("gone"));
        let _kept = File::create(&kept).unwrap();
        let mut file = File::create(&gone).unwrap();
        file.write_all(b"seven..").unwrap();
        fs::remove_file(&gone).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let found = of_process(pid);
        let wanted = DeletedFile {
            pid,
            fd: file.as_raw_fd(),
            path: gone.display().to_string(),
            bytes: 7,
        };
        assert!(found.contains(&wanted), "{found:?}");
        assert!(
            !found
                .iter()
                .any(|file| file.path == kept.display().to_string())
        );
    }
}
