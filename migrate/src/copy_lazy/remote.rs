//! A copy on another host: a tar stream through a remote shell.
//!
//! GNU tar carries holes (`-S`). The stream is two archives (`-i`), and the second one holds a mark: tar takes a
//! stream that ends between two files for a whole one, and the far end must not.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use pageferry::error::{Error, Kind, Result};
use pageferry::image::dir::PARENT_LINK;
use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, Command};

use super::Copied;
use super::files::Listing;

/// The last file of the stream.
const MARK: &str = ".pageferry-complete";

/// What the far end runs, with the directory as `$1`: unpacks beside it, and renames what is whole.
const SCRIPT: &str = r#"
set -eu
dst=$1
if [ -e "$dst" ] && [ -n "$(ls -A "$dst")" ]; then
    echo "error: $dst is there and not empty: give another directory" >&2
    exit 2
fi
above=$(dirname "$dst")
mkdir -p "$above"
part=$above/.$(basename "$dst").part-$$
mkdir "$part"
trap 'rm -rf "$part"' EXIT
trap 'exit 1' HUP INT TERM
tar -x -i -C "$part" -f -
if [ ! -e "$part/.pageferry-complete" ]; then
    echo "error: the stream ended early: nothing of it is kept" >&2
    exit 1
fi
rm "$part/.pageferry-complete"
[ ! -d "$dst" ] || rmdir "$dst"
mv "$part" "$dst"
"#;

/// A directory on another host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct RemoteDir {
    /// As the remote shell's command takes it.
    pub(super) host: String,
    /// Relative to where the remote shell begins.
    pub(super) dir: String,
}

/// Copies to `to` through `rsh`.
pub(super) async fn copy(listing: &Listing, to: &RemoteDir, rsh: &str) -> Result<Copied> {
    let mut words = rsh.split_whitespace();
    let program = words
        .next()
        .ok_or_else(|| Error::new(Kind::Usage, "--rsh names no command"))?;
    let dir = if to.dir.is_empty() { "." } else { &to.dir };
    let line = format!("sh -c {} pageferry {}", quoted(SCRIPT), quoted(dir));
    let mut shell = Command::new(program);
    shell.args(words).arg(&to.host).arg(line);
    let mut shell = shell
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            Error::wrap(Kind::Usage, format!("cannot run {program} (--rsh)"), error)
        })?;
    let mut stream = shell.stdin.take().expect("it was asked for");
    let sent = send(listing, &mut stream).await;
    // The end of the stream, for the far end.
    let closed = stream.shutdown().await;
    drop(stream);
    let failed = |error| Error::wrap(Kind::Io, format!("cannot wait for {program}"), error);
    let ended = shell.wait().await.map_err(failed)?;
    if !ended.success() {
        let text = format!(
            "{program} {}: {ended}: nothing is left of the copy to {}",
            to.host, to.dir
        );
        return Err(Error::new(Kind::PeerLost, text));
    }
    sent?;
    closed.map_err(|error| {
        Error::wrap(Kind::PeerLost, format!("cannot send to {}", to.host), error)
    })?;
    if let Some(parent) = &listing.parent {
        tracing::warn!(
            "the images are a difference to {}: the link is copied, and these must be there as well",
            parent.display()
        );
    }
    let bytes = listing.names.iter().map(|name| listing.dir.join(name));
    let bytes = bytes
        .map(|path| path.metadata().map_or(0, |meta| meta.len()))
        .sum();
    Ok(Copied {
        files: listing.names.len() as u64,
        bytes,
    })
}

/// Packs the files into `stream`, and then the mark: not before all of them are in it.
async fn send(listing: &Listing, stream: &mut ChildStdin) -> Result<()> {
    let failed = |error| Error::wrap(Kind::Io, "cannot make a list of the images", error);
    // Beside the images nothing can be made.
    let mark = Mark::create().map_err(failed)?;
    let mut names: Vec<u8> = Vec::new();
    let parent = listing.parent.as_ref().map(|_| OsStr::new(PARENT_LINK));
    let all = listing.names.iter().map(OsString::as_os_str);
    for name in all.chain(parent) {
        names.extend(name.as_encoded_bytes());
        names.push(0);
    }
    let list = mark.list(&names).map_err(failed)?;
    let from_list = ["--null", "--verbatim-files-from", "-T"].map(OsStr::new);
    let words = [&from_list[..], &[list.as_os_str()]].concat();
    pack(&listing.dir, &words, stream).await?;
    pack(&mark.0, &[OsStr::new(MARK)], stream).await
}

/// Packs files in `dir` into `stream`; the words tell tar which.
async fn pack(dir: &Path, words: &[&OsStr], stream: &mut ChildStdin) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["-c", "-S", "-C"])
        .arg(dir)
        .args(["-f", "-"])
        .args(words);
    let spawned = tar
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let text = "cannot run tar (GNU tar packs the images)";
    let mut tar = spawned.map_err(|error| Error::wrap(Kind::Usage, text, error))?;
    let mut packed = tar.stdout.take().expect("it was asked for");
    let carried = tokio::io::copy(&mut packed, stream).await;
    drop(packed);
    let text = "the remote shell has hung up";
    carried.map_err(|error| Error::wrap(Kind::PeerLost, text, error))?;
    let ended = tar.wait().await;
    let ended = ended.map_err(|error| Error::wrap(Kind::Io, "cannot wait for tar", error))?;
    match ended.success() {
        true => Ok(()),
        false => Err(Error::new(Kind::Io, format!("tar: {ended}"))),
    }
}

/// A directory with the mark and the list of files, removed at the end.
struct Mark(std::path::PathBuf);

impl Mark {
    fn create() -> std::io::Result<Mark> {
        let name = format!(
            "pageferry-copy-{}-{:08x}",
            std::process::id(),
            fastrand::u32(..)
        );
        let dir = Mark(std::env::temp_dir().join(name));
        std::fs::create_dir(&dir.0)?;
        std::fs::File::create_new(dir.0.join(MARK))?;
        Ok(dir)
    }

    fn list(&self, names: &[u8]) -> std::io::Result<std::path::PathBuf> {
        let path = self.0.join("names");
        std::fs::File::create_new(&path)?.write_all(names)?;
        Ok(path)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A word for a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_shells() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert!(SCRIPT.contains(MARK));
    }
}
