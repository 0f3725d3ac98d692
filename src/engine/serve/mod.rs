//! Serves the pages of an image directory to clients that restore lazily.
//!
//! ```text
//! socket --> requests --> chain: where are the bytes --> short runs: pread into the answer buffer --> socket
//!                                                        long runs: sendfile -----------------------^
//! ```
//!
//! One thread a client, so that a slow one holds up no other. Answers to small requests are
//! gathered as long as whole requests lie in the buffer and leave in one write; that, not the
//! copy, is what one-page requests cost. Long runs go from the page cache to the socket without
//! passing through this process. Memory is the two buffers of [`limits`](crate::limits) a client
//! and one record an extent of each chain in use; no page of an image stays here.
//!
//! A restore may be idle for as long as it likes: a client that has asked for a page, or whose host
//! has in another connection (pageferry's client makes two and may need but one), is not
//! waited for with a clock. All others are, if the user says so: who never asks, who stops within a
//! request, who takes no answers. That a host is gone is found out by probes.

mod host_activity;
mod local_reads;
pub(in crate::engine) mod memory;
mod session;

use std::collections::HashMap;
use std::fmt::Debug;
use std::io::ErrorKind;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use crate::criu::header::{Target, Wire};
use crate::engine::serve::host_activity::ActiveHosts;
use crate::engine::serve::memory::Memory;
use crate::error::{Error, Kind, Result};
use crate::image::chain::{Chain, Missing};
use crate::image::dir::ImageDir;
use crate::observe::traffic::Traffic;
use crate::stream::{Stream, silent};
use crate::sync::Mutex;
use crate::units::PageSize;
use local_reads::LocalReads;
use session::Session;

/// How long a read that fails is tried again.
pub const LOCAL_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// What all clients of a page server share.
#[derive(Debug)]
pub struct ServeContext {
    memories: Box<dyn Memories>,
    page: PageSize,
    wire: Option<Wire>,
    traffic: Arc<Traffic>,
    idle_timeout: Option<Duration>,
    active_hosts: ActiveHosts,
    local_reads: LocalReads,
}

/// Where the memory of processes is.
pub(in crate::engine) trait Memories: Debug + Send + Sync {
    /// The memory of the process that the images call `pid`.
    fn memory(&self, pid: u32) -> Result<Arc<dyn Memory>>;
}

/// The memory of all processes of an image directory.
#[derive(Debug)]
struct Images {
    dir: ImageDir,
    /// Chains that some client uses now. A new session reads the images anew if no other does: they
    /// may have been replaced meanwhile.
    chains: Mutex<HashMap<u32, Weak<Chain>>>,
}

/// What one session did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Who asked.
    pub peer: String,
    /// Answered requests.
    pub requests: u64,
    /// Answers with fewer pages than asked for.
    pub short_answers: u64,
    /// Pages sent.
    pub pages: u64,
    /// Bytes of pages sent.
    pub bytes: u64,
    /// From the start of the session to its end.
    pub elapsed: Duration,
}

impl ServeContext {
    /// Serves `dir` to clients that speak `wire`, or whatever each shows to speak.
    pub fn new(dir: ImageDir, wire: Option<Wire>) -> ServeContext {
        let page = dir.page();
        let chains = Mutex::default();
        ServeContext::of(Box::new(Images { dir, chains }), page, wire)
    }

    /// Serves `memories`, of pages of `page`.
    pub(in crate::engine) fn of(
        memories: Box<dyn Memories>,
        page: PageSize,
        wire: Option<Wire>,
    ) -> ServeContext {
        ServeContext {
            memories,
            page,
            wire,
            traffic: Arc::default(),
            idle_timeout: None,
            active_hosts: ActiveHosts::default(),
            local_reads: LocalReads::new(LOCAL_TIMEOUT_DEFAULT),
        }
    }

    /// Ends sessions whose client is silent for so long where it may not be: see the module's text.
    #[must_use]
    pub fn ending_idle(self, idle_timeout: Option<Duration>) -> ServeContext {
        ServeContext {
            idle_timeout,
            ..self
        }
    }

    /// Whether the first bytes that a client sends are `bytes`, which stay to be read. It may be silent
    /// for as long as a client of these sessions may be; afterwards reads wait for ever.
    pub(in crate::engine) fn begins_with<const N: usize>(
        &self,
        stream: &mut Stream,
        bytes: [u8; N],
    ) -> Result<bool> {
        let time_limit = self.idle_timeout;
        let lost = |error| Error::wrap(Kind::PeerLost, "the first bytes did not come", error);
        let set = |stream: &Stream, time_limit| stream.socket().set_read_timeout(time_limit);
        set(stream, time_limit).map_err(lost)?;
        loop {
            let begins = match stream.begins() {
                Ok(false) => return Err(Error::nothing_came(stream.peer())),
                Ok(true) => stream.begins_with(bytes),
                Err(error) => Err(error),
            };
            match begins {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.active_hosts.contains(&stream.host()) {
                        return Err(silent(time_limit));
                    }
                }
                result => {
                    set(stream, None).map_err(lost)?;
                    return result.map_err(lost);
                }
            }
        }
    }

    /// Tries reads that fail again for so long (without this for [`LOCAL_TIMEOUT_DEFAULT`]) before a session ends.
    #[must_use]
    pub fn reading_again(self, timeout: Duration) -> ServeContext {
        let local_reads = LocalReads::new(timeout);
        ServeContext {
            local_reads,
            ..self
        }
    }

    /// Counts what the sessions send in `traffic` as well.
    #[must_use]
    pub fn counting_in(self, traffic: Arc<Traffic>) -> ServeContext {
        ServeContext { traffic, ..self }
    }
}

impl Memories for Images {
    fn memory(&self, pid: u32) -> Result<Arc<dyn Memory>> {
        // Poisoned or not, the map is whole: it is changed by single insertions.
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chain) = chains.get(&pid).and_then(Weak::upgrade) {
            return Ok(chain);
        }
        let target = Target::Process(pid);
        let chain = Arc::new(Chain::open(&self.dir, target, Missing::Leave)?);
        chains.retain(|_, chain| chain.strong_count() > 0);
        chains.insert(pid, Arc::downgrade(&chain));
        Ok(chain)
    }
}

/// Serves one client until it says CLOSE. On failure (a page that no image has, a client that
/// breaks the protocol or goes away before CLOSE, an image that cannot be read for too long) the connection is
/// reset and the error says why; [`Kind::Io`] is a failure of this host.
pub fn serve_client(stream: Stream, context: &ServeContext) -> Result<Summary> {
    serve_until_closed(stream, context, &|| Ok(()))
}

/// The same; `closing` is done before CLOSE is answered, and in its place if it fails.
pub(in crate::engine) fn serve_until_closed(
    stream: Stream,
    context: &ServeContext,
    closing: &dyn Fn() -> Result<()>,
) -> Result<Summary> {
    let mut session = Session::new(stream, context);
    match session.run(closing) {
        Ok(()) => Ok(session.summary()),
        Err(error) => {
            let error = error.within(format!("client {}", session.stream.peer()));
            session.stream.reset();
            Err(error)
        }
    }
}
