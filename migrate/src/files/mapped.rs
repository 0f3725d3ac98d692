//! Files that processes have mapped for writing.
//!
//! A write to a mapped page changes a file's times only if the page was clean, and on tmpfs never. So what is mapped
//! is read at each scan.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;

/// The last parts of the paths of all files that these processes have mapped for writing.
///
/// Paths are those of a container, and mounts are in the way: names alone say too much rather than too little.
pub(super) fn names(pids: &[i32]) -> HashSet<OsString> {
    let maps = pids
        .iter()
        .filter_map(|pid| fs::read(format!("/proc/{pid}/maps")).ok());
    maps.flat_map(|text| of_table(&text)).collect()
}

fn of_table(text: &[u8]) -> Vec<OsString> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(of_line).collect()
}

/// `START-END rw-s OFFSET DEV INODE          /PATH`
fn of_line(line: &[u8]) -> Option<OsString> {
    let mut fields = line
        .split(|byte| *byte == b' ')
        .filter(|field| !field.is_empty());
    let access = fields.nth(1)?;
    if access.get(1) != Some(&b'w') || access.get(3) != Some(&b's') {
        return None;
    }
    let slash = line.iter().position(|byte| *byte == b'/')?;
    let path = line.get(slash..)?;
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    Some(OsString::from_vec(unescaped(name)))
}

/// Undoes what the kernel does to newlines.
fn unescaped(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, after)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(after) => {
                plain.push(b'\n');
                rest = after;
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_written_through_a_mapping_are_named() {
        let table = b"\
7f00-7f01 rw-s 00000000 08:01 17                         /data/db file\\012x\n\
7f01-7f02 r--s 00000000 08:01 18                         /data/read\n\
7f02-7f03 rw-p 00000000 08:01 19                         /data/private\n\
7f03-7f04 rw-s 00000000 00:01 20                         /memfd:a (deleted)\n\
7f04-7f05 rwxs 00000000 08:01 21                         /data/gone (deleted)\n\
7f05-7f06 rw-p 00000000 00:00 0 \n";
        let found = of_table(table);
        assert_eq!(found, ["db file\nx", "memfd:a", "gone"]);
        for cut in 0..table.len() {
            of_table(&table[..cut]);
        }
    }
}
