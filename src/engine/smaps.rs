//! What /proc/PID/smaps and /proc/PID/status tell of a process.

use crate::units::PageRange;

/// Flag of a mapping under a userfaultfd that is told of missing pages.
pub(super) const MISSING: &str = "um";

/// Flags of mappings whose pages children do not get: they find zeros (MADV_WIPEONFORK, MAP_DROPPABLE), or no mapping
/// (MADV_DONTFORK).
pub(super) const NOT_INHERITED: [&str; 2] = ["wf", "dc"];

/// Flag of a mapping that cannot be changed any more (mseal, Linux 6.10).
pub(super) const SEALED: &str = "sl";

/// The mappings with `flag` in their line VmFlags, by address.
pub(super) fn mappings_with(flag: &str, smaps: &str) -> Vec<PageRange> {
    mappings_with_any(&[flag], smaps)
}

/// The mappings with one of `wanted` in their line VmFlags, by address.
pub(super) fn mappings_with_any(wanted: &[&str], smaps: &str) -> Vec<PageRange> {
    let mut current = None;
    let mut found = Vec::new();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_whitespace().any(|has| wanted.contains(&has)) {
                found.extend(current);
            }
        } else if let Some(range) = mapping(line) {
            current = Some(range);
        }
    }
    found
}

/// The mappings of `maps`, a /proc/PID/maps, that the process may not read, by address.
pub(super) fn unreadable(maps: &str) -> Vec<PageRange> {
    let unreadable = |line: &&str| {
        let permissions = line.split_whitespace().nth(1);
        permissions.is_some_and(|permissions| permissions.starts_with('-'))
    };
    maps.lines()
        .filter(unreadable)
        .filter_map(mapping)
        .collect()
}

/// The mappings of `maps`, a /proc/PID/maps, by address.
pub(super) fn mappings(maps: &str) -> Vec<PageRange> {
    maps.lines().filter_map(mapping).collect()
}

fn mapping(line: &str) -> Option<PageRange> {
    let (start, rest) = line.split_once('-')?;
    let end = rest.split_once(' ')?.0;
    let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).ok());
    let (start, end) = (start?, end?);
    (start <= end).then(|| PageRange::new(start, end))
}

/// The process that traces the one of `status`, a /proc/PID/status: 0 if none does.
pub(super) fn tracer(status: &str) -> Option<i32> {
    field(status, "TracerPid:")?.trim().parse().ok()
}

/// The pid in the innermost PID namespace.
pub(super) fn inner_pid(status: &str) -> Option<u32> {
    field(status, "NSpid:")?
        .split_whitespace()
        .last()?
        .parse()
        .ok()
}

/// The rest of the line that begins with `name`.
pub(super) fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart_by_their_flags() {
        let smaps = "00400000-00452000 r-xp 00000000 08:02 1 /bin/x\nSize: 328 kB\nVmFlags: rd ex mr \n\
                     7f0000000000-7f0000002000 rw-p 00000000 00:00 0\nSize: 8 kB\nVmFlags: rd wr mr um ac wf \n";
        let range = PageRange::new(0x7f00_0000_0000, 0x7f00_0000_2000);
        assert_eq!(mappings_with(MISSING, smaps), [range]);
        assert_eq!(mappings_with_any(&NOT_INHERITED, smaps), [range]);
        assert_eq!(
            mappings_with("ex", smaps),
            [PageRange::new(0x40_0000, 0x45_2000)]
        );
    }

    #[test]
    fn mappings_without_permission_to_read_are_found() {
        let maps = "00400000-00452000 r-xp 00000000 08:02 1 /bin/x\n\
                    7f0000000000-7f0000002000 ---p 00000000 00:00 0\n\
                    7f0000002000-7f0000003000 -w-p 00000000 00:00 0\n";
        let both = [(0, 2), (2, 3)].map(|(start, end): (u64, u64)| {
            let base = 0x7f00_0000_0000;
            PageRange::new(base + (start << 12), base + (end << 12))
        });
        assert_eq!(unreadable(maps), both);
    }

    #[test]
    fn the_tracer_is_told_by_the_status() {
        assert_eq!(tracer("Name:\tx\nTracerPid:\t4711\nUid:\t0\n"), Some(4711));
        assert_eq!(tracer("Name:\tx\n"), None);
    }
}
