//! Looks at image directories before they are relied on, so that a mistake is found while nothing is
//! frozen yet.

use std::collections::BTreeMap;

use super::chain::{Absence, Chain, Missing, Place, Resolved};
use super::dir::ImageDir;
use super::extents::Extents;
use crate::criu::header::Target;
use crate::error::{Error, Kind, Result};

/// Whether everything that a lazy restore may ask for is in `dir` and its parents: the pagemap of each
/// process, whole, and each page that it names.
///
/// # Errors
///
/// [`Kind::Image`] or [`Kind::Usage`], with the file that is missing, cut or empty, or the pages that stayed
/// with the source.
pub fn check_served(dir: &ImageDir) -> Result<()> {
    for target in served(dir)? {
        let chain = Chain::open(dir, target, Missing::Leave)?;
        if chain.extents().is_empty() {
            let path = dir.path().join(target.pagemap_name());
            let text = format!(
                "{} names no page: it was cut, or the dump failed",
                path.display()
            );
            return Err(Error::new(Kind::Image, text));
        }
        if let Some((why, extent)) = first_absent(&chain) {
            let error = chain.absence(extent);
            return Err(match why {
                Absence::WithSource => error.within(
                    "these images cannot be served (page-server --forward-lazy serves a lazy dump)",
                ),
                _ => error.within("these images cannot be served"),
            });
        }
    }
    Ok(())
}

/// Whether the dump in `dir` has kept pages of one of its processes for a lazy restore.
///
/// # Errors
///
/// The images are not complete.
pub fn check_lazy(dir: &ImageDir) -> Result<bool> {
    dir.processes()?;
    let mut lazy = false;
    for target in served(dir)? {
        let chain = Chain::open(dir, target, Missing::Leave)?;
        lazy |= chain.extents().iter().any(|extent| {
            matches!(
                extent.place,
                Place::Absent {
                    why: Absence::WithSource,
                    ..
                }
            )
        });
    }
    Ok(lazy)
}

/// The processes whose memory a lazy restore of `dir` asks for.
fn served(dir: &ImageDir) -> Result<Vec<Target>> {
    let there = dir.targets()?;
    let is_process = |target: &Target| matches!(target, Target::Process(_));
    // Images that were received need not have the rest of the dump beside them.
    if !dir.path().join("pstree.img").exists() {
        return Ok(there.into_iter().filter(is_process).collect());
    }
    let mut targets = Vec::new();
    for pid in dir.processes()? {
        let target = Target::Process(pid);
        if there.contains(&target) {
            targets.push(target);
        } else if dir.has_memory(pid)? != Some(false) {
            let path = dir.path().join(target.pagemap_name());
            let text = format!(
                "there is no {}: the images are not complete",
                path.display()
            );
            return Err(Error::new(Kind::Image, text));
        }
    }
    Ok(targets)
}

/// The first pages that no file of the chain has.
fn first_absent(chain: &Chain) -> Option<(Absence, &Resolved)> {
    chain
        .extents()
        .iter()
        .find_map(|extent| match extent.place {
            Place::Absent { why, .. } => Some((why, extent)),
            Place::Raw { .. } | Place::Blocks { .. } => None,
        })
}

/// Whether files can be made in `dir`.
pub(crate) fn check_writable(dir: &ImageDir) -> Result<()> {
    let made = tempfile::tempfile_in(dir.path());
    made.map(drop).map_err(|error| {
        let path = dir.path().display();
        let text = format!("cannot write images to {path} (-D)");
        Error::wrap(Kind::Usage, text, error)
    })
}

/// Whether `previous` can be what the images in `dir` are a difference to.
///
/// # Errors
///
/// [`Kind::Usage`]: it is `dir` itself, by whatever name, or is built on it.
pub fn check_previous(dir: &ImageDir, previous: &ImageDir) -> Result<()> {
    let path = dir.path().display();
    if dir.is_same(previous)? {
        let text = format!(
            "--prev-images-dir leads to the images directory {path} itself: a difference needs the directory \
             of the images before"
        );
        return Err(Error::new(Kind::Usage, text));
    }
    for parent in &previous.chain_dirs()? {
        if dir.is_same(parent)? {
            let text = format!(
                "--prev-images-dir {} is a difference to {path}, which is to be one to it",
                previous.path().display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
    }
    Ok(())
}

/// Whether images can be split into `dir` and `lazy_dir`: both stand alone.
///
/// # Errors
///
/// [`Kind::Usage`]: they are one directory, or one of them has a parent.
pub(crate) fn check_split(dir: &ImageDir, lazy_dir: &ImageDir) -> Result<()> {
    if dir.is_same(lazy_dir)? {
        let text = format!(
            "--split-lazy leads to the images directory {} itself: give another one",
            dir.path().display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    for dir in [dir, lazy_dir] {
        if dir.parent()?.is_some() {
            let text = format!(
                "{} has a parent, and images that --split-lazy makes have none: give an empty directory",
                dir.path().display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
    }
    Ok(())
}

/// Whether the parents of `dir`, if it has some, are whole. Pages that stayed with the source of a lazy dump
/// are nobody's fault.
pub(super) fn check_parents(dir: &ImageDir) -> Result<()> {
    match dir.chain_dirs()?.get(1) {
        Some(parent) => check_whole(parent),
        None => Ok(()),
    }
}

/// Whether the images in `parent`, to which others are to be a difference, are whole, with their own parents.
pub(super) fn check_whole(parent: &ImageDir) -> Result<()> {
    for target in parent.targets()? {
        let chain = Chain::open(parent, target, Missing::Leave)?;
        let damaged = chain.extents().iter().find(|extent| {
            matches!(extent.place, Place::Absent { why, .. } if why != Absence::WithSource)
        });
        if let Some(extent) = damaged {
            let path = parent.path().display();
            let error = chain.absence(extent);
            return Err(error.within(format!(
                "the images in {path} (--prev-images-dir) are not whole"
            )));
        }
    }
    Ok(())
}

/// Whether pages can be taken out of the files of the parents of `dir`.
///
/// # Errors
///
/// [`Kind::Usage`]: a file cannot be written, or several pagemaps name it.
pub fn check_parents_writable(dir: &ImageDir) -> Result<()> {
    let chain_dirs = dir.chain_dirs()?;
    for parent in chain_dirs.iter().skip(1) {
        let mut named: BTreeMap<u32, Target> = BTreeMap::new();
        for target in parent.targets()? {
            let Some(extents) = Extents::open(parent, target)? else {
                continue;
            };
            let path = parent.pages_path(extents.pages_id());
            if !path.exists() || path.metadata().is_ok_and(|file| file.len() == 0) {
                continue;
            }
            if let Some(other) = named.insert(extents.pages_id(), target) {
                let text = format!(
                    "--auto-dedup cannot take pages out of {}: {} and {} both name it",
                    path.display(),
                    other.pagemap_name(),
                    target.pagemap_name()
                );
                return Err(Error::new(Kind::Usage, text));
            }
            let opened = std::fs::File::options().write(true).open(&path);
            opened.map_err(|error| {
                let text = format!("--auto-dedup cannot write {}", path.display());
                Error::wrap(Kind::Usage, text, error)
            })?;
        }
    }
    Ok(())
}
