//! The options of a post-copy restore.

use std::path::PathBuf;
use std::time::Duration;

use crate::criu::header::Wire;
use crate::engine::io::transport::Peer;
use crate::lazy::huge_pages::HugePages;
use crate::lazy::policy::Policy;
use crate::tls::Tls;

/// What to do about processes whose pages are lost with the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnLoss {
    /// Reading a lost page raises SIGBUS.
    Poison,
    /// Readers wait until an operator decides.
    Hold,
    /// The processes are killed.
    Kill,
}

/// What a post-copy restore is to do.
#[derive(Clone, Debug)]
pub struct RestoreConfig {
    /// The image directory, with `pstree.img`, `mm-*.img` and `pagemap-*.img`.
    pub images_dir: PathBuf,
    /// Who has the pages that no local image has.
    pub source: Option<Peer>,
    /// What secures the connections to it.
    pub tls: Option<Tls>,
    /// The source is a page-server that forwards a lazy dump: it is spoken to over ferry.
    pub ferry: bool,
    /// The directory of an earlier round's images, whose pages need not travel over ferry: absolute, or
    /// relative to the image directory. `None` leaves it to that one's parent link.
    pub prev_images_dir: Option<PathBuf>,
    /// The source's header layout, if the images are not to tell.
    pub wire: Option<Wire>,
    /// Serve faults alone.
    pub on_demand: bool,
    /// The background's bytes a second at most.
    pub max_bandwidth: Option<u64>,
    /// What happens to the processes when the source is lost.
    pub on_loss: OnLoss,
    /// How long to try to reach a lost source again. `None` leaves it to what the source is: one
    /// that answers on several connections is tried for 30 s, CRIU's dump, which takes one connection in its life, is not.
    pub reconnect_timeout: Option<Duration>,
    /// How long what fails on this host (images that cannot be read, a full control group) is tried again before the pages
    /// concerned are given up.
    pub local_timeout: Duration,
    /// How long the restore may say nothing before it is finished, if there is a source: a dump's processes stand
    /// still meanwhile.
    pub restore_timeout: Option<Duration>,
    /// Where each fault is to be recorded.
    pub trace: Option<PathBuf>,
    /// Who decides what faults bring and in what order the rest comes.
    pub policy: &'static dyn Policy,
    /// The pages to bring first. `None`: `working-set.img` of the image directory, if there is one.
    pub working_set: Option<PathBuf>,
    /// Where the pages that are touched first are to be recorded, or added. Then none are brought first.
    pub record_working_set: Option<PathBuf>,
    /// For how long after the restore has finished.
    pub record_time: Duration,
    /// How long to wait at the start for the images and the source.
    pub wait: Duration,
    /// What is installed everywhere leaves the local images.
    pub auto_dedup: bool,
    /// What becomes huge pages again once it has come.
    pub huge_pages: HugePages,
}
