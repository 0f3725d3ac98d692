//! A run of a server that receives.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::unistd::syncfs;
use testbed::daemons::{PageServer, Sink};
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::migration::Dump;
use testbed::test_dir::{TestDir, warm_memory};

use super::case::{Contender, Feed, Link, Target};
use super::pages::Pages;
use super::recording::{Recording, capture, generate};
use super::run::{Bench, Run, TIMEOUT};

/// Name of the recording among what runs share.
const RECORDING: &str = "recording";

impl Bench<'_> {
    /// What is sent by all contenders' senders. Takes its size in memory.
    pub(super) fn record(&self, mib: u32, feed: Feed) -> Result<Recording> {
        let path = self.path(RECORDING);
        match feed {
            Feed::Frames(pages) => generate(&path, mib, pages, self.page),
            Feed::Captured => self.capture(&path, mib),
        }
        .context("recording what is to be sent")
    }

    /// Gives the memory of the last recording back.
    pub(super) fn forget_recording(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.path(RECORDING))?)
    }

    /// Takes down what CRIU says when it dumps a process of `mib` MiB.
    fn capture(&self, path: &Path, mib: u32) -> Result<Recording> {
        let test_dir = TestDir::new_in(&Target::Tmpfs.dir(self.disk)?)?;
        let load = Load::start(self.load(&test_dir, mib), None)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let dump = Dump::new(self.criu, load.pid(), test_dir.path("dump"));
        let mut dump = dump.to(listener.local_addr()?).start()?;
        let wire = self.wire()?;
        thread::scope(|scope| {
            let captured = scope.spawn(|| {
                let (connection, _) = listener.accept()?;
                capture(connection, path, wire, self.page)
            });
            let ended = dump.succeed(TIMEOUT);
            if ended.is_err() {
                // Whoever still waits for the dump hears that there is none.
                drop(std::net::TcpStream::connect(listener.local_addr()?));
            }
            let captured = captured.join().expect("no panic but our own");
            ended.and(captured)
        })
    }

    /// A process with `mib` MiB that do not compress.
    pub(super) fn load(&self, test_dir: &TestDir, mib: u32) -> LoadSpec {
        let pages = mib << (20 - self.page.shift());
        let area = AreaSpec::new(Mapping::Private, pages, Content::Random);
        LoadSpec {
            lifetime_s: u32::try_from(10 * TIMEOUT.as_secs()).unwrap_or(u32::MAX),
            ..LoadSpec::new(test_dir.path("load"), vec![area])
        }
    }

    /// Lets a contender receive `recording`, and checks what it stored.
    ///
    /// # Errors
    /// The server fails, answers something else than success, or stores something wrong.
    pub(super) fn receive(
        &self,
        recording: &Recording,
        target: Target,
        link: Link,
        who: Contender,
    ) -> Result<Run> {
        let test_dir = TestDir::new_in(&target.dir(self.disk)?)?;
        if target == Target::Disk {
            // What was written before is not to be written during the run.
            syncfs(&File::open(test_dir.dir())?)?;
        }
        warm_memory(self.dir(), recording.bytes())?;
        if who == Contender::Sink {
            return self.receive_bare(recording, &test_dir);
        }
        let images = test_dir.path("images");
        let options = self.options(&images, link).with(who.options());
        let mut server = PageServer::receiving(self.make(who), &options)?;
        let cpu = server.process().cpu()?;

        let pages = Pages::load(recording, link)?;
        let started = Instant::now();
        let mut connection = self.connect(server.address(), link)?;
        connection.send(recording, pages)?;
        let mut answers = vec![0xff; recording.answers.len()];
        let answered = connection.read_exact(&mut answers);
        let wall = started.elapsed();

        answered.with_context(|| server.process().log_tail())?;
        ensure!(answers == recording.answers, "answers: {answers:x?}");
        let peak = server.process().peak_rss_bytes()?;
        connection.end()?;
        let used = server.finish(TIMEOUT)?.cpu.saturating_sub(cpu);
        recording.check(&images)?;
        let bytes = recording.pages() << self.page.shift();
        Ok(Run::new(wall, bytes, used, peak))
    }

    fn receive_bare(&self, recording: &Recording, test_dir: &TestDir) -> Result<Run> {
        let stored = test_dir.path("stored");
        let mut sink = Sink::start(&stored)?;
        let cpu = sink.process().cpu()?;

        let pages = Pages::load(recording, Link::Plain)?;
        let started = Instant::now();
        let mut connection = self.connect(sink.address(), Link::Plain)?;
        connection.send(recording, pages)?;
        let peak = sink.process().peak_rss_bytes()?;
        connection.end()?;
        let wall = started.elapsed();

        let ended = sink.process().succeed(TIMEOUT)?;
        let used = ended.cpu.saturating_sub(cpu);
        let length = stored.metadata()?.len();
        ensure!(
            length == recording.bytes(),
            "the sink stored {length} bytes"
        );
        let bytes = recording.pages() << self.page.shift();
        Ok(Run::new(wall, bytes, used, peak))
    }
}
