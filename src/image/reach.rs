//! What an image directory leads to: its parents, and the files that links in any of them name.

use std::fs;
use std::path::{Path, PathBuf};

use super::dir::ImageDir;
use super::open::may_follow;
use crate::units::PageSize;

/// The directory `path`, its parents and the files that their links lead to, as far as they are there: all that reading
/// its images opens. What cannot be read is left out, for whoever opens it says so.
pub fn reach(path: &Path, page: PageSize) -> Vec<PathBuf> {
    let Ok(dir) = ImageDir::open_any(path, page) else {
        return Vec::new();
    };
    let chain_dirs = dir.chain_dirs().unwrap_or_else(|_| vec![dir]);
    let mut reached = Vec::new();
    for dir in chain_dirs {
        reached.push(dir.path().to_owned());
        let entries = fs::read_dir(dir.path()).into_iter().flatten().flatten();
        let links = entries.filter_map(|entry| {
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            (is_link && may_follow(&entry.metadata().ok()?))
                .then(|| entry.path().canonicalize().ok())
                .flatten()
        });
        reached.extend(links.filter(|path| path.is_file()));
    }
    reached
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::image::dir::PARENT_LINK;

    #[test]
    fn parents_and_linked_files_are_reached() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().canonicalize().unwrap().join(name);
        for name in ["child", "parent", "store", "other"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("store/pages"), "").unwrap();
        symlink(at("parent"), at("child").join(PARENT_LINK)).unwrap();
        symlink("../store/pages", at("parent/pages-1.img")).unwrap();
        symlink("../other", at("parent/other")).unwrap();
        symlink("../none", at("child/none")).unwrap();
        let reached = reach(&at("child"), PageSize::KIB_4);
        assert_eq!(reached, [at("child"), at("parent"), at("store/pages")]);
        assert!(reach(&at("none"), PageSize::KIB_4).is_empty());
        symlink(at("child"), at("parent").join(PARENT_LINK)).unwrap();
        assert_eq!(reach(&at("child"), PageSize::KIB_4), [at("child")]);
    }
}
