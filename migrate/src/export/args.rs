//! The options of `pageferry export`.

use std::path::PathBuf;

use pageferry::migration::messages::ContainerId;

use super::layout::Compress;
use crate::runtime::RuntimeArg;

/// What is exported.
#[derive(clap::Args, Debug)]
pub(super) struct SubjectArgs {
    /// Name of the container
    #[arg(value_name = "ID", required_unless_present_any = ["upper", "rootfs"])]
    pub(super) id: Option<ContainerId>,

    /// The container's runtime
    #[arg(long, value_enum, default_value_t = RuntimeArg::Runc)]
    pub(super) runtime: RuntimeArg,

    /// Directory of the runtime's state (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR", requires = "id")]
    pub(super) runtime_root: Option<PathBuf>,

    /// Export this writable layer of an overlay, instead of a container's
    #[arg(long, value_name = "DIR", conflicts_with_all = ["id", "rootfs"])]
    pub(super) upper: Option<PathBuf>,

    /// A layer below --upper; the topmost first
    #[arg(long, value_name = "DIR", requires = "upper")]
    pub(super) lower: Vec<PathBuf>,

    /// Where --upper is mounted
    ///
    /// Overlayfs leaves contents of renamed directories in the layers below (redirect_dir, metacopy).
    /// They are read there.
    #[arg(long, value_name = "DIR", requires = "upper")]
    pub(super) merged: Option<PathBuf>,

    /// Export this directory as a whole, instead of a container
    #[arg(long, value_name = "DIR", conflicts_with = "id")]
    pub(super) rootfs: Option<PathBuf>,
}

/// Writes the writable layer of a container into an OCI image layout.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) subject: SubjectArgs,

    /// Directory of the image layout: it must be empty, or not be there
    #[arg(short, long, value_name = "DIR")]
    pub(super) output: PathBuf,

    /// The image that the container was made of: an image layout
    ///
    /// With the image's name if the layout has several. Its layers are taken over as they are, so that the template has the
    /// base's own digests. Without this the layers below are exported from the overlay.
    #[arg(long, value_name = "DIR[:NAME]")]
    pub(super) base: Option<PathBuf>,

    /// How layers are compressed
    #[arg(long, value_enum, default_value_t = Compress::Gzip)]
    pub(super) compress: Compress,

    /// Hold the container's processes still meanwhile
    #[arg(long, requires = "id")]
    pub(super) pause: bool,

    /// Write a report of what was exported, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,

    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
}
