//! Reads and checks the images before the restore begins.

use super::RestoreConfig;
use crate::criu::header::Target;
use crate::engine::start_wait::Attempt;
use crate::error::{Error, Kind, Result};
use crate::image::chain::{Absence, Chain, Missing, Place};
use crate::image::check::check_previous;
use crate::image::dir::ImageDir;
use crate::image::rewrite;
use crate::sys::process::page_size;

/// Whether the images of every process are there, with all that cannot come from the source. They may still be
/// written or copied.
///
/// # Errors
///
/// What will not change by waiting: the parents go round in a ring, an earlier round is the directory itself, or pages
/// stayed with a source and none is given.
pub(super) fn look_at_images(config: &RestoreConfig) -> Result<Attempt<()>> {
    let page =
        page_size().map_err(|error| Error::wrap(Kind::Unsupported, "cannot work here", error))?;
    let images = ImageDir::open_any(&config.images_dir, page)?;
    images.chain_dirs()?;
    if let Some(earlier) = config.prev_images_dir.as_deref() {
        let earlier = ImageDir::open_any(&images.path().join(earlier), page)
            .map_err(|error| error.within("--prev-images-dir"))?;
        check_previous(&images, &earlier)?;
    }
    let pids = match images.processes() {
        Ok(pids) => pids,
        Err(error) => return Ok(Attempt::NotYet(error)),
    };
    for pid in pids {
        match images.has_memory(pid) {
            Ok(Some(true)) => {}
            Ok(Some(false)) => continue,
            Ok(None) => {
                let path = images.path().join(format!("core-{pid}.img"));
                let text = format!(
                    "there is no {}: the images are not complete",
                    path.display()
                );
                return Ok(Attempt::NotYet(Error::new(Kind::Image, text)));
            }
            Err(error) => return Ok(Attempt::NotYet(error)),
        }
        if let Some(missing) = look_at_process(config, &images, pid)? {
            return Ok(Attempt::NotYet(missing));
        }
    }
    Ok(Attempt::Done(()))
}

/// Whatever made the images: a restore must not take other pages for those of huge mappings, nor zeros for those of children.
pub(super) fn finish_images(config: &RestoreConfig) -> Result<()> {
    let page =
        page_size().map_err(|error| Error::wrap(Kind::Unsupported, "cannot work here", error))?;
    let finished = rewrite::finish(&ImageDir::open(&config.images_dir, page)?)?;
    let dir = config.images_dir.display();
    if finished.filled_pages > 0 {
        tracing::info!(
            "{} pages that CRIU does not look for in parents are in {dir} now",
            finished.filled_pages
        );
    }
    if finished.zero_pages > 0 {
        tracing::info!(
            "{} pages of zeros were added to locked memory in {dir}: children have pages of their own there",
            finished.zero_pages
        );
    }
    Ok(())
}

/// What is missing of the images of `pid`.
fn look_at_process(config: &RestoreConfig, images: &ImageDir, pid: u32) -> Result<Option<Error>> {
    let target = Target::Process(pid);
    let mappings = images.mappings(pid);
    let chain = match mappings.and_then(|_| Chain::open(images, target, Missing::Leave)) {
        Ok(chain) => chain,
        Err(error) => return Ok(Some(error)),
    };
    for extent in chain.extents() {
        let Place::Absent { why, .. } = extent.place else {
            continue;
        };
        match (why, &config.source) {
            (Absence::WithSource, None) => {
                let text = "these images need their source: give --page-server with --address and --port, or \
                            --unix PATH";
                let error = chain.absence(extent).within(text);
                return Err(Error::new(Kind::Usage, error.to_string()));
            }
            (Absence::WithSource, Some(_)) => {}
            // A page server has all that the images name. A dump has no more than it kept.
            (_, Some(_)) if !config.ferry && extent.lazy => {}
            _ => return Ok(Some(chain.absence(extent))),
        }
    }
    if chain.extents().is_empty() {
        let path = images.path().join(target.pagemap_name());
        let text = format!("{} names no page: it is not complete", path.display());
        return Ok(Some(Error::new(Kind::Image, text)));
    }
    Ok(None)
}
