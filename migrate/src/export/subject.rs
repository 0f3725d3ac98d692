//! What is exported: the directories of a container's root, by its runtime and the mount table, or by hand.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ContainerId;
use serde_json::Value;

use super::args::SubjectArgs;
use super::marks::Marks;
use super::mounts::{Overlay, overlay_at};
use super::walk::Tree;
use crate::runtime::{Runtime, RuntimeArg, bundle};

/// The layers of a root file system.
#[derive(Debug)]
pub(super) struct Subject {
    /// The writable layer, or all of it.
    pub(super) top: Tree,
    /// The layers below, lowest first; `None` if they are not known.
    pub(super) below: Option<Vec<Tree>>,
    /// The container's first process.
    pub(super) root: Option<i32>,
    /// The configuration of the container's bundle.
    pub(super) config: Option<Value>,
    /// The container, if it runs.
    pub(super) running: Option<(Runtime, ContainerId)>,
}

impl Subject {
    /// Finds what the command line names.
    pub(super) async fn find(args: &SubjectArgs) -> Result<Subject> {
        if let Some(id) = &args.id {
            return Subject::container(id, args.runtime, args.runtime_root.clone()).await;
        }
        let tree = |dir: &Path, marks| Tree {
            dir: dir.to_owned(),
            marks,
            mount: None,
        };
        let below = |dirs: &[PathBuf]| -> Vec<Tree> {
            let dirs = dirs.iter().rev();
            dirs.map(|dir| tree(dir, Marks::Either)).collect()
        };
        let (top, below) = match (&args.upper, &args.rootfs) {
            (Some(upper), _) => {
                let below = (!args.lower.is_empty()).then(|| below(&args.lower));
                let mount = args.merged.clone();
                (
                    Tree {
                        mount,
                        ..tree(upper, Marks::Either)
                    },
                    below,
                )
            }
            (None, Some(rootfs)) => (tree(rootfs, Marks::None), Some(Vec::new())),
            (None, None) => {
                let text = "name a container, or a directory by --upper or --rootfs";
                return Err(Error::new(Kind::Usage, text));
            }
        };
        Ok(Subject {
            top,
            below,
            root: None,
            config: None,
            running: None,
        })
    }

    /// The layers of a container's root.
    pub(super) async fn container(
        id: &ContainerId,
        kind: RuntimeArg,
        root: Option<PathBuf>,
    ) -> Result<Subject> {
        let runtime = Runtime::find(kind.kind(), root)?;
        let state = runtime.known_state(id, kind.kind()).await?;
        let config = bundle::config(&state.bundle)?;
        let rootfs = bundle::root_of(&state.bundle, &config);
        let root = (state.pid > 0).then_some(state.pid);
        let (overlay, mount) = match root {
            Some(pid) => {
                let mount = PathBuf::from(format!("/proc/{pid}/root"));
                (overlay(pid, Path::new("/"))?, mount)
            }
            None => {
                let found = fs::canonicalize(&rootfs);
                let rootfs = found.map_err(|error| Error::file("find", &rootfs, error))?;
                (overlay("self", &rootfs)?, rootfs)
            }
        };
        let running = (state.status == "running").then(|| (runtime, id.clone()));
        let (top, below) = match overlay {
            Some(overlay) => layers(overlay, mount)?,
            None => {
                let whole = Tree {
                    dir: rootfs,
                    marks: Marks::None,
                    mount: None,
                };
                (whole, Some(Vec::new()))
            }
        };
        Ok(Subject {
            top,
            below,
            root,
            config: Some(config),
            running,
        })
    }
}

/// The overlay at a place of the mount table of a process.
fn overlay(process: impl std::fmt::Display, at: &Path) -> Result<Option<Overlay>> {
    let path = PathBuf::from(format!("/proc/{process}/mountinfo"));
    let table = fs::read(&path).map_err(|error| Error::file("read", &path, error))?;
    Ok(overlay_at(at.as_os_str().as_bytes(), &table))
}

/// The layers of an overlay, as this process can reach them.
fn layers(overlay: Overlay, mount: PathBuf) -> Result<(Tree, Option<Vec<Tree>>)> {
    let marks = overlay.marks;
    let upper = overlay.upper.ok_or_else(|| {
        let text = "the container's root is mounted to be read: it has no writable layer";
        Error::new(Kind::Usage, text)
    })?;
    if !reachable(&upper) {
        let text = format!(
            "{}, the upperdir of the container's root, is not to be found from here: run this where the container \
             was mounted, or name it by --upper",
            upper.display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    let tree = |dir: PathBuf, mount| Tree { dir, marks, mount };
    // Files of the lower layers may have their contents elsewhere, too: without all of them there is no base.
    let known = !overlay.has_data_only && overlay.lowers.iter().all(|dir| reachable(dir));
    let below = overlay.lowers.into_iter().rev().map(|dir| tree(dir, None));
    let below = known.then(|| below.collect());
    Ok((tree(upper, Some(mount)), below))
}

/// The layers of a root file system that is an overlay.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RootLayers {
    pub(crate) upper: PathBuf,
    /// The layers below, lowest first.
    pub(crate) lowers: Vec<PathBuf>,
    pub(crate) userxattr: bool,
    pub(crate) redirect_dir: bool,
}

/// The layers of the overlay that is mounted at `root`; `None` if something else is there, or if a layer by itself does
/// not hold its files: they are told with their contents in other layers (`metacopy`), or cannot be reached from here.
pub(crate) fn root_layers(root: &Path) -> Result<Option<RootLayers>> {
    let root = fs::canonicalize(root).map_err(|error| Error::file("find", root, error))?;
    let Some(overlay) = overlay("self", &root)? else {
        return Ok(None);
    };
    let is_default = |name: &str| {
        let path = format!("/sys/module/overlay/parameters/{name}");
        fs::read_to_string(path).is_ok_and(|text| text.trim() == "Y")
    };
    let metacopy = overlay.metacopy.unwrap_or_else(|| is_default("metacopy"));
    let Some(upper) = overlay.upper.filter(|upper| reachable(upper)) else {
        return Ok(None);
    };
    if metacopy || overlay.has_data_only || !overlay.lowers.iter().all(|dir| reachable(dir)) {
        return Ok(None);
    }
    Ok(Some(RootLayers {
        upper,
        lowers: overlay.lowers.into_iter().rev().collect(),
        userxattr: overlay.marks == Marks::User,
        redirect_dir: overlay
            .redirect_dir
            .unwrap_or_else(|| is_default("redirect_dir")),
    }))
}

/// Whether a directory of a mount table is one that this process can find.
fn reachable(dir: &Path) -> bool {
    dir.is_absolute() && dir.is_dir()
}
