//! What an export has found and made, for people and for programs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is in a layer.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub(crate) struct LayerReport {
    /// How many files that are no directories, by their first names.
    pub(super) files: u64,
    /// How many directories.
    pub(super) directories: u64,
    /// How many further names of files.
    pub(super) hard_links: u64,
    /// Bytes of contents.
    pub(super) bytes: u64,
    /// How many names are deleted.
    pub(super) whiteouts: u64,
    /// How many directories hide what lies below them.
    pub(super) opaque: u64,
    /// Deletions that are listed in place of whiteouts; none in a layer.
    #[serde(skip)]
    pub(crate) hidden: Vec<String>,
    /// Sockets: they are not in the layer, because tar has no form for them.
    pub(super) sockets: Vec<String>,
    /// Files with holes, which are zeros in the layer.
    pub(super) sparse: Vec<String>,
    /// Directories where another file system is mounted: they are in the layer, what is mounted is not.
    pub(super) mounts: Vec<String>,
    /// Files and directories whose contents were taken from the mount.
    pub(super) from_mount: Vec<String>,
    /// Files that changed while they were read.
    pub(super) changed: Vec<String>,
}

/// A file that has no name any more and that a process has open.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq, JsonSchema)]
pub(crate) struct DeletedFile {
    /// Pid of the process, as this host sees it.
    pub(crate) pid: i32,
    /// The number of its descriptor.
    pub(crate) fd: i32,
    /// The name that it had, as its process saw it.
    pub(crate) path: String,
    /// The file's length, bytes.
    pub(crate) bytes: u64,
}

/// An image in the layout.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct ImageReport {
    /// `layer` or `template`.
    pub(super) name: String,
    /// The manifest's digest.
    pub(super) manifest: String,
    /// The layers' digests, lowest first.
    pub(super) layers: Vec<String>,
}

/// The result of an export.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Report {
    /// The images that the layout has now.
    pub(super) images: Vec<ImageReport>,
    /// The layer that was made.
    pub(super) layer: LayerReport,
    /// Files that are deleted and open: they are not in the layer.
    pub(super) deleted: Vec<DeletedFile>,
}

impl LayerReport {
    /// What a user should know of the layer beyond success.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let lists = [
            (
                &self.sockets,
                "is a socket, which tar cannot hold: not exported",
            ),
            (
                &self.mounts,
                "is a mount point: what is mounted there is not exported",
            ),
            (
                &self.changed,
                "changed while it was read (--pause holds a container still)",
            ),
        ];
        for (paths, what) in lists {
            warnings.extend(paths.iter().map(|path| format!("{path} {what}")));
        }
        warnings
    }
}

impl Report {
    /// What a user should know beyond success.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.layer.warnings();
        warnings.extend(self.deleted.iter().map(|file| {
            format!(
                "{} is deleted and open (pid {}, descriptor {}, {} bytes): not exported",
                file.path, file.pid, file.fd, file.bytes
            )
        }));
        warnings
    }
}
