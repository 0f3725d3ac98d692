//! What a lazy-pages daemon makes of a set of configuration files: whether it has a page server, where, and how
//! it speaks to it.
//!
//! CRIU connects only when the restore has handed everything over. So a restore is played here whose processes
//! are all zombies, which have no memory. Then both say at once that they are done.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::image::dir::ImageDir;
use pageferry::units::PageSize;
use testbed::daemons::Make;
use testbed::process::Spawned;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

use super::{Place, Settings, TestNetwork, and, at, files_in, with};

/// See the module's text.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It ends with an error, and says why.
    Refused(String),
    /// It ends well without a page server.
    Alone,
    Connects {
        ip: IpAddr,
        port: u16,
        tls: bool,
        /// What it has written to its work directory.
        files: BTreeSet<String>,
    },
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Outcome) -> bool {
        match (self, other) {
            (Outcome::Refused(_), Outcome::Refused(_)) | (Outcome::Alone, Outcome::Alone) => true,
            (
                Outcome::Connects {
                    ip,
                    port,
                    tls,
                    files,
                },
                Outcome::Connects {
                    ip: i,
                    port: p,
                    tls: t,
                    files: f,
                },
            ) => ip.to_canonical() == i.to_canonical() && port == p && tls == t && files == f,
            _ => false,
        }
    }
}

/// Sets in which each file has a say on the page server.
pub(crate) fn by_hand() -> Vec<Settings> {
    use Place::{Environment, Global, Home, Named};
    let named = |text| at(Named, text);
    vec![
        at(Global, "page-server\nport 2001\naddress 127.0.0.2\ntls\n"),
        with(
            at(Global, "page-server\nport 2001\naddress 127.0.0.1\ntls\n"),
            Home,
            "port 2002\nno-tls\n",
        ),
        with(
            with(
                at(Global, "port 2001\naddress 127.0.0.1\n"),
                Home,
                "port 2002\npage-server",
            ),
            Environment,
            "port 2003\ntls",
        ),
        with(
            with(
                at(Global, "tls\n"),
                Environment,
                "port 2003\naddress 127.0.0.1",
            ),
            Named,
            "port 2004\npage-server",
        ),
        and(
            with(
                at(Global, "port 2001\ntls"),
                Named,
                "port 2004\naddress ::1\n",
            ),
            "--page-server --port 2005 --no-tls",
        ),
        and(
            at(Global, "port 2001\ntls\npage-server\naddress 127.0.0.2\n"),
            "--no-default-config --page-server --address 127.0.0.1 --port 2006",
        ),
        and(at(Home, "tls\nport 2002"), "--no-default-config"),
        named("port 2010\naddress 127.0.0.1\ntls\n"),
        named(" page-server # a comment\nport=2011\naddress\t127.0.0.2\n"),
        named("page-server\nport \"2012\"\naddress 127.0.0.1\nlog-file \"a b.log\"\n"),
        named("daemon\npidfile p.pid\npage-server\nport 2013\naddress 127.0.0.1\nlog-file d.log\n"),
        named("page-server\nport 2014x\naddress 127.0.0.1\n"),
        named("page-server\nbogus\nport 2015\naddress 127.0.0.1\n"),
        named("page-server\nport 2016\naddress 127.0.0.1\ntcp-established\nghost-limit 1M\n"),
    ]
}

impl TestNetwork<'_> {
    /// Starts a lazy-pages daemon with `settings` over copies of `images` and sees what it does.
    pub(crate) fn lazy_pages(
        &self,
        make: Make<'_>,
        settings: &Settings,
        images: &Path,
    ) -> Result<Outcome> {
        let home = tempfile::tempdir_in(self.test_dir.dir())?;
        let program = match make {
            Make::Ours | Make::Build(_) => binary("lazy-client")?,
            Make::Criu(criu) => criu.path.clone(),
        };
        let mut command = self.command(home.path(), &program, "lazy-pages", settings)?;
        let work = home.path().join("images");
        for entry in fs::read_dir(images)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|end| end == "img") {
                fs::hard_link(entry.path(), work.join(entry.file_name()))?;
            }
        }
        let listeners = self.listen_for(settings)?;
        let log = home.path().join("log");
        let output = fs::File::create(&log)?;
        command.stdout(output.try_clone()?).stderr(output);
        let mut daemon = Spawned::start("lazy-pages", &mut command, Some(log.clone()))?;
        let outcome = outcome(&mut daemon, &listeners, &work, &log);
        if let Ok(pid) = fs::read_to_string(work.join("p.pid")) {
            let _ = kill(Pid::from_raw(pid.trim().parse()?), Signal::SIGKILL);
        }
        outcome
    }

    /// Listens on all ports that `settings` name.
    fn listen_for(&self, settings: &Settings) -> Result<Vec<TcpListener>> {
        let mut ports = BTreeSet::new();
        let texts = settings.files.values().chain(&settings.words);
        for text in texts {
            let numbers = text.split(|letter: char| !letter.is_ascii_digit());
            ports.extend(
                numbers
                    .filter(|number| number.len() == 4)
                    .map(str::to_owned),
            );
        }
        let listen = |port: &String| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.parse()?))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        self.hosts
            .source
            .net
            .enter(|| ports.iter().map(listen).collect())
    }
}

fn outcome(
    daemon: &mut Spawned,
    listeners: &[TcpListener],
    work: &Path,
    log: &Path,
) -> Result<Outcome> {
    let (mut ended, mut restore) = (None, None);
    wait::until("what a lazy-pages daemon does", GENEROUS, || {
        if restore.is_none() {
            restore = play_restore(work)?;
        }
        for listener in listeners {
            if let Some(stream) = accept(listener)? {
                let here = stream.local_addr()?;
                return Ok(Some(Outcome::Connects {
                    ip: here.ip(),
                    port: here.port(),
                    tls: begins_tls(stream)?,
                    files: files_but_sockets(work)?,
                }));
            }
        }
        if ended.is_none() {
            ended = daemon.ended()?;
        }
        let Some(ended) = &ended else {
            return Ok(None);
        };
        match ended.status.success() {
            false => Ok(Some(Outcome::Refused(fs::read_to_string(log)?))),
            // In the background it goes on, though what was started has ended well.
            true if work.join("p.pid").exists() => Ok(None),
            true => Ok(restore.is_some().then_some(Outcome::Alone)),
        }
    })
}

/// The socket may be gone by then.
fn files_but_sockets(work: &Path) -> Result<BTreeSet<String>> {
    let mut files = files_in(work)?;
    files.retain(|name| !name.ends_with(".socket"));
    Ok(files)
}

/// Hands zombies over, as soon as somebody listens.
fn play_restore(work: &Path) -> Result<Option<UnixStream>> {
    let mut restore = match UnixStream::connect(work.join("lazy-pages.socket")) {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        connected => connected?,
    };
    let page = PageSize::new(4096).context("a page size")?;
    let mut words = Vec::new();
    for pid in ImageDir::open(work, page)?.processes()? {
        words.extend((-i32::try_from(pid)?).to_le_bytes());
    }
    words.extend(b"FTSR");
    // It may have given up meanwhile.
    let _ = restore.write_all(&words);
    Ok(Some(restore))
}

fn accept(listener: &TcpListener) -> Result<Option<TcpStream>> {
    match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        accepted => Ok(Some(accepted?.0)),
    }
}

/// Whether a client begins with the greeting of TLS. Without it, it says that it needs nothing, or hangs up.
fn begins_tls(mut stream: TcpStream) -> Result<bool> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut first = [0];
    let got = stream.read(&mut first).unwrap_or(0);
    Ok(got == 1 && first[0] == 0x16)
}
