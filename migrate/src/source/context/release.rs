//! What becomes of the processes at the source: they go on, or they are ended.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::criu::header::GIVE_UP;
use pageferry::error::{Error, Kind, Result};
use pageferry::sys::disconnect::resets_are_skipped;
use pageferry::sys::owned_process::{ProcessName, ProcessStat};
use socket2::SockRef;
use tokio::time::{Instant, sleep};

use super::SourceContext;
use crate::files::StagingDir;
use crate::records;
use crate::runtime::criu_wrapper::CRIU_PROCESS;
use crate::source::{commands, network};

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
            let is_stopped = ProcessStat::of(process.pid).is_ok_and(|stat| stat.state == 'T');
            if is_stopped && !was_stopped {
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

    /// Ends what is left here once the processes live at the destination.
    pub(super) async fn end_processes(&self) {
        if self.facts.mode.is_lazy() {
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
                "container {} lives at the destination, and its runtime here does not forget it: {error}",
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
