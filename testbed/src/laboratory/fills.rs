//! Missing memory filled piece by piece: what a call takes by what it does and by the size of the piece.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use pageferry::sys::laboratory::{Area, Backing, Modes, Watched};
use pageferry::sys::process::page_size;
use pageferry::sys::uffd::{Filled, Wake};

use super::{Scale, Unsupported, need};

/// See [`super::Group::metrics`].
pub(super) const METRICS: [&str; 3] = ["ns a page", "µs a call", "GiB/s"];

const GIB: f64 = (1_u64 << 30) as f64;

/// A call that fills memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    Copy,
    Zero,
    Continue,
    Move,
    Poison,
}

impl Fill {
    pub(super) const ALL: [Fill; 5] = [
        Fill::Copy,
        Fill::Zero,
        Fill::Continue,
        Fill::Move,
        Fill::Poison,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Fill::Copy => "UFFDIO_COPY",
            Fill::Zero => "UFFDIO_ZEROPAGE",
            Fill::Continue => "UFFDIO_CONTINUE, shared memory",
            Fill::Move => "UFFDIO_MOVE",
            Fill::Poison => "UFFDIO_POISON",
        }
    }

    /// Fails with [`Unsupported`] if the kernel has it not. Returns what to agree on and to register for.
    fn needs(self) -> Result<(u64, Modes)> {
        let (feature, name, since, modes) = match self {
            Fill::Copy | Fill::Zero => (0, "userfaultfd", "4.3", Modes::MISSING),
            Fill::Continue => (
                Modes::FEATURE_MINOR_SHMEM,
                "MINOR_SHMEM",
                "5.14",
                Modes::MINOR,
            ),
            Fill::Move => (Modes::FEATURE_MOVE, "MOVE", "6.8", Modes::MISSING),
            Fill::Poison => (Modes::FEATURE_POISON, "POISON", "6.6", Modes::MISSING),
        };
        need(feature, name, since)?;
        Ok((feature, modes))
    }
}

/// Fills an area once, in pieces of `piece` bytes.
pub(super) fn round(fill: Fill, piece: usize, scale: &Scale) -> Result<Vec<f64>> {
    let (features, modes) = fill.needs()?;
    let page = page_size()?.as_usize();
    if piece < page {
        return Err(Unsupported(format!("pages have {page} bytes here")).into());
    }
    ensure!(
        piece.is_multiple_of(page) && scale.bytes.is_multiple_of(piece),
        "pieces of {piece} bytes do not fit {} bytes of pages of {page}",
        scale.bytes
    );
    let backing = match fill {
        Fill::Continue => Backing::Shared,
        _ => Backing::Private,
    };
    let area = Area::new(scale.bytes, backing)?;
    if fill == Fill::Continue {
        touch(&area, page);
        area.forget(0..scale.bytes)?;
    }
    let watched = Watched::new(area, features, modes, true)?;
    let content = vec![1; piece];
    let source = Area::new(scale.bytes, Backing::Private)?;
    if fill == Fill::Move {
        touch(&source, page);
    }
    let begun = Instant::now();
    for start in (0..scale.bytes).step_by(piece) {
        let part = start..start + piece;
        fill_part(fill, &watched, &content, &source, part)
            .with_context(|| format!("{} of {piece} bytes", fill.name()))?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    check(fill, &watched, scale.bytes - 1)?;
    Ok(vec![
        seconds * 1e9 / (scale.bytes / page) as f64,
        seconds * 1e6 / (scale.bytes / piece) as f64,
        scale.bytes as f64 / seconds / GIB,
    ])
}

/// Writes to each page, so that it is there.
pub(super) fn touch(area: &Area, page: usize) {
    for offset in (0..area.length()).step_by(page) {
        area.store(offset, 1);
    }
    area.store(area.length() - 1, 1);
}

/// A call may fill a part alone: then the rest is asked for.
fn fill_part(
    fill: Fill,
    watched: &Watched,
    content: &[u8],
    source: &Area,
    mut part: Range<usize>,
) -> Result<()> {
    while !part.is_empty() {
        let range = watched.area().range(part.clone())?;
        let filled = match fill {
            Fill::Copy => watched
                .uffd()
                .copy(range.start(), &content[..part.len()], Wake::Now)?,
            Fill::Zero => watched.uffd().zero(range)?,
            Fill::Continue => watched.resume(part.clone())?,
            Fill::Move => watched.move_from(source, part.clone())?,
            Fill::Poison => watched.uffd().poison(range)?,
        };
        match filled {
            Filled::Bytes(bytes) => part.start += usize::try_from(bytes)?,
            Filled::Changing => {}
            other => bail!("{other:?} at {part:?}"),
        }
    }
    Ok(())
}

/// The last byte is what it should be: the call has done its work.
fn check(fill: Fill, watched: &Watched, last: usize) -> Result<()> {
    let expected = match fill {
        Fill::Copy | Fill::Continue | Fill::Move => 1,
        Fill::Zero => 0,
        // To read it would end the process.
        Fill::Poison => return Ok(()),
    };
    let byte = watched.area().load(last);
    ensure!(byte == expected, "{} left {byte}", fill.name());
    Ok(())
}
