//! `pageferry dump`: the volatile and the persistent state of a container, in one archive.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry::error::{Error, Result};
use pageferry::migration::messages::{ContainerId, Digest};
use serde::Serialize;

use super::capture::{Unfinished, capture};
use super::podman::Image;
use super::{CHECKPOINT, CONFIG, DELETED, FILES, Found, LOG, SPEC, STATS, documents, found};
use crate::export::difference;
use crate::programs::ProgramArgs;
use crate::runtime::RuntimeArg;

/// Level of zstd's compression: its own default.
const ZSTD_LEVEL: i32 = 3;

/// Writes a container, its memory and its files, into an archive.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: ContainerId,

    /// The container's runtime
    #[arg(long, value_enum, default_value_t = RuntimeArg::Runc)]
    runtime: RuntimeArg,

    /// Directory of the runtime's state (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR")]
    runtime_root: Option<PathBuf>,

    /// The archive, FILE.tar.zst: it must not be there
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Name of the image that podman makes the container of when it imports the archive [default: that
    /// of a container of podman's]
    #[arg(long, value_name = "NAME", requires = "image_id")]
    image: Option<String>,

    /// The image's id at the destination, 64 hexadecimal digits
    #[arg(long, value_name = "ID", requires = "image", value_parser = image_id)]
    image_id: Option<String>,

    /// Let the container go on afterwards
    #[arg(long)]
    leave_running: bool,

    #[command(flatten)]
    programs: ProgramArgs,
}

/// As podman writes it.
fn image_id(text: &str) -> std::result::Result<String, String> {
    let id = text.strip_prefix("sha256:").unwrap_or(text);
    let digest = id.parse::<Digest>().map_err(|error| error.to_string());
    digest.map(|digest| digest.to_string())
}

/// Dumps a container.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(super::unless_interrupted(dump(args)))
}

async fn dump(args: &Args) -> Result<()> {
    super::expect_absent(&args.output)?;
    let found = found(&args.id, args.runtime, args.runtime_root.clone()).await?;
    let programs = args.programs.find()?;
    let unfinished = Unfinished::beside(&args.output)?;
    let parts = unfinished.dir("parts")?;
    let (images, work) = (parts.join(CHECKPOINT), unfinished.dir("work")?);
    fs::create_dir(&images).map_err(|error| Error::file("create", &images, error))?;
    let stopped = capture(found.target.clone(), &programs, &images, &work).await?;
    let archive = unfinished.path("archive");
    write_parts(&parts, args, &found).await?;
    super::expect_no_interrupt()?;
    write_archive(&parts, &archive)?;
    super::finish(&archive, &args.output, stopped, args.leave_running).await
}

/// The image by which podman imports the archive.
fn image(args: &Args, found: &Found) -> Image {
    let known = found.podman.as_ref().map(|podman| podman.image.clone());
    let known = known.unwrap_or_default();
    Image {
        name: args.image.clone().unwrap_or(known.name),
        id: args.image_id.clone().unwrap_or(known.id),
    }
}

/// Writes what stands beside the images.
async fn write_parts(parts: &Path, args: &Args, found: &Found) -> Result<()> {
    let runtime = args.runtime.kind().name();
    let id = args.id.as_str();
    let name = found
        .podman
        .as_ref()
        .and_then(|podman| podman.name.as_deref());
    let config = documents::config(
        (id, name.unwrap_or(id)),
        &image(args, found),
        runtime,
        found.created.as_deref(),
    );
    write_json(&parts.join(CONFIG), &config)?;
    write_json(&parts.join(SPEC), &documents::spec(&found.config))?;
    for name in [LOG, STATS] {
        let (from, to) = (parts.join(CHECKPOINT).join(name), parts.join(name));
        if from.exists() {
            fs::rename(&from, &to).map_err(|error| Error::file("move", &from, error))?;
        }
    }
    let path = parts.join(FILES);
    let file = File::create(&path).map_err(|error| Error::file("create", &path, error))?;
    let (_, difference) =
        difference(&args.id, args.runtime, args.runtime_root.clone(), file).await?;
    for warning in difference.warnings() {
        tracing::warn!("{warning}");
    }
    if !difference.hidden.is_empty() {
        write_json(&parts.join(DELETED), &difference.hidden)?;
    }
    Ok(())
}

fn write_json(path: &Path, document: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(document).map_err(|error| Error::file("write", path, error))?;
    fs::write(path, text).map_err(|error| Error::file("write", path, error))
}

/// Packs all of `parts` and puts it on the disk.
fn write_archive(parts: &Path, archive: &Path) -> Result<()> {
    let failed = |error| Error::file("write", archive, error);
    let file = File::create_new(archive).map_err(failed)?;
    let owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    file.set_permissions(owner).map_err(failed)?;
    let encoder = zstd::Encoder::new(file, ZSTD_LEVEL).map_err(failed)?;
    let mut builder = tar::Builder::new(encoder);
    builder.sparse(false);
    builder.append_dir_all("", parts).map_err(failed)?;
    let encoder = builder.into_inner().map_err(failed)?;
    let mut file = encoder.finish().map_err(failed)?;
    file.flush().map_err(failed)?;
    file.sync_all().map_err(failed)
}
