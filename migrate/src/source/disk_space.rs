//! Whether the disks of the destination have space for all that is sent. Pure.

use pageferry::migration::messages::TreeSpace;

/// Space that is to stay free, bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// What is sent to one file system, and the space there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SpaceNeed {
    pub(super) what: String,
    pub(super) bytes: u64,
    pub(super) space: TreeSpace,
}

/// What is missing: one line for each file system that is too small, which names all that is to go there.
pub(super) fn problems(needs: &[SpaceNeed]) -> Vec<String> {
    let mut devices: Vec<u64> = needs.iter().map(|one| one.space.device).collect();
    devices.sort_unstable();
    devices.dedup();
    devices
        .into_iter()
        .filter_map(|device| problem(needs, device))
        .collect()
}

fn problem(needs: &[SpaceNeed], device: u64) -> Option<String> {
    let there = || needs.iter().filter(|one| one.space.device == device);
    let missing = |one: &SpaceNeed| one.bytes.saturating_sub(one.space.held_bytes);
    let needed = there().map(missing).fold(0, u64::saturating_add);
    let needed = needed.saturating_add(SPARE_BYTES);
    let available = there().map(|one| one.space.available_bytes).min()?;
    (needed > available).then(|| {
        let list: Vec<String> = there()
            .filter(|one| missing(one) > 0)
            .map(|one| format!("{} {} MiB", one.what, mebibytes(missing(one))))
            .collect();
        format!(
            "the destination has {} MiB of free space, {} MiB are needed on one file system: {}, and {} MiB to spare",
            available >> 20,
            mebibytes(needed),
            list.join(", "),
            SPARE_BYTES >> 20
        )
    })
}

/// Rounded up: what is needed is more than nothing.
fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(what: &str, mib: u64, space: (u64, u64, u64)) -> SpaceNeed {
        let (device, available, held) = space;
        SpaceNeed {
            what: what.to_owned(),
            bytes: mib << 20,
            space: TreeSpace {
                device,
                available_bytes: available << 20,
                held_bytes: held << 20,
            },
        }
    }

    #[test]
    fn what_shares_a_file_system_shares_its_space() {
        let images = need("images", 100, (1, 1000, 0));
        let root = need("the root file system", 850, (1, 1000, 0));
        let volume = need("/data", 100, (2, 100, 0));
        assert!(problems(std::slice::from_ref(&images)).is_empty());
        let found = problems(&[images.clone(), root.clone(), volume.clone()]);
        assert_eq!(
            found,
            [
                "the destination has 1000 MiB of free space, 1014 MiB are needed on one file system: images 100 MiB, the root \
                 file system 850 MiB, and 64 MiB to spare",
                "the destination has 100 MiB of free space, 164 MiB are needed on one file system: /data 100 MiB, and 64 MiB \
                 to spare"
            ]
        );
        // What is there already needs no space.
        let begun = need("the root file system", 850, (1, 1000, 800));
        assert!(problems(&[images, begun]).is_empty());
        assert!(problems(&[]).is_empty());
        let endless = SpaceNeed {
            bytes: u64::MAX,
            ..volume
        };
        assert_eq!(problems(&[endless.clone(), endless]).len(), 1);
    }
}
