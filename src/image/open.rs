//! Opens the files of an image directory that somebody else may have filled.
//!
//! A name in such a directory may be a FIFO, which nobody writes to, a device, or a link to a file that its maker may
//! not read himself. None of that is an image: to open it would wait for ever, or hand out what is behind it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::geteuid;

/// Opens the regular file `path` to be read. A link is followed if it is this user's or root's.
///
/// # Errors
///
/// There is none; it is no regular file; the link is another user's.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    match open(path, libc::O_NOFOLLOW) {
        Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => {
            let link = path.symlink_metadata()?;
            if !may_follow(&link) {
                let text = format!(
                    "it is a link that user {} has made, which this user does not follow: put the file in its place",
                    link.uid()
                );
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            open(path, 0)
        }
        opened => opened,
    }
}

/// Whether a link is this user's or root's.
pub(super) fn may_follow(link: &Metadata) -> bool {
    let owner = link.uid();
    owner == 0 || owner == geteuid().as_raw()
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    // Without O_NONBLOCK a FIFO waits for somebody who writes.
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file, so no image",
        )),
    }
}
