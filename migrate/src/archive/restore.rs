//! `pageferry restore`: a container out of an archive, in a bundle of this host.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::syncfs;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{ARCHIVE_FILES_MAX, OCI_DOCUMENT_BYTES_MAX};
use pageferry::migration::messages::ContainerId;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tar::EntryType;

use super::capture::Unfinished;
use super::{CHECKPOINT, CONFIG, DELETED, FILES, SPEC, adopted, documents, entries};
use crate::child::Program;
use crate::programs::ProgramArgs;
use crate::runtime::{self, Runtime, RuntimeArg, bundle, runtime_log};

/// The first bytes of what zstd has compressed.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What the record of an extended attribute begins with.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The files of /dev/shm, in archives of podman's.
const SHM_FILES: &str = "devshm-checkpoint.tar";

/// The first bytes of what gzip has compressed.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Restores a container from an archive.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The archive, of `pageferry dump` or `podman container checkpoint --export`
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The container's bundle here
    ///
    /// Its root file system must be what the container was made of: the files of the archive are
    /// written over it. A config.json that is not there is taken from the archive.
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,

    /// Name of the restored container [default: the name that it had]
    #[arg(long, value_name = "ID")]
    name: Option<ContainerId>,

    /// The container's runtime
    #[arg(long, value_enum, default_value_t = RuntimeArg::Runc)]
    runtime: RuntimeArg,

    /// Directory of the runtime's state (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR")]
    runtime_root: Option<PathBuf>,

    #[command(flatten)]
    programs: ProgramArgs,
}

/// Restores a container.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(super::unless_interrupted(restore(args)))
}

async fn restore(args: &Args) -> Result<()> {
    let programs = args.programs.find()?;
    let runtime = Runtime::find(args.runtime.kind(), args.runtime_root.clone())?;
    if let Some(refusal) = runtime::refusal(args.runtime.kind()) {
        return Err(Error::new(Kind::Unsupported, refusal));
    }
    let bundle = std::path::absolute(&args.bundle);
    let bundle = bundle.map_err(|error| Error::file("find", &args.bundle, error))?;
    let unfinished = Unfinished::beside(&bundle)?;
    let parts = unfinished.dir("parts")?;
    unpack_parts(&args.file, &parts)?;
    let config: Value = read(&parts.join(CONFIG))?;
    let spec: Value = read(&parts.join(SPEC))?;
    let is_podmans = documents::is_podmans(&spec);
    let spec = match is_podmans && !bundle::is_configured(&bundle) {
        true => adopted::spec(&spec, &bundle)?,
        false => spec,
    };
    let id = match (&args.name, documents::name(&config)) {
        (Some(name), _) => name.clone(),
        (None, Some(name)) => name.parse().map_err(|error| {
            Error::wrap(Kind::Image, "the archive's name of the container", error)
        })?,
        (None, None) => {
            let text = format!("{CONFIG} of the archive names no container: name it by --name");
            return Err(Error::new(Kind::Image, text));
        }
    };
    if runtime.state(&id).await?.is_some() {
        let text = format!("there is a container {id} already: name another by --name");
        return Err(Error::new(Kind::Usage, text));
    }
    bundle::complete(&bundle, &spec)?;
    let root = bundle::root_of(&bundle, &bundle::config(&bundle)?);
    let root = fs::canonicalize(&root).map_err(|error| Error::file("find", &root, error))?;
    if is_podmans {
        let config = bundle::config(&bundle)?;
        adopted::make_files(&config, &bundle)?;
        let missing = bundle::sources_missing(&config, &[], "on this host");
        if !missing.is_empty() {
            return Err(Error::new(Kind::Usage, missing.join("; ")));
        }
        apply_shm(&parts, &bundle)?;
    }
    apply_files(&parts, &root)?;
    let images = parts.join(CHECKPOINT);
    let bin = programs.criu.parent().unwrap_or(Path::new("/"));
    let mut command = runtime.restore(&id, &images, bin, &bundle);
    Program::start("the runtime's restore", &mut command, &runtime_log(&images))?
        .succeed()
        .await?;
    println!("{id}");
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
    let mut text = Vec::new();
    let read = file.take(OCI_DOCUMENT_BYTES_MAX).read_to_end(&mut text);
    read.map_err(|error| Error::file("read", path, error))?;
    serde_json::from_slice(&text).map_err(|error| Error::file("understand", path, error))
}

/// Unpacks the archive: plain files and directories alone.
pub(crate) fn unpack_parts(file: &Path, parts: &Path) -> Result<()> {
    let unpacked = entries::for_each(
        decompressed(file)?,
        |_| {},
        |count, entry| {
            let kind = entry.header().entry_type();
            let path = entry.path()?.into_owned();
            let inside = path
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
            if !inside || count > ARCHIVE_FILES_MAX {
                let text = format!("{:?} is not a file of a checkpoint", path.display());
                return Err(io::Error::other(text));
            }
            let to = parts.join(&path);
            match kind {
                EntryType::Directory => fs::create_dir_all(&to)?,
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                    if let Some(dir) = to.parent() {
                        fs::create_dir_all(dir)?;
                    }
                    let mut new = File::create_new(&to)?;
                    match kind {
                        // With its holes: what they stand for may be more than any disk has.
                        EntryType::GNUSparse => drop(entry.unpack(&to)?),
                        _ => drop(io::copy(entry, &mut new)?),
                    }
                }
                // podman packs nothing else that a restore needs.
                _ => tracing::warn!("{}: {} is left out", file.display(), path.display()),
            }
            Ok(())
        },
    );
    unpacked.map_err(|error| Error::file("unpack", file, error))
}

fn decompressed(file: &Path) -> Result<Box<dyn Read>> {
    let failed = |error| Error::file("open", file, error);
    let mut first = [0; 4];
    let begins = File::open(file).and_then(|mut file| file.read_exact(&mut first));
    begins.map_err(failed)?;
    let whole = File::open(file).map_err(failed)?;
    Ok(match first {
        ZSTD => Box::new(zstd::Decoder::new(whole).map_err(failed)?),
        [a, b, ..] if [a, b] == GZIP => Box::new(flate2::read::MultiGzDecoder::new(whole)),
        _ => Box::new(io::BufReader::new(whole)),
    })
}

/// Writes the archive's files over the root, and removes what the container had removed.
pub(crate) fn apply_files(parts: &Path, root: &Path) -> Result<()> {
    let deleted = parts.join(DELETED);
    if deleted.exists() {
        for path in read::<Vec<String>>(&deleted)? {
            remove(root, Path::new(path.trim_start_matches('/')))
                .map_err(|error| Error::file("remove", &root.join(&path), error))?;
        }
    }
    let path = parts.join(FILES);
    if !path.exists() {
        return Ok(());
    }
    let failed = |error| Error::file("unpack", &path, error);
    let file = File::open(&path).map_err(failed)?;
    apply(io::BufReader::new(file), root, usize::MAX).map_err(failed)
}

/// Unpacks what was in /dev/shm.
fn apply_shm(parts: &Path, bundle: &Path) -> Result<()> {
    let (path, shm) = (parts.join(SHM_FILES), adopted::shm(bundle));
    if !path.exists() || !shm.is_dir() {
        return Ok(());
    }
    let failed = |error| Error::file("unpack", &path, error);
    let shm = fs::canonicalize(shm).map_err(failed)?;
    let file = File::open(&path).map_err(failed)?;
    apply(io::BufReader::new(file), &shm, usize::MAX).map_err(failed)
}

/// The directory of `path` below `root`, if no link leads out of it.
fn parent_inside(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let parent = root.join(path.parent().unwrap_or(Path::new("")));
    let real = fs::canonicalize(&parent)?;
    match plain && real.starts_with(root) {
        true => Ok(real),
        false => Err(io::Error::other(format!(
            "{} leads out of {}",
            path.display(),
            root.display()
        ))),
    }
}

fn remove(root: &Path, path: &Path) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Ok(());
    };
    let at = match parent_inside(root, path) {
        Ok(parent) => parent.join(name),
        // What was there before may not be there at all.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let removed = match fs::symlink_metadata(&at) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(&at),
        Ok(_) => fs::remove_file(&at),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Unpacks a layer without whiteouts over `root`: at most so many entries.
pub(crate) fn apply(from: impl Read, root: &Path, entries_max: usize) -> io::Result<()> {
    let mut times = Vec::new();
    let as_they_are = |archive: &mut tar::Archive<_>| {
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(true);
        archive.set_preserve_mtime(true);
        archive.set_unpack_xattrs(true);
    };
    entries::for_each(from, as_they_are, |count, entry| {
        if count >= entries_max {
            let text = format!("more than {entries_max} files");
            return Err(io::Error::other(text));
        }
        let path = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        let time = mtime(entry)?;
        // The library sets those of files alone.
        let attributes = match kind.is_dir() {
            true => xattrs(entry)?,
            false => Vec::new(),
        };
        let Some(name) = path.file_name() else {
            return Ok(());
        };
        let at = parent_inside(root, &path)?.join(name);
        let was = fs::symlink_metadata(&at).ok();
        let both_dirs = kind.is_dir() && was.as_ref().is_some_and(fs::Metadata::is_dir);
        if was.is_some() && !both_dirs {
            remove(root, &path)?;
        }
        match kind {
            EntryType::Fifo | EntryType::Char | EntryType::Block => special(&at, entry)?,
            _ if !entry.unpack_in(root)? => {
                return Err(io::Error::other(format!("{} leads out", path.display())));
            }
            _ => {}
        }
        for (name, value) in attributes {
            xattr::set(&at, OsStr::from_bytes(&name), &value)?;
        }
        if !kind.is_symlink() && !kind.is_hard_link() {
            times.push((at, time));
        }
        Ok(())
    })?;
    // Directories last: what is made in them changes their times.
    for (path, time) in times.into_iter().rev() {
        let file = match fs::symlink_metadata(&path)? {
            meta if meta.is_dir() || meta.is_file() => File::open(&path)?,
            _ => continue,
        };
        file.set_times(fs::FileTimes::new().set_modified(time))?;
    }
    Ok(syncfs(&File::open(root)?)?)
}

/// The extended attributes of an entry.
fn xattrs(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    for record in entry.pax_extensions()?.into_iter().flatten() {
        let record = record?;
        if let Some(name) = record.key_bytes().strip_prefix(XATTR) {
            found.push((name.to_vec(), record.value_bytes().to_vec()));
        }
    }
    Ok(found)
}

/// The time of an entry, with the nanoseconds of its record.
fn mtime(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<std::time::SystemTime> {
    let whole = entry.header().mtime()?;
    let records = entry.pax_extensions()?.into_iter().flatten().flatten();
    let mut record = records.filter(|record| record.key_bytes() == b"mtime");
    let text = record
        .next()
        .and_then(|record| record.value().ok().map(str::to_owned));
    let out_of_range = || io::Error::new(io::ErrorKind::InvalidData, "a time out of range");
    let plain = std::time::Duration::from_secs(whole);
    let Some(text) = text else {
        let time = std::time::UNIX_EPOCH.checked_add(plain);
        return time.ok_or_else(out_of_range);
    };
    let (sign, text) = match text.strip_prefix('-') {
        Some(text) => (true, text.to_owned()),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let wrong = |_| io::Error::new(io::ErrorKind::InvalidData, "a time that is not a number");
    let (seconds, nanos) = (
        seconds.parse().map_err(wrong)?,
        digits.parse().map_err(wrong)?,
    );
    let plain = std::time::Duration::new(seconds, nanos);
    let time = match sign {
        true => std::time::UNIX_EPOCH.checked_sub(plain),
        false => std::time::UNIX_EPOCH.checked_add(plain),
    };
    time.ok_or_else(out_of_range)
}

/// Makes a device or a FIFO.
fn special(at: &Path, entry: &tar::Entry<'_, impl Read>) -> io::Result<()> {
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Fifo => SFlag::S_IFIFO,
        EntryType::Char => SFlag::S_IFCHR,
        _ => SFlag::S_IFBLK,
    };
    let number = |part: io::Result<Option<u32>>| part.map(|part| u64::from(part.unwrap_or(0)));
    let device = match header.entry_type() {
        EntryType::Fifo => 0,
        _ => makedev(
            number(header.device_major())?,
            number(header.device_minor())?,
        ),
    };
    mknod(at, kind, Mode::from_bits_truncate(0o600), device)?;
    let id = |id: u64| u32::try_from(id).ok();
    chown(at, id(header.uid()?), id(header.gid()?))?;
    let mode = header.mode()? & 0o7777;
    if fs::symlink_metadata(at)?.mode() & 0o7777 != mode {
        fs::set_permissions(at, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer with one empty file, whose header and extension record name these times.
    fn layer(whole: u64, exact: Option<&str>) -> Vec<u8> {
        let mut layer = tar::Builder::new(Vec::new());
        if let Some(exact) = exact {
            let record = [("mtime", exact.as_bytes())];
            layer.append_pax_extensions(record).unwrap();
        }
        let mut header = tar::Header::new_ustar();
        header.set_mtime(whole);
        header.set_uid(nix::unistd::geteuid().as_raw().into());
        header.set_gid(nix::unistd::getegid().as_raw().into());
        header.set_mode(0o600);
        header.set_size(0);
        layer.append_data(&mut header, "file", &[][..]).unwrap();
        layer.into_inner().unwrap()
    }

    #[test]
    fn a_time_that_no_clock_has_is_an_error() {
        let applied = |whole, exact| {
            let root = tempfile::tempdir().unwrap();
            let root_path = fs::canonicalize(root.path()).unwrap();
            apply(&layer(whole, exact)[..], &root_path, usize::MAX).map_err(|error| error.kind())
        };
        for good in [None, Some("7.5"), Some("-7.25"), Some("0")] {
            assert_eq!(applied(7, good), Ok(()), "{good:?}");
        }
        // Bits beyond what digits can say are for larger numbers.
        assert_eq!(applied(u64::MAX, None), Err(io::ErrorKind::InvalidData));
        for wrong in [
            "99999999999999999999",
            "18446744073709551615",
            "-18446744073709551615",
            "x",
            "",
        ] {
            let error = applied(7, Some(wrong));
            assert_eq!(error, Err(io::ErrorKind::InvalidData), "{wrong:?}");
        }
    }
}
