//! What all migrations of one agent share.

use std::path::PathBuf;
use std::sync::Arc;

use pageferry::tls::TlsArgs;

use super::layers::LayerStore;
use crate::programs::Programs;

/// What all migrations of one agent use.
#[derive(Debug)]
pub(super) struct AgentContext {
    /// Directory of all migrations.
    pub(super) dir: PathBuf,
    /// The address on which pages are received.
    pub(super) host: String,
    pub(super) programs: Programs,
    pub(super) tls: TlsArgs,
    /// Directory of containers' bundles, if they are not where the source's are.
    pub(super) bundles: Option<PathBuf>,
    /// The state of container runtimes, if it is not in their own default.
    pub(super) runtime_root: Option<PathBuf>,
    /// Layers of containers that are kept here.
    pub(super) layers: Arc<LayerStore>,
}
