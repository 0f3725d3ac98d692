//! Whether the destination's disks have room for all that is to come. Pure.

use pageferry::migration::messages::TreeRoom;

/// Room that is to stay free, bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// Something that comes, and where there is room for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Coming {
    pub(super) what: String,
    pub(super) bytes: u64,
    pub(super) room: TreeRoom,
}

/// What is in the way: one line for each file system that is too small, which names all that is to go there.
pub(super) fn problems(coming: &[Coming]) -> Vec<String> {
    let mut devices: Vec<u64> = coming.iter().map(|one| one.room.device).collect();
    devices.sort_unstable();
    devices.dedup();
    devices
        .into_iter()
        .filter_map(|device| problem(coming, device))
        .collect()
}

fn problem(coming: &[Coming], device: u64) -> Option<String> {
    let there = || coming.iter().filter(|one| one.room.device == device);
    let missing = |one: &Coming| one.bytes.saturating_sub(one.room.held_bytes);
    let needed = there().map(missing).fold(0, u64::saturating_add);
    let needed = needed.saturating_add(SPARE_BYTES);
    let available = there().map(|one| one.room.available_bytes).min()?;
    (needed > available).then(|| {
        let list: Vec<String> = there()
            .filter(|one| missing(one) > 0)
            .map(|one| format!("{} {} MiB", one.what, mebibytes(missing(one))))
            .collect();
        format!(
            "the destination has {} MiB of room, {} MiB are needed on one file system: {}, and {} MiB to spare",
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

    fn coming(what: &str, mib: u64, room: (u64, u64, u64)) -> Coming {
        let (device, available, held) = room;
        Coming {
            what: what.to_owned(),
            bytes: mib << 20,
            room: TreeRoom {
                device,
                available_bytes: available << 20,
                held_bytes: held << 20,
            },
        }
    }

    #[test]
    fn what_shares_a_file_system_shares_its_room() {
        let images = coming("images", 100, (1, 1000, 0));
        let root = coming("the root file system", 850, (1, 1000, 0));
        let volume = coming("/data", 100, (2, 100, 0));
        assert!(problems(std::slice::from_ref(&images)).is_empty());
        let found = problems(&[images.clone(), root.clone(), volume.clone()]);
        assert_eq!(
            found,
            [
                "the destination has 1000 MiB of room, 1014 MiB are needed on one file system: images 100 MiB, the root \
                 file system 850 MiB, and 64 MiB to spare",
                "the destination has 100 MiB of room, 164 MiB are needed on one file system: /data 100 MiB, and 64 MiB \
                 to spare"
            ]
        );
        // What is there already needs no room.
        let begun = coming("the root file system", 850, (1, 1000, 800));
        assert!(problems(&[images, begun]).is_empty());
        assert!(problems(&[]).is_empty());
        let endless = Coming {
            bytes: u64::MAX,
            ..volume
        };
        assert_eq!(problems(&[endless.clone(), endless]).len(), 1);
    }
}
