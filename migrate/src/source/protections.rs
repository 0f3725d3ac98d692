//! Memory of children that a restore gives another protection than it had.
//!
//! CRIU restores anonymous memory that a child has as its parent has it, by address, by a fork of the parent's mapping. It
//! makes that mapping with the parent's protection and PROT_WRITE, and sets the child's protection only where the child's
//! is without PROT_WRITE (findings/child-gets-parents-protection.sh). So it was with all versions that were tried.
//!
//! | | grandparent | parent | child | restored |
//! |---|---|---|---|---|
//! | | - | `rw-p` | `rwxp` | `rw-p` |
//! | | - | `---p` | `rw-p` | `-w-p` |
//! | inherited twice | `rw-p` | `r-xp` | `rwxp` | `rw-p` |
//! | no difference that matters | - | `r--p` | `rw-p` | `rw-p` |
//! | not writable | - | `rwxp` | `r-xp` | `r-xp` |

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use pageferry::units::PageRange;

use crate::rounds::Tree;

/// Mappings of one process that its warning shows.
const SHOWN_MAX: usize = 3;

/// Flags of /proc/PID/smaps: huge pages of hugetlbfs, which are restored otherwise, and a stack that grows.
const HUGE: &str = "ht";
const GROWS_DOWN: &str = "gd";

/// What may be done with a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Protection {
    read: bool,
    write: bool,
    execute: bool,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |is: bool, letter| if is { letter } else { '-' };
        let (read, write) = (letter(self.read, 'r'), letter(self.write, 'w'));
        write!(f, "{read}{write}{}p", letter(self.execute, 'x'))
    }
}

/// A private mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapping {
    range: PageRange,
    protection: Protection,
    /// Whether it is of no file. Of files it is not foreseen which are restored by a fork.
    anonymous: bool,
}

/// A private mapping, and the protection that a restore makes it with.
type Restored = (Mapping, Protection);

/// A writable mapping of a child, and what becomes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Changed {
    range: PageRange,
    from: Protection,
    to: Protection,
}

/// What a user should know of the memory of `tree`: each string is of one process.
pub(super) fn warnings(tree: &Tree) -> Vec<String> {
    let mut restored: BTreeMap<i32, Vec<Restored>> = BTreeMap::new();
    let mut warnings = Vec::new();
    // A parent comes before its children.
    for member in tree.members() {
        let read = |file| fs::read_to_string(format!("/proc/{}/{file}", member.pid));
        // It may have ended.
        let (Ok(maps), Ok(status)) = (read("maps"), read("status")) else {
            continue;
        };
        let own: Vec<Mapping> = maps.lines().filter_map(mapping).collect();
        let parent = parent_of(&status).filter(|parent| restored.contains_key(parent));
        let none = Vec::new();
        let of_parent = parent
            .and_then(|parent| restored.get(&parent))
            .unwrap_or(&none);
        let (own, mut changed) = restore(own, of_parent);
        if let Some(parent) = parent.filter(|_| !changed.is_empty()) {
            let [here, there] = [member.pid, parent].map(flags_by_start);
            changed.retain(|one| is_inherited(one.range, &here, &there));
            warnings.extend(warning(member.pid, parent, &changed));
        }
        restored.insert(member.pid, own);
    }
    warnings
}

/// What a restore makes of the private mappings of a process whose parent has `of_parent`, and which of them are not as
/// they were.
fn restore(own: Vec<Mapping>, of_parent: &[Restored]) -> (Vec<Restored>, Vec<Changed>) {
    let by_start: BTreeMap<u64, &Restored> = of_parent
        .iter()
        .map(|restored| (restored.0.range.start().get(), restored))
        .collect();
    let mut changed = Vec::new();
    let restored = own.into_iter().map(|mapping| {
        let same = by_start.get(&mapping.range.start().get());
        let same = same.filter(|(other, _)| {
            other.range == mapping.range && other.anonymous && mapping.anonymous
        });
        let with_write = Protection {
            write: true,
            ..mapping.protection
        };
        let to = same.map_or(with_write, |(_, protection)| *protection);
        if mapping.protection.write && to != mapping.protection {
            changed.push(Changed {
                range: mapping.range,
                from: mapping.protection,
                to,
            });
        }
        (mapping, to)
    });
    (restored.collect(), changed)
}

/// Whether the mapping of a child at `range` is restored by a fork of its parent's, as the flags of both tell.
fn is_inherited(
    range: PageRange,
    here: &BTreeMap<u64, Vec<String>>,
    there: &BTreeMap<u64, Vec<String>>,
) -> bool {
    let has = |flags: &BTreeMap<u64, Vec<String>>, flag: &str| {
        let flags = flags.get(&range.start().get());
        flags.is_some_and(|flags| flags.iter().any(|one| one == flag))
    };
    !has(here, HUGE) && !has(there, HUGE) && has(here, GROWS_DOWN) == has(there, GROWS_DOWN)
}

fn warning(pid: i32, parent: i32, changed: &[Changed]) -> Option<String> {
    if changed.is_empty() {
        return None;
    }
    let shown = changed.iter().take(SHOWN_MAX).map(|one| {
        let Changed { range, from, to } = one;
        format!("{range} ({from}) as {to}")
    });
    let shown: Vec<String> = shown.collect();
    let more = match changed.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    Some(format!(
        "CRIU restores memory of pid {pid} with the protection that its parent {parent} has there: {}{more}",
        shown.join(", ")
    ))
}

/// The private mapping of a line of /proc/PID/maps, if it is one that a dump would hold.
fn mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).ok());
    let (start, end) = (start?, end?);
    let permissions = fields.next()?.as_bytes();
    let inode: u64 = fields.nth(2)?.parse().ok()?;
    let path = fields.next().unwrap_or_default();
    let of_kernel = ["[vdso]", "[vvar", "[vsyscall]", "[uprobes]"];
    let is_private = permissions.get(3) == Some(&b'p') && start < end;
    if !is_private || of_kernel.iter().any(|name| path.starts_with(name)) {
        return None;
    }
    let may = |at: usize| permissions.get(at).is_some_and(|letter| *letter != b'-');
    Some(Mapping {
        range: PageRange::new(start, end),
        protection: Protection {
            read: may(0),
            write: may(1),
            execute: may(2),
        },
        anonymous: inode == 0,
    })
}

/// The flags of the mappings of a process, by their first address.
fn flags_by_start(pid: i32) -> BTreeMap<u64, Vec<String>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut start = None;
    let mut found = BTreeMap::new();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags = flags.split_whitespace().map(str::to_owned).collect();
            found.extend(start.take().map(|start| (start, flags)));
        } else if let Some((number, _)) = line.split_once('-')
            && let Ok(number) = u64::from_str_radix(number, 16)
        {
            start = Some(number);
        }
    }
    found
}

fn parent_of(status: &str) -> Option<i32> {
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(lines: &[&str]) -> Vec<Mapping> {
        lines.iter().copied().filter_map(mapping).collect()
    }

    fn told(parents: &[&str], children: &[&str]) -> Vec<String> {
        let (of_parent, _) = restore(mappings(parents), &[]);
        let (_, changed) = restore(mappings(children), &of_parent);
        let shown = changed
            .iter()
            .map(|one| format!("{} -> {}", one.from, one.to));
        shown.collect()
    }

    #[test]
    fn what_a_child_may_write_has_the_protection_of_its_parent() {
        let line = |permissions: &str| format!("1000-3000 {permissions} 00000000 00:00 0");
        let each = [
            ("rw-p", "rwxp", &["rwxp -> rw-p"][..]),
            ("---p", "rw-p", &["rw-p -> -w-p"]),
            ("r--p", "rw-p", &[]),
            ("rwxp", "rw-p", &["rw-p -> rwxp"]),
            ("rwxp", "r-xp", &[]),
            ("rw-p", "rw-p", &[]),
            ("rw-s", "rwxp", &[]),
        ];
        for (parent, child, expected) in each {
            let found = told(&[&line(parent)], &[&line(child)]);
            assert_eq!(found, expected, "{parent} {child}");
        }
    }

    #[test]
    fn only_what_is_the_same_memory_at_the_same_addresses_is_inherited() {
        let parent = "1000-3000 rw-p 00000000 00:00 0";
        for child in [
            "1000-2000 rwxp 00000000 00:00 0",
            "1000-3000 rwxp 00000000 08:01 8 /lib/b",
            "1000-3000 rwxs 00000000 00:00 0",
        ] {
            assert_eq!(told(&[parent], &[child]), [""; 0], "{child}");
        }
        let child = "1000-3000 rwxp 00000000 00:00 0 [anon:a b]";
        assert_eq!(told(&[parent], &[child]), ["rwxp -> rw-p"]);
        let file = |permissions: &str| format!("1000-3000 {permissions} 00000000 08:01 7 /lib/a");
        assert_eq!(told(&[&file("rw-p")], &[&file("rwxp")]), [""; 0]);
        let of_kernel = "1000-3000 rw-p 00000000 00:00 0 [vvar_vclock]";
        assert_eq!(mapping(of_kernel), None);
    }

    #[test]
    fn a_grandchild_has_what_its_first_ancestor_had() {
        let line = |permissions: &str| format!("1000-3000 {permissions} 00000000 00:00 0 [heap]");
        let (first, _) = restore(mappings(&[&line("rw-p")]), &[]);
        let (second, changed) = restore(mappings(&[&line("r-xp")]), &first);
        assert_eq!(changed, []);
        let (_, changed) = restore(mappings(&[&line("rwxp")]), &second);
        let text = warning(3, 2, &changed).unwrap();
        assert!(text.contains("0x1000-0x3000 (rwxp) as rw-p"), "{text}");
        assert_eq!(warning(3, 2, &[]), None);
    }

    #[test]
    fn huge_pages_and_growing_stacks_are_told_by_their_flags() {
        let range = PageRange::new(0x1000, 0x3000);
        let flags = |flags: &[&str]| {
            let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
            BTreeMap::from([(0x1000, flags)])
        };
        assert!(is_inherited(range, &flags(&["rd"]), &flags(&["wr"])));
        assert!(is_inherited(range, &flags(&["gd"]), &flags(&["gd"])));
        assert!(!is_inherited(range, &flags(&["ht"]), &flags(&["ht"])));
        assert!(!is_inherited(range, &flags(&["gd"]), &flags(&[])));
    }
}
