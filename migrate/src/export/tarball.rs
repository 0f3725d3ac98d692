//! Entries of a layer, as POSIX tar with extended headers (PAX), written to the letter of the OCI's layer format.
//!
//! The same entries give the same bytes: no name of a user, no time of our own, records in one order.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use super::marks::{OPAQUE, WHITEOUT, Xattrs};

/// Bytes that a name has room for in an entry's own header.
const NAME_BYTES: usize = 100;

/// What an attribute's name has before it as a record's name.
const XATTR: &str = "SCHILY.xattr.";

/// A time of a file: seconds since 1970, rounded down, and nanoseconds beyond them.
pub(super) type Time = (i64, u32);

/// What all entries have.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    /// Permissions, with set-user-ID, set-group-ID and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Sorted by name.
    pub(super) xattrs: Xattrs,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry<'a> {
    Directory,
    Symlink(&'a [u8]),
    /// Another name of an earlier entry, whose path this is.
    HardLink(&'a [u8]),
    Fifo,
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

/// A layer that is being written.
pub(super) struct Layer<W: Write> {
    archive: tar::Builder<W>,
}

impl<W: Write> Layer<W> {
    pub(super) fn new(to: W) -> Layer<W> {
        Layer {
            archive: tar::Builder::new(to),
        }
    }

    /// Adds what has no contents. `path` is relative; empty for the root directory.
    pub(super) fn add(&mut self, path: &[u8], entry: &Entry<'_>, meta: &Meta) -> io::Result<()> {
        let mut header = header(meta);
        let (kind, target) = match entry {
            Entry::Directory => (EntryType::Directory, None),
            Entry::Symlink(target) => (EntryType::Symlink, Some(*target)),
            Entry::HardLink(first) => (EntryType::Link, Some(*first)),
            Entry::Fifo => (EntryType::Fifo, None),
            Entry::CharDevice(major, minor) | Entry::BlockDevice(major, minor) => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                match entry {
                    Entry::CharDevice(..) => (EntryType::Char, None),
                    _ => (EntryType::Block, None),
                }
            }
        };
        header.set_entry_type(kind);
        let path = match (entry, path) {
            (Entry::Directory, b"") => b"./".to_vec(),
            (Entry::Directory, path) => [path, b"/"].concat(),
            (_, path) => path.to_vec(),
        };
        // Attributes are the file's, which its first name has told.
        let none = Vec::new();
        let xattrs = match entry {
            Entry::HardLink(_) => &none,
            _ => &meta.xattrs,
        };
        self.append(
            &path,
            target,
            &mut header,
            (meta.mtime, xattrs),
            io::empty(),
        )
    }

    /// Adds a plain file, of `size` bytes from `contents`. Fails if there are fewer.
    pub(super) fn add_file(
        &mut self,
        path: &[u8],
        meta: &Meta,
        size: u64,
        contents: impl Read,
    ) -> io::Result<()> {
        let mut header = header(meta);
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        let contents = Exactly {
            from: contents,
            left: size,
        };
        self.append(
            path,
            None,
            &mut header,
            (meta.mtime, &meta.xattrs),
            contents,
        )
    }

    /// Hides what lies below at `path`.
    pub(super) fn add_whiteout(&mut self, path: &[u8]) -> io::Result<()> {
        let (dir, name) = split(path);
        self.add_empty(&joined(dir, &[WHITEOUT, name].concat()))
    }

    /// Hides all that lies below in the directory `path`.
    pub(super) fn add_opaque(&mut self, path: &[u8]) -> io::Result<()> {
        self.add_empty(&joined(path, OPAQUE))
    }

    fn add_empty(&mut self, path: &[u8]) -> io::Result<()> {
        self.add_file(path, &Meta::default(), 0, io::empty())
    }

    /// Ends the archive.
    pub(super) fn finish(self) -> io::Result<W> {
        self.archive.into_inner()
    }

    fn append(
        &mut self,
        path: &[u8],
        target: Option<&[u8]>,
        header: &mut Header,
        (mtime, xattrs): (Time, &Xattrs),
        contents: impl Read,
    ) -> io::Result<()> {
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        let mut long: Vec<(EntryType, &[u8])> = Vec::new();
        let target = target.unwrap_or_default();
        for (text, record, kind) in [
            (path, "path", EntryType::GNULongName),
            (target, "linkpath", EntryType::GNULongLink),
        ] {
            // Records are UTF-8. Names that are not have the older form, which all readers know too.
            match (text.len() > NAME_BYTES, std::str::from_utf8(text)) {
                (false, _) => {}
                (true, Ok(_)) => records.push((record.to_owned(), text.to_vec())),
                (true, Err(_)) => long.push((kind, text)),
            }
        }
        if mtime.1 != 0 || mtime.0 < 0 {
            records.push(("mtime".to_owned(), pax_time(mtime).into_bytes()));
        }
        for (name, value) in xattrs {
            let name = record_name(name)?;
            records.push((name, value.clone()));
        }
        let records = records
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_slice()));
        self.archive.append_pax_extensions(records)?;
        for (kind, text) in long {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(text.len() as u64 + 1);
            put(&mut header.as_old_mut().name, b"././@LongLink");
            header.set_cksum();
            self.archive.append(&header, text.chain(&b"\0"[..]))?;
        }
        put(&mut header.as_old_mut().name, path);
        put(&mut header.as_old_mut().linkname, target);
        header.set_cksum();
        self.archive.append(header, contents)
    }
}

fn header(meta: &Meta) -> Header {
    let mut header = Header::new_ustar();
    header.set_mode(meta.mode);
    header.set_uid(u64::from(meta.uid));
    header.set_gid(u64::from(meta.gid));
    header.set_mtime(u64::try_from(meta.mtime.0).unwrap_or(0));
    header.set_size(0);
    header
}

/// As much of `text` as there is room for.
fn put(field: &mut [u8], text: &[u8]) {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
}

/// The record of an extended attribute.
fn record_name(attribute: &[u8]) -> io::Result<String> {
    match std::str::from_utf8(attribute) {
        // A record is NAME=VALUE.
        Ok(name) if !name.contains('=') => Ok(format!("{XATTR}{name}")),
        _ => {
            let name = String::from_utf8_lossy(attribute);
            let text =
                format!("tar cannot hold the name of the extended attribute {name:?}: remove it");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
    }
}

/// A time as a record: a decimal fraction.
fn pax_time((seconds, nanos): Time) -> String {
    let (sign, seconds, nanos) = match (seconds < 0, nanos) {
        (true, 1..) => (
            "-",
            seconds.saturating_add(1).unsigned_abs(),
            1_000_000_000 - nanos,
        ),
        (true, 0) => ("-", seconds.unsigned_abs(), 0),
        (false, _) => ("", seconds.unsigned_abs(), nanos),
    };
    let text = format!("{sign}{seconds}.{nanos:09}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Directory and name of a path.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            path.get(at + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

/// A path of a name in a directory, which is empty for the root.
pub(super) fn joined(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir {
        b"" => name.to_vec(),
        dir => [dir, b"/", name].concat(),
    }
}

/// So many bytes and no more; fewer are an error.
struct Exactly<R> {
    from: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let got = self.from.read(buffer)?;
        if got == 0 {
            let text = "it became shorter while it was read: export a paused container (--pause)";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        self.left -= got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_fractions() {
        let of = |seconds, nanos| pax_time((seconds, nanos));
        assert_eq!(of(5, 0), "5");
        assert_eq!(of(10, 120_000_000), "10.12");
        assert_eq!(of(-1, 0), "-1");
        assert_eq!(of(-1, 500_000_000), "-0.5");
        assert_eq!(of(-3, 1), "-2.999999999");
    }

    fn names(long: &[u8]) -> Vec<Vec<u8>> {
        let mut layer = Layer::new(Vec::new());
        let meta = Meta {
            mtime: (7, 1),
            ..Meta::default()
        };
        layer.add(b"", &Entry::Directory, &meta).unwrap();
        layer.add(b"d", &Entry::Directory, &meta).unwrap();
        layer.add_file(long, &meta, 3, &b"abcd"[..]).unwrap();
        layer.add(b"l", &Entry::HardLink(long), &meta).unwrap();
        layer.add_whiteout(b"d/gone").unwrap();
        layer.add_whiteout(b"gone").unwrap();
        layer.add_opaque(b"d").unwrap();
        let bytes = layer.finish().unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut names = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            names.push(entry.path_bytes().into_owned());
            let mut records = entry.pax_extensions().unwrap().into_iter().flatten();
            let is_mtime = |record: io::Result<tar::PaxExtension<'_>>| {
                let record = record.unwrap();
                record.key_bytes() == b"mtime" && record.value_bytes() == b"7.000000001"
            };
            let marked = names
                .last()
                .unwrap()
                .windows(4)
                .any(|part| part == WHITEOUT);
            assert_eq!(records.any(is_mtime), !marked);
            if let Some(link) = entry.link_name_bytes() {
                assert_eq!(&*link, long);
            }
        }
        names
    }

    #[test]
    fn names_of_all_lengths_and_bytes_are_told() {
        let text = "n".repeat(250);
        for long in [
            &b"short\xff"[..],
            &[b'a'; 100],
            &[b'a'; 101],
            text.as_bytes(),
            &[0xfe; 255],
        ] {
            let wanted = [
                b"./",
                &b"d/"[..],
                long,
                b"l",
                b"d/.wh.gone",
                b".wh.gone",
                b"d/.wh..wh..opq",
            ];
            assert_eq!(names(long), wanted.map(<[u8]>::to_vec));
            assert_eq!(names(long), names(long));
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let mut layer = Layer::new(Vec::new());
        let error = layer
            .add_file(b"a", &Meta::default(), 4, &b"abc"[..])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn attributes_that_tar_cannot_name_are_refused() {
        for name in [&b"user.a=b"[..], b"user.\xff"] {
            let meta = Meta {
                xattrs: vec![(name.to_vec(), Vec::new())],
                ..Meta::default()
            };
            let mut layer = Layer::new(Vec::new());
            assert!(layer.add(b"d", &Entry::Directory, &meta).is_err());
        }
    }
}
