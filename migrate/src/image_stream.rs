//! The image files of a dump on their way to the agent: a tar stream, whose last entry tells a checksum.
//!
//! TCP's own checksum misses one in some ten million damaged packets, and a bit in an image decides about registers
//! and addresses: so without TLS too, what arrives is what was sent, or the migration fails.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crc32fast::Hasher;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{MIGRATION_IMAGE_FILES_MAX, MIGRATION_IMAGES_BYTES_MAX};

/// The last entry: CRC-32 of the names and contents before it, 4 bytes, little-endian.
const CHECKSUM: &str = "checksum";

/// What runc and crun note of a container's standard streams beside the images.
const DESCRIPTORS: &str = "descriptors.json";

/// Permissions of files: memory of processes is for their owner alone.
const FILE_MODE: u32 = 0o600;

/// Writes the image files of `dir`, but for those in `sent`, and tells their bytes.
pub(crate) fn pack(dir: &Path, sent: &BTreeSet<OsString>, out: impl io::Write) -> Result<u64> {
    let failed = |path: &Path, error| Error::file("send", path, error);
    let mut archive = tar::Builder::new(out);
    let mut checksum = Hasher::new();
    let mut bytes = 0;
    let entries = std::fs::read_dir(dir).map_err(|error| failed(dir, error))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let is_image = path.extension().is_some_and(|extension| extension == "img");
        let wanted = |name: &&OsStr| (is_image || *name == DESCRIPTORS) && !sent.contains(*name);
        let Some(name) = path.file_name().filter(wanted) else {
            continue;
        };
        let file = File::open(&path).map_err(|error| failed(&path, error))?;
        let length = file.metadata().map_or(0, |meta| meta.len());
        checksum.update(name.as_bytes());
        let summed = ChecksumReader {
            // One that grows meanwhile would break the stream.
            from: file.take(length),
            checksum: &mut checksum,
        };
        append(&mut archive, name, length, summed).map_err(|error| failed(&path, error))?;
        bytes += length;
    }
    let sum = checksum.finalize().to_le_bytes();
    append(
        &mut archive,
        OsStr::new(CHECKSUM),
        sum.len() as u64,
        &sum[..],
    )
    .map_err(|error| failed(dir, error))?;
    archive
        .into_inner()
        .and_then(|mut out| out.flush())
        .map_err(|error| failed(dir, error))?;
    Ok(bytes)
}

fn append(
    archive: &mut tar::Builder<impl io::Write>,
    name: &OsStr,
    length: u64,
    from: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(length);
    header.set_mode(FILE_MODE);
    archive.append_data(&mut header, name, from)
}

/// Sums up what is read.
struct ChecksumReader<'a, R> {
    from: R,
    checksum: &'a mut Hasher,
}

impl<R: Read> Read for ChecksumReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.from.read(buffer)?;
        self.checksum.update(&buffer[..got]);
        Ok(got)
    }
}

/// Unpacks plain files, and nothing else, into `dir`. Fails if they are not all that was sent.
pub(crate) fn unpack(from: impl Read, dir: &Path) -> Result<()> {
    let failed = |error| Error::wrap(Kind::Protocol, "the stream of images", error);
    let mut archive = tar::Archive::new(from.take(MIGRATION_IMAGES_BYTES_MAX));
    let mut checksum = Hasher::new();
    // As it is: a record of a long name, which no image has, would be read into memory whole.
    let entries = archive.entries().map_err(failed)?.raw(true);
    for (count, entry) in entries.enumerate() {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.into_owned();
        let mut parts = path.components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        let regular = entry.header().entry_type().is_file();
        if !plain || !regular || count > MIGRATION_IMAGE_FILES_MAX {
            let text = format!("{:?} is not an image file in one directory", path.display());
            return Err(Error::new(Kind::Protocol, text));
        }
        if path.as_os_str() == CHECKSUM {
            let mut sum = [0; 4];
            entry.read_exact(&mut sum).map_err(failed)?;
            return match u32::from_le_bytes(sum) == checksum.finalize() {
                true => Ok(()),
                false => Err(Error::new(
                    Kind::Protocol,
                    "the images were damaged on their way: their checksum is wrong",
                )),
            };
        }
        checksum.update(path.as_os_str().as_bytes());
        let path = dir.join(&path);
        // What arrives never replaces what is there.
        let mut file =
            File::create_new(&path).map_err(|error| Error::file("create", &path, error))?;
        let mut summed = ChecksumReader {
            from: &mut entry,
            checksum: &mut checksum,
        };
        io::copy(&mut summed, &mut file).map_err(|error| Error::file("write", &path, error))?;
    }
    Err(Error::new(
        Kind::Protocol,
        "the stream of images ends before its checksum",
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn packed(files: &[(&str, &[u8])]) -> Vec<u8> {
        let tmp = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(tmp.path().join(name), bytes).unwrap();
        }
        let mut stream = Vec::new();
        let sent = BTreeSet::from(["sent.img".into()]);
        pack(tmp.path(), &sent, &mut stream).unwrap();
        stream
    }

    const FILES: [(&str, &[u8]); 4] = [
        ("core-1.img", &[7; 3000]),
        ("pstree.img", b"tree"),
        ("sent.img", b"is there"),
        ("dump.log", b"no image"),
    ];

    #[test]
    fn images_arrive_and_nothing_else() {
        let tmp = tempfile::tempdir().unwrap();
        unpack(&packed(&FILES)[..], tmp.path()).unwrap();
        assert_eq!(fs::read(tmp.path().join("core-1.img")).unwrap(), [7; 3000]);
        assert_eq!(fs::read(tmp.path().join("pstree.img")).unwrap(), b"tree");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_flipped_bit_and_a_missing_end_are_seen() {
        let whole = packed(&FILES);
        // Headers, names, contents, the checksum: wherever it is. Padding has no meaning.
        for at in [0, 3, 512, 600, 3511, 4096, 4608, 4610] {
            let mut damaged = whole.clone();
            damaged[at] ^= 16;
            let tmp = tempfile::tempdir().unwrap();
            assert!(unpack(&damaged[..], tmp.path()).is_err(), "byte {at}");
        }
        for length in [0, 512, 3000, 4700] {
            let tmp = tempfile::tempdir().unwrap();
            assert!(
                unpack(&whole[..length], tmp.path()).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_record_that_is_no_image_is_refused_unread() {
        for kind in [tar::EntryType::GNULongName, tar::EntryType::XHeader] {
            let mut header = tar::Header::new_gnu();
            header.set_path("core-1.img").unwrap();
            header.set_entry_type(kind);
            // More than any machine has.
            header.set_size(1 << 60);
            header.set_cksum();
            let stream = header.as_bytes().chain(io::repeat(b'a'));
            let tmp = tempfile::tempdir().unwrap();
            let error = unpack(stream, tmp.path()).unwrap_err().to_string();
            assert!(error.contains("core-1.img"), "{error}");
        }
    }

    #[test]
    fn what_leads_out_of_the_directory_is_refused() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(FILE_MODE);
        let name = &mut header.as_old_mut().name;
        name[..5].copy_from_slice(b"../ab");
        header.set_cksum();
        archive.append(&header, &b"x"[..]).unwrap();
        let stream = archive.into_inner().unwrap();
        let tmp = tempfile::tempdir().unwrap();
        let error = unpack(&stream[..], tmp.path()).unwrap_err().to_string();
        assert!(error.contains("../ab"), "{error}");
    }
}
