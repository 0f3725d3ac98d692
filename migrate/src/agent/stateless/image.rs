//! The files of a container, as they arrive.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{BUNDLE_FILES_MAX, MIGRATION_IMAGES_BYTES_MAX};
use pageferry::migration::messages::Digest;
use sha2::{Digest as _, Sha256};

use crate::archive::restore::apply;

/// Sums up what is read.
struct Summed<R> {
    from: R,
    sum: Sha256,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.from.read(buffer)?;
        self.sum.update(&buffer[..got]);
        Ok(got)
    }
}

/// Unpacks an image, compressed by zstd, into the empty directory `root`, and tells the sum of what came.
pub(super) fn unpack(from: impl Read, root: &Path) -> Result<Digest> {
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))
        .map_err(|error| Error::file("change", root, error))?;
    let root = fs::canonicalize(root).map_err(|error| Error::file("find", root, error))?;
    let failed = |error| Error::wrap(Kind::Protocol, "the container's image", error);
    let plain = zstd::Decoder::new(from).map_err(failed)?;
    let mut summed = Summed {
        from: plain.take(MIGRATION_IMAGES_BYTES_MAX),
        sum: Sha256::new(),
    };
    apply(&mut summed, &root, BUNDLE_FILES_MAX).map_err(failed)?;
    // The archive ends before its stream does.
    io::copy(&mut summed, &mut io::sink()).map_err(failed)?;
    Ok(Digest::of(&summed.sum.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Headers, and the bytes behind each.
    type Entries = Vec<(tar::Header, &'static [u8])>;

    fn new_dir(tmp: &tempfile::TempDir, name: &str) -> std::path::PathBuf {
        let dir = tmp.path().join(name);
        fs::create_dir(&dir).unwrap();
        dir
    }

    fn packed(fill: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        fill(&mut archive);
        let plain = archive.into_inner().unwrap();
        zstd::encode_all(&plain[..], 1).unwrap()
    }

    fn entry(name: &[u8], kind: tar::EntryType, link: &[u8], size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_uid(nix::unistd::getuid().as_raw().into());
        header.set_gid(nix::unistd::getgid().as_raw().into());
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        header
    }

    #[test]
    fn what_leads_out_of_the_directory_is_refused() {
        let cases: [(&str, Entries); 4] = [
            (
                "above",
                vec![(entry(b"../out", tar::EntryType::Regular, b"", 1), b"x")],
            ),
            (
                "through a link",
                vec![
                    (entry(b"link", tar::EntryType::Symlink, b"..", 0), b""),
                    (entry(b"link/out", tar::EntryType::Regular, b"", 1), b"x"),
                ],
            ),
            (
                "a hard link to what is outside",
                vec![(entry(b"out", tar::EntryType::Link, b"../secret", 0), b"")],
            ),
            (
                "an absolute hard link",
                vec![(
                    entry(b"out", tar::EntryType::Link, b"/etc/hostname", 0),
                    b"",
                )],
            ),
        ];
        for (name, entries) in cases {
            let tmp = tempfile::tempdir().unwrap();
            fs::write(tmp.path().join("secret"), "s").unwrap();
            let stream = packed(|archive| {
                for (header, bytes) in &entries {
                    archive.append(header, *bytes).unwrap();
                }
            });
            let unpacked = unpack(&stream[..], &new_dir(&tmp, "rootfs"));
            assert!(unpacked.is_err(), "{name}");
            assert!(!tmp.path().join("out").exists(), "{name}");
        }
    }

    #[test]
    fn what_is_cut_or_damaged_is_no_image() {
        let stream = packed(|archive| {
            let header = entry(b"file", tar::EntryType::Regular, b"", 3000);
            archive.append(&header, &[7; 3000][..]).unwrap();
        });
        let tmp = tempfile::tempdir().unwrap();
        let whole = unpack(&stream[..], &new_dir(&tmp, "whole")).unwrap();
        let mut damaged = stream.clone();
        damaged[stream.len() / 2] ^= 0x10;
        for (name, bytes) in [
            ("cut", &stream[..stream.len() - 9]),
            ("empty", b""),
            ("damaged", &damaged[..]),
        ] {
            let unpacked = unpack(bytes, &new_dir(&tmp, name));
            // The sum tells what the compression does not.
            assert!(unpacked.is_err() || unpacked.unwrap() != whole, "{name}");
        }
    }
}
