//! How well a tree's memory can be compressed, told from a sample.

use pageferry::units::PageSize;

use super::page_map::each_word;
use super::tree::Tree;
use super::{Contents, areas, memory};

/// Pages that are read one behind the other: a batch of ferry has up to 64.
const RUN_PAGES: u64 = 16;

/// About so many runs are read, however much memory there is: 8 MiB.
const RUNS: u64 = 128;

/// The level at which ferry begins.
const LEVEL: i32 = 1;

/// The share of `private_bytes`, the private memory of `tree`, that has to travel: pages of zeros need no bytes, and
/// others are compressed. 1 if nothing can be read.
pub(crate) fn packed_share(tree: &Tree, page: PageSize, private_bytes: u64) -> f64 {
    let every = (private_bytes >> page.shift()).div_ceil(RUNS * RUN_PAGES);
    let every = every.max(1) * RUN_PAGES;
    let mut run = vec![0; usize::try_from(RUN_PAGES << page.shift()).unwrap_or(0)];
    let (mut seen, mut packed, mut count) = (0_usize, 0_usize, 0_u64);
    for member in tree.members() {
        for area in areas(member) {
            if !matches!(area.contents, Contents::Private { .. }) {
                continue;
            }
            let mut starts = Vec::new();
            each_word(member.pid, area.range, page, |address, word| {
                if memory::is_private(word) {
                    if count.is_multiple_of(every) {
                        starts.push(address);
                    }
                    count += 1;
                }
            });
            for start in starts {
                let left = usize::try_from(area.range.end().get() - start).unwrap_or(usize::MAX);
                let most = left.min(run.len());
                let read = memory::read_memory(member.pid, start, &mut run[..most]);
                seen += read;
                packed += packed_bytes(&run[..read], page);
            }
        }
    }
    #[allow(clippy::cast_precision_loss)]
    match seen {
        0 => 1.0,
        seen => packed as f64 / seen as f64,
    }
}

/// Bytes that whole pages need on the wire.
fn packed_bytes(bytes: &[u8], page: PageSize) -> usize {
    let pages = bytes.chunks_exact(page.as_usize());
    let others: Vec<u8> = pages
        .filter(|page| page.iter().any(|&byte| byte != 0))
        .flatten()
        .copied()
        .collect();
    if others.is_empty() {
        return 0;
    }
    let packed = zstd::bulk::compress(&others, LEVEL);
    packed.map_or(others.len(), |packed| packed.len().min(others.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_need_nothing_and_noise_all_its_bytes() {
        let page = PageSize::new(4096).unwrap();
        let mut random = fastrand::Rng::with_seed(5);
        let noise: Vec<u8> = (0..8192).map(|_| random.u8(..)).collect();
        assert_eq!(packed_bytes(&[0; 8192], page), 0);
        assert_eq!(packed_bytes(&noise, page), 8192);
        assert_eq!(
            packed_bytes(&[&noise[..4096], &[0; 4096]].concat(), page),
            4096
        );
        assert!(packed_bytes(&[7; 8192], page) < 100);
    }
}
