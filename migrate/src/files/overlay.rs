//! Overlays at the destination: layers that are kept there, below a writable one that has arrived.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount as mount_at, umount2};
use pageferry::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

use crate::export::overlay_at;

/// Longest options of a mount, bytes: one page, with the zero at its end.
const OPTIONS_BYTES_MAX: usize = 4095;

/// What a writable layer is mounted over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Lowers {
    /// Directories of the layers, lowest first.
    pub(crate) dirs: Vec<PathBuf>,
    pub(crate) userxattr: bool,
    pub(crate) redirect_dir: bool,
}

impl Lowers {
    /// The options of the mount.
    fn options(&self, upper: &Path, work: &Path) -> Result<Vec<u8>> {
        let paths = self.dirs.iter().map(PathBuf::as_path).chain([upper, work]);
        for path in paths {
            let bytes = path.as_os_str().as_bytes();
            if bytes.iter().any(|byte| b",:\\".contains(byte)) {
                let text = format!(
                    "{} has a character that options of a mount cannot have: let layers travel as files (--layers never)",
                    path.display()
                );
                return Err(Error::new(Kind::Usage, text));
            }
        }
        // An index would hold what is true on one host alone.
        let mut options = b"index=off,lowerdir=".to_vec();
        let lowers: Vec<&[u8]> = self
            .dirs
            .iter()
            .rev()
            .map(|dir| dir.as_os_str().as_bytes())
            .collect();
        options.extend(lowers.join(&b':'));
        for (name, path) in [(&b",upperdir="[..], upper), (b",workdir=", work)] {
            options.extend(name);
            options.extend(path.as_os_str().as_bytes());
        }
        if self.userxattr {
            options.extend(b",userxattr");
        }
        if self.redirect_dir {
            options.extend(b",redirect_dir=on");
        }
        if options.len() > OPTIONS_BYTES_MAX {
            let text = format!(
                "{} layers are more than one mount takes: let them travel as files (--layers never)",
                self.dirs.len()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(options)
    }

    /// Mounts `upper` over the layers at `target`, an empty directory.
    pub(super) fn mount(&self, target: &Path, upper: &Path, work: &Path) -> Result<()> {
        for dir in &self.dirs {
            if !dir.is_dir() {
                let text = format!("the layer {} is not there: it was removed", dir.display());
                return Err(Error::new(Kind::Io, text));
            }
        }
        let options = self.options(upper, work)?;
        let kind = Some("overlay");
        mount_at(kind, target, kind, MsFlags::empty(), Some(&options[..])).map_err(|errno| {
            let what = format!("mount an overlay of {} at", upper.display());
            Error::file(&what, target, errno)
        })
    }

    /// Fails if no overlay can have its writable layer in the directory `dir`.
    pub(super) fn attempt(&self, dir: &Path) -> Result<()> {
        let dir = dir.join("attempt");
        remove(&dir)?;
        let names = ["lower", "upper", "work", "at"].map(|name| dir.join(name));
        for name in &names {
            fs::create_dir_all(name)
                .map_err(|error| Error::file("make the directory", name, error))?;
        }
        let [lower, upper, work, at] = names;
        // As long as that of all layers is.
        self.options(&upper, &work)?;
        let alone = Lowers {
            dirs: vec![lower],
            ..self.clone()
        };
        let mounted = alone.mount(&at, &upper, &work).and_then(|()| unmount(&at));
        remove(&dir)?;
        mounted.map_err(|error| {
            let text =
                "no overlay can be mounted there: let layers travel as files (--layers never)";
            Error::wrap(Kind::Usage, text, error)
        })
    }
}

/// Whether an overlay can have its writable layer in the directory `dir`.
pub(crate) fn overlays_are_possible(dir: &Path) -> bool {
    let plain = Lowers {
        dirs: Vec::new(),
        userxattr: false,
        redirect_dir: false,
    };
    let tried = plain.attempt(dir);
    if let Err(error) = &tried {
        tracing::info!("layers of containers are not shared here: {error}");
    }
    tried.is_ok()
}

/// Whether the overlay with this writable layer is mounted at `target`.
pub(super) fn is_mounted(target: &Path, upper: &Path) -> bool {
    let place = target.parent().zip(target.file_name());
    let Some((parent, name)) = place else {
        return false;
    };
    let Ok(parent) = fs::canonicalize(parent) else {
        return false;
    };
    let Ok(table) = fs::read("/proc/self/mountinfo") else {
        return false;
    };
    let at = parent.join(name);
    let found = overlay_at(at.as_os_str().as_bytes(), &table);
    found.is_some_and(|overlay| overlay.upper.as_deref() == Some(upper))
}

/// Takes what is mounted at `target` away; processes that still end there do not hinder that.
pub(super) fn unmount(target: &Path) -> Result<()> {
    let unmounted = match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
        other => other,
    };
    unmounted.map_err(|errno| Error::file("unmount", target, errno))
}

/// Removes a directory with all that is in it, if it is there.
pub(super) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", dir, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowers(dirs: &[&str]) -> Lowers {
        Lowers {
            dirs: dirs.iter().map(PathBuf::from).collect(),
            userxattr: false,
            redirect_dir: true,
        }
    }

    #[test]
    fn the_topmost_layer_stands_first() {
        let options = lowers(&["/low", "/high"]).options(Path::new("/u"), Path::new("/w"));
        let text = String::from_utf8(options.unwrap()).unwrap();
        assert_eq!(
            text,
            "index=off,lowerdir=/high:/low,upperdir=/u,workdir=/w,redirect_dir=on"
        );
    }

    #[test]
    fn what_no_mount_takes_is_told_before() {
        for dir in ["/a:b", "/a,b", "/a\\b"] {
            let refused = lowers(&[dir]).options(Path::new("/u"), Path::new("/w"));
            assert!(
                refused.unwrap_err().to_string().contains("--layers never"),
                "{dir}"
            );
        }
        let long = vec!["/a/directory/that/has/a/name/of/no/great/length"; 100];
        let refused = lowers(&long).options(Path::new("/u"), Path::new("/w"));
        assert!(refused.unwrap_err().to_string().contains("100 layers"));
    }
}
