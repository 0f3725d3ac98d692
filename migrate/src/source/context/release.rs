//! What becomes of the processes at the source: they go on, or they are ended.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::criu::header::{GIVE_UP, HEADER_BYTES_MAX, Header, Op, PageFlags, Wire};
use pageferry::error::{Error, Kind, Result};
use pageferry::sys::disconnect::resets_are_skipped;
use pageferry::sys::owned_process::ProcessName;
use pageferry::units::{PageCount, Vaddr};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use super::{SourceContext, read_number};
use crate::files::StagingDir;
use crate::records;
use crate::runtime::criu_wrapper::CRIU_PROCESS;
use crate::source::commands::{self, MEMORY};
use crate::source::network;

/// How often the end of a process that is no child is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How long a dump may take to let its processes go once its page server's client is gone.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

impl SourceContext {
    /// Lets the processes go on here.
    pub(super) async fn release(&self) -> Result<()> {
        // Before the processes run: in repair mode a socket refuses data. A dump that has its images needs
        // the locks no more, and one that is not so far sees to them itself.
        self.unlock_network();
        // Without its page server, or the client of it, a dump fails and lets its processes go.
        self.end_forwarders();
        // A runtime that was killed leaves the CRIU that it had started.
        let criu = records::read::<ProcessName>(&self.dir().join(CRIU_PROCESS))?;
        for dump in [self.facts.dump, criu].into_iter().flatten() {
            let start = Instant::now();
            while dump.is_alive() {
                if start.elapsed() > RELEASE_LIMIT {
                    let text = format!(
                        "criu dump (pid {}) does not let the processes go; its log is {}",
                        dump.pid,
                        self.images().join("dump.log").display()
                    );
                    return Err(Error::new(Kind::Io, text));
                }
                if let Some(port) = self.facts.dump_port {
                    refuse_dump(port);
                }
                sleep(LOOK_AGAIN).await;
            }
        }
        self.unlock_network();
        for process in &self.facts.tree {
            let was_stopped = self.facts.stopped.contains(process);
            if is_stopped(process.pid) && !was_stopped {
                let _ = process.signal(Signal::SIGCONT as i32);
            }
        }
        self.remove_images();
        Ok(())
    }

    fn unlock_network(&self) {
        if self.facts.dump.is_some() {
            network::unlock(&self.facts.tree, &self.facts.connections);
        }
    }

    /// Ends what is left here once the processes run at the destination.
    pub(super) async fn end_processes(&self) {
        if self.facts.dump_port.is_some() && !self.facts.mode.is_lazy() {
            self.close_dump().await;
        }
        if self.facts.dump_port.is_some() {
            // The forwarder still has memory that the destination needs; after it the dump ends.
            for process in [self.facts.forwarder, self.facts.dump]
                .into_iter()
                .flatten()
            {
                while process.is_alive() {
                    sleep(LOOK_AGAIN).await;
                }
            }
        }
        for process in &self.facts.tree {
            // Those of a lazy dump that succeeded are gone already.
            let _ = process.signal(Signal::SIGKILL as i32);
        }
        self.end_forwarders();
        self.remove_images();
        self.forget_connections();
        for problem in self
            .facts
            .outputs
            .end(&self.client, &self.path("/outputs"))
            .await
        {
            self.warn(problem);
        }
        if let Some(container) = &self.facts.container
            && let Err(error) = container.runtime.delete(&container.id).await
        {
            tracing::error!(
                "container {} runs at the destination, but its runtime here cannot delete it: {error}",
                container.id
            );
        }
        for dir in &self.facts.files {
            if let Err(error) = StagingDir::of(dir).moved_away(&self.common.id.to_string()) {
                self.warn(format!(
                    "that {} is out of date is not noted: {error}",
                    dir.display()
                ));
            }
        }
    }

    /// Tells the dump, whose memory is all at the destination, that it has ended well: its processes end with it.
    async fn close_dump(&self) {
        let port = read_number(&self.dir().join(MEMORY.port));
        let closed = async { end_session(port?).await };
        if let Err(error) = closed.await {
            // They do not go on: each of their threads has a SIGSTOP to take first, and then they are killed.
            tracing::warn!("the dump is given up after the decision: {error}");
            self.end_forwarders();
        }
    }

    /// Removes CRIU's rules for connections that have moved. As long as an address is here that was not moved, this
    /// host would answer its clients by a reset.
    pub(in crate::source) fn forget_connections(&self) {
        if self.common.addresses.taken {
            return network::forget(&self.facts.connections);
        }
        let kept = network::forget_gone(&self.facts.connections);
        if kept > 0 {
            self.warn(format!(
                "CRIU's rules that drop the packets of {kept} connections stay in the firewall, because their address \
                 is still here; once it is not, `pageferry migrate --resume {}` removes them",
                self.common.id
            ));
        }
    }

    fn end_forwarders(&self) {
        let forwarders = [self.facts.forwarder, self.facts.round_forwarder];
        for forwarder in forwarders.into_iter().flatten() {
            // It may have ended by itself.
            let _ = forwarder.signal(Signal::SIGTERM as i32);
        }
    }

    /// Removes what holds memory; logs and records stay.
    fn remove_images(&self) {
        for entry in fs::read_dir(self.images()).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "log") {
                let _ = fs::remove_file(path);
            }
        }
        commands::forget_hashes(self.dir());
    }
}

/// Whether a thread of the process is stopped, or has a SIGSTOP to take before its next instruction.
fn is_stopped(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        let field = |name| {
            let mut lines = status.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.trim()))
        };
        let pending = field("SigPnd:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
        let stop = 1_u64 << (libc::SIGSTOP - 1);
        field("State:").is_some_and(|state| state.starts_with('T'))
            || pending.is_some_and(|pending| pending & stop != 0)
    })
}

/// Says CLOSE to the page-server at `port`, which holds a lazy dump, and waits for its answer.
async fn end_session(port: u16) -> Result<()> {
    let lost = |error| Error::wrap(Kind::PeerLost, "what holds the dump is lost", error);
    let close = Header {
        op: Op::Close,
        flags: PageFlags::default(),
        pages: PageCount(0),
        vaddr: Vaddr(0),
        dst_id: 0,
    };
    let mut bytes = [0; HEADER_BYTES_MAX];
    let length = close.encode(Wire::V2, &mut bytes);
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(&bytes[..length]).await?;
        stream.read_i32_le().await
    };
    match timeout(RELEASE_LIMIT, asked).await {
        Ok(Ok(0)) => Ok(()),
        Ok(Ok(status)) => {
            let text = format!("what holds the dump answers the end with status {status}");
            Err(Error::new(Kind::PeerLost, text))
        }
        Ok(Err(error)) => Err(lost(error)),
        Err(elapsed) => Err(lost(elapsed.into())),
    }
}

/// Tells a lazy dump that nobody takes its memory: one to which nobody has connected yet would wait for ever.
/// Nothing happens if it has a client, or does not listen.
fn refuse_dump(port: u16) {
    let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return;
    };
    if resets_are_skipped() {
        return;
    }
    // The message makes every CRIU give its dump up; the reset after it does so without an answer.
    let _ = (&stream).write_all(&GIVE_UP);
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}
