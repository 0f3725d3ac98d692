//! The entries of an archive that somebody else wrote, one after another.
//!
//! The library keeps the records before an entry in memory: its long name, its extended attributes. It knows no limit
//! for them, and compressed they can be anything. So what is read to come to the next entry is limited here.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use pageferry::limits::ARCHIVE_RECORDS_BYTES_MAX;
use tar::{Archive, Entry};

/// What an archive is read from, which says how many bytes may be read.
pub(super) struct Limited<R> {
    from: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::other(format!(
                "there are more than {ARCHIVE_RECORDS_BYTES_MAX} bytes of records before an entry: this is no \
                 archive of a container"
            )));
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        let room = buffer.len().min(most);
        let read = self.from.read(&mut buffer[..room])?;
        self.left.set(left - read as u64);
        Ok(read)
    }
}

/// Gives `take` each entry of the archive `from`, and its number from 0 on. `set` says how entries are unpacked.
pub(super) fn for_each<R: Read>(
    from: R,
    set: impl FnOnce(&mut Archive<Limited<R>>),
    mut take: impl FnMut(usize, &mut Entry<'_, Limited<R>>) -> io::Result<()>,
) -> io::Result<()> {
    let left = Rc::new(Cell::new(u64::MAX));
    let mut archive = Archive::new(Limited {
        from,
        left: Rc::clone(&left),
    });
    set(&mut archive);
    let mut entries = archive.entries()?;
    for count in 0.. {
        left.set(ARCHIVE_RECORDS_BYTES_MAX);
        let Some(entry) = entries.next() else {
            break;
        };
        left.set(u64::MAX);
        let mut entry = entry?;
        take(count, &mut entry)?;
        // What was not taken is not what comes before the next one. Of one with holes more could be read than there is.
        if !entry.header().entry_type().is_gnu_sparse() {
            io::copy(&mut entry, &mut io::sink())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of one file, with a record of so many bytes before it.
    fn archive(kind: tar::EntryType, record: u64) -> impl Read {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(record);
        header.set_cksum();
        let before = io::Cursor::new(header.as_bytes().to_vec());
        let padded = record.next_multiple_of(512);
        let mut rest = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5000);
        rest.append_data(&mut header, "file", &[7; 5000][..])
            .unwrap();
        let rest = io::Cursor::new(rest.into_inner().unwrap());
        before.chain(io::repeat(b'a').take(padded)).chain(rest)
    }

    #[test]
    fn records_have_a_limit_and_entries_have_none() {
        let count = |kind, record| {
            let mut bytes = 0;
            let walked = for_each(
                archive(kind, record),
                |_| {},
                |_, entry| {
                    bytes += entry.size();
                    Ok(())
                },
            );
            walked.map(|()| bytes)
        };
        let most = ARCHIVE_RECORDS_BYTES_MAX;
        let long_name = tar::EntryType::GNULongName;
        assert_eq!(count(long_name, most / 2).unwrap(), 5000);
        // Beyond what any machine has.
        for kind in [
            long_name,
            tar::EntryType::GNULongLink,
            tar::EntryType::XHeader,
        ] {
            let error = count(kind, most << 30).unwrap_err().to_string();
            assert!(error.contains("of records"), "{error}");
        }
        // One that is left alone.
        let ignored = count(tar::EntryType::Regular, 8 * most);
        assert_eq!(ignored.unwrap(), 8 * most + 5000);
    }
}
