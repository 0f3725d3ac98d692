//! The freeze: the last dump, its pages and images, and the restore at the destination.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use pageferry::error::{Error, Kind, Result};
use pageferry::ferry::known_hashes::KnownHashes;
use pageferry::migration::AgentState;
use pageferry::migration::events::Step;
use pageferry::migration::messages::{RestoreRequest, Status, TcpConnections};
use pageferry::tls::TlsArgs;
use tokio::net::unix::pipe;
use tokio::time::timeout;
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::{Flow, READY_LIMIT, blocking};
use crate::child::Program;
use crate::client::AgentProblem;
use crate::image_stream::pack;
use crate::rounds::Tree;
use crate::runtime::runtime_log;
use crate::source::commands::{self, MEMORY, Pages, free_port};
use crate::source::context::read_number;
use crate::source::last_pages::LastPages;
use crate::source::network;
use crate::source::shared;

/// Buffered between the reading of image files and the connection, bytes.
const IMAGES_BUFFER_BYTES: usize = 256 << 10;

/// How long the destination may take to say why the dump or its forwarder has ended. Its lazy-client takes up to a
/// second of that to say so to a forwarder that is gone.
const LAST_ANSWER: Duration = Duration::from_secs(3);

/// A dump that was started.
struct Dump {
    program: Program,
    /// Where it says that it serves memory, if not where the programs of this project do.
    status: Option<pipe::Receiver>,
}

impl Dump {
    /// Waits until a lazy dump serves memory.
    async fn ready(&mut self, limit: Duration) -> Result<()> {
        match self.status.take() {
            Some(status) => self.program.ready_by(status, limit).await,
            None => self.program.ready(limit).await,
        }
    }
}

impl Flow<'_> {
    /// Starts the dump: a container's runtime does it, or CRIU.
    fn start_dump(&mut self, pages: Pages) -> Result<Dump> {
        let (images, tcp) = (self.context.images(), self.args.tcp());
        let log = images.join("dump.log");
        let dump = match &self.context.facts.container {
            Some(container) => {
                let dir = self.context.dir();
                let external = self.context.facts.outputs.external();
                let (mut command, status) =
                    container.checkpoint(&self.programs, dir, &images, pages, (tcp, external))?;
                let program =
                    Program::start(container.title(), &mut command, &runtime_log(&images))?;
                Dump {
                    // A runtime's own log does not say what CRIU says.
                    program: program.with_criu_log(log),
                    status,
                }
            }
            None => {
                let mut command = commands::dump(&self.programs, self.root(), &images, pages, tcp);
                let program = match pages {
                    Pages::SentTo(_) => Program::start("criu dump", &mut command, &log)?,
                    Pages::ServedAt(_) => Program::start_waiting("criu dump", &mut command, &log)?,
                };
                Dump {
                    program,
                    status: None,
                }
            }
        };
        self.context.facts.dump = Some(dump.program.name());
        self.context.keep_facts()?;
        Ok(dump)
    }

    /// Freezes for good: all pages go to the destination before the restore.
    pub(super) async fn dump_whole(&mut self) -> Result<()> {
        let port = self.forwarder_address()?.port();
        self.events().begin(Step::Dump);
        let mut dump = self.start_dump(Pages::SentTo(port))?;
        self.seal_files();
        dump.program.succeed().await?;
        self.dumped.notify_one();
        self.note_connections()?;
        self.phase("dump");
        self.events().begin(Step::Images);
        let images = self.send_images(BTreeSet::new());
        let (_, bytes) = tokio::try_join!(self.stored("/pages"), images)?;
        self.report.wire_bytes += bytes;
        self.phase("images");
        self.restore(None).await
    }

    /// Freezes for good, and sends what differs from the last round, whose hashes are `known`.
    pub(super) async fn dump_changes(&mut self, known: KnownHashes) -> Result<()> {
        let (dump, port) = self.start_serving_dump().await?;
        // It holds the dump, which ends when it is told so, or gives its processes up if this one dies.
        let here = Ipv4Addr::LOCALHOST.to_string();
        let mut holder = self.start_lazy_forwarder(port, &here, &TlsArgs::default())?;
        self.events().begin(Step::Pages);
        let (dir, page, wire) = (self.context.images(), self.page, self.wire);
        let tree = Tree::of(self.root())?;
        let found = blocking("finding the last pages", move || {
            LastPages::find(&dir, &tree, page)
        });
        let pages = Arc::new(found.await?);
        let images = self.send_images(pages.files());
        let forwarder = self.forwarder_address()?;
        let sent = Arc::clone(&pages);
        let sending = blocking("sending the last pages", move || {
            sent.send(forwarder, wire, &known)
        });
        let stored = async {
            sending.await?;
            self.stored("/pages").await
        };
        let (_, bytes) = tokio::try_join!(stored, images)?;
        self.report.wire_bytes += bytes;
        self.phase("pages");
        self.events().begin(Step::Forwarder);
        holder.ready(READY_LIMIT).await?;
        self.phase("forwarder");
        self.restore_beside(None, dump, holder).await?;
        // Held in two ways for a moment: if the dump lets them go from now on, none runs.
        self.context.fence();
        pages.expect_stopped()
    }

    /// Freezes until the destination can go on without what is still here.
    pub(super) async fn dump_lazily(&mut self, sends_shared: bool) -> Result<()> {
        let (dump, port) = self.start_serving_dump().await?;
        // It begins while other memory and the images are on their way.
        let (address, tls) = (self.serving_address(), self.args.target.tls.clone());
        let mut forwarder = self.start_lazy_forwarder(port, &address, &tls)?;
        let sent = match sends_shared {
            true => self.send_shared().await?,
            false => BTreeSet::new(),
        };
        if let Some(rounds) = &self.context.facts.round_forwarder {
            let _ = rounds.signal(libc::SIGTERM);
        }
        self.notes = MEMORY;
        self.sessions = 0;
        self.events().begin(Step::Images);
        self.report.wire_bytes += self.send_images(sent).await?;
        self.phase("images");
        self.events().begin(Step::Forwarder);
        forwarder.ready(READY_LIMIT).await?;
        self.phase("forwarder");
        let port = read_number(&self.context.dir().join(MEMORY.port))?;
        self.restore_beside(Some(port), dump, forwarder).await
    }

    /// Starts a dump that serves memory, and waits until it does: it has stopped the tree and written its images. Tells
    /// the port.
    async fn start_serving_dump(&mut self) -> Result<(Dump, u16)> {
        let port = free_port()?;
        self.context.facts.dump_port = Some(port);
        self.events().begin(Step::Dump);
        let mut dump = self.start_dump(Pages::ServedAt(port))?;
        self.seal_files();
        dump.ready(self.args.timeout).await?;
        self.dumped.notify_one();
        self.note_connections()?;
        if self.context.facts.tcp == TcpConnections::Established {
            network::leave_repair_mode(&self.context.facts.tree);
        }
        self.phase("dump");
        Ok((dump, port))
    }

    /// Restores there while `dump` and its `forwarder` hold the tree here.
    async fn restore_beside(
        &mut self,
        memory_port: Option<u16>,
        mut dump: Dump,
        mut forwarder: Program,
    ) -> Result<()> {
        let mut rest = Box::pin(self.restore(memory_port));
        // Without the memory the destination would wait in vain, and the processes with it.
        let ended = tokio::select! {
            ready = &mut rest => Ok(ready),
            error = forwarder.unexpected_end() => Err(error),
            error = dump.program.unexpected_end() => Err(error),
        };
        let ready = match ended {
            Ok(ready) => ready,
            // A restore that fails ends them too, and only the destination can say so.
            Err(error) => match timeout(LAST_ANSWER, &mut rest).await {
                Ok(Err(cause)) => Err(cause),
                Ok(Ok(())) | Err(_) => Err(error),
            },
        };
        drop(rest);
        self.running.extend([dump.program, forwarder]);
        ready
    }

    /// Starts what takes over the memory of the lazy dump at `dump_port` and serves it at `address`.
    fn start_lazy_forwarder(
        &mut self,
        dump_port: u16,
        address: &str,
        tls: &TlsArgs,
    ) -> Result<Program> {
        let dir = self.context.dir().to_owned();
        let mut command = commands::lazy_forwarder(
            &self.programs,
            tls,
            (&dir, &self.context.images()),
            dump_port,
            address,
        );
        let title = "page-server --forward-lazy";
        let forwarder = Program::start_waiting(title, &mut command, &dir.join(MEMORY.log))?;
        let facts = &mut self.context.facts;
        facts.round_forwarder = facts.forwarder.replace(forwarder.name());
        self.context.keep_facts()?;
        Ok(forwarder)
    }

    fn serving_address(&self) -> String {
        match (&self.args.serve_on, self.args.target.tls.tls) {
            (Some(address), _) => address.clone(),
            (None, true) => Ipv4Addr::UNSPECIFIED.to_string(),
            (None, false) => Ipv4Addr::LOCALHOST.to_string(),
        }
    }

    /// Sends what has changed in shared memory since the last round, and tells the files that hold it.
    async fn send_shared(&mut self) -> Result<BTreeSet<OsString>> {
        self.events().begin(Step::Shared);
        let images = self.context.images();
        let forwarder = self.forwarder_address()?;
        let (page, wire) = (self.page, self.wire);
        let sent = blocking("sending shared memory", move || {
            shared::send(&images, forwarder, page, wire)
        });
        let sent = sent.await?;
        self.stored("/pages").await?;
        self.phase("shared");
        Ok(sent)
    }

    /// Sends the image files that the dump wrote, but for those that are there, and tells their bytes.
    fn send_images(&self, sent: BTreeSet<OsString>) -> impl Future<Output = Result<u64>> + use<> {
        let (images, client) = (self.context.images(), self.client.clone());
        let path = self.context.path("/images");
        async move {
            let (near, far) = tokio::io::duplex(IMAGES_BUFFER_BYTES);
            let packed = blocking("sending the images", move || {
                pack(&images, &sent, SyncIoBridge::new(near))
            });
            let body = Body::from_stream(ReaderStream::new(far));
            let stored = client.put::<Status>(&path, body).await;
            let packed = packed.await;
            // An agent that refuses them says why; here only the connection is seen to end.
            stored?;
            packed
        }
    }

    /// Notes the connections of the frozen tree.
    fn note_connections(&mut self) -> Result<()> {
        let facts = &mut self.context.facts;
        if facts.tcp != TcpConnections::Established {
            return Ok(());
        }
        facts.connections = network::connections(&facts.tree).into_iter().collect();
        self.context.keep_facts()
    }

    /// Takes the addresses off this host, if some move along: the destination needs them for its restore.
    async fn take_addresses(&mut self) -> Result<()> {
        let addresses = &mut self.context.common.addresses;
        let taken = !addresses.is_empty();
        addresses.taken = taken;
        if taken {
            self.note_switch();
            self.events().begin(Step::Address);
            self.context.keep_facts()?;
            self.context.common.addresses.take().await?;
            self.phase("address");
        }
        Ok(())
    }

    async fn restore(&mut self, memory_port: Option<u16>) -> Result<()> {
        self.files_sealed().await?;
        self.send_outputs(true).await?;
        self.take_addresses().await?;
        self.events().begin(Step::Restore);
        let request = RestoreRequest { memory_port };
        let path = self.context.path("/restore");
        let status: Status = self.client.post(&path, &request).await?;
        match status.state {
            AgentState::Ready => {
                self.phase("restore");
                Ok(())
            }
            _ => {
                let why = status
                    .problem
                    .unwrap_or_else(|| format!("the migration there is {}", status.state));
                let text = "the destination could not restore";
                Err(Error::wrap(Kind::PeerLost, text, AgentProblem(why)))
            }
        }
    }
}
