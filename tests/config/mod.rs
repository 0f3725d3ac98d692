//! Sets of configuration files, and what a page server makes of them.

pub(crate) mod lazy;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use testbed::daemons::Make;
use testbed::net::TwoHosts;
use testbed::pki::{Authority, Host};
use testbed::process::Spawned;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Puts a directory in the place of /etc/criu, for this process alone, and starts the rest.
const SCRIPT: &str = "set -e; mount -t tmpfs none \"$1\"; mkdir \"$1/up\" \"$1/work\"; \
    mount -t overlay -o \"lowerdir=/etc,upperdir=$1/up,workdir=$1/work\" none /etc; \
    mkdir -p /etc/criu; rm -f /etc/criu/*; if [ -e \"$2\" ]; then cp \"$2\" /etc/criu/default.conf; fi; \
    shift 2; exec \"$@\"";

/// Where settings can stand, in CRIU's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Place {
    Global,
    Home,
    Environment,
    Named,
}

impl Place {
    pub(crate) const ALL: [Place; 4] =
        [Place::Global, Place::Home, Place::Environment, Place::Named];
}

/// A set of files, and words of the command line.
#[derive(Clone, Default, Debug)]
pub(crate) struct Settings {
    files: BTreeMap<Place, String>,
    words: Vec<String>,
}

/// What a page server makes of them.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It ends with an error, and says why.
    Refused(String),
    Listens {
        address: SocketAddr,
        tls: bool,
        /// What it has written to its work directory.
        files: BTreeSet<String>,
    },
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Outcome) -> bool {
        match (self, other) {
            (Outcome::Refused(_), Outcome::Refused(_)) => true,
            (
                Outcome::Listens {
                    address,
                    tls,
                    files,
                },
                Outcome::Listens {
                    address: a,
                    tls: t,
                    files: f,
                },
            ) => {
                // One wildcard is as good as the other.
                let ip = |address: &SocketAddr| {
                    let ip = address.ip();
                    if ip.is_unspecified() { None } else { Some(ip) }
                };
                ip(address) == ip(a) && address.port() == a.port() && tls == t && files == f
            }
            _ => false,
        }
    }
}

/// A network and keys for page servers.
pub(crate) struct TestNetwork<'a> {
    test_dir: &'a TestDir,
    hosts: TwoHosts,
    keys: Vec<String>,
}

impl TestNetwork<'_> {
    pub(crate) fn new(test_dir: &TestDir) -> Result<TestNetwork<'_>> {
        let pki = test_dir.path("pki");
        fs::create_dir_all(&pki)?;
        let keys = Authority::new(&pki, "ca")?
            .issue(&Host::LOOPBACK)?
            .options();
        Ok(TestNetwork {
            test_dir,
            hosts: TwoHosts::new(None)?,
            keys: keys.into_iter().filter(|word| word != "--tls").collect(),
        })
    }

    /// Starts a page server with `settings` and sees what it does.
    pub(crate) fn page_server(&self, make: Make<'_>, settings: &Settings) -> Result<Outcome> {
        let home = tempfile::tempdir_in(self.test_dir.dir())?;
        let path = |name: &str| home.path().join(name);
        let program = match make {
            Make::Ours | Make::Build(_) => binary("page-server")?,
            Make::Criu(criu) => criu.path.clone(),
        };
        let mut command = self.command(home.path(), &program, "page-server", settings)?;
        let log = path("log");
        let output = fs::File::create(&log)?;
        command.stdout(output.try_clone()?).stderr(output);
        let mut server = Spawned::start("page-server", &mut command, Some(log.clone()))?;
        let outcome = self.outcome(&mut server, &log, &path("images"));
        if let Ok(pid) = fs::read_to_string(path("images/p.pid")) {
            let _ = kill(Pid::from_raw(pid.trim().parse()?), Signal::SIGKILL);
            // The next server's address would be taken for this one's.
            wait::until("its end", GENEROUS, || {
                Ok(self.listener()?.is_none().then_some(()))
            })?;
        }
        outcome
    }

    /// `program ACTION` with `settings`, at home in the directory `home`: its images are in `images` there.
    fn command(
        &self,
        home: &Path,
        program: &Path,
        action: &str,
        settings: &Settings,
    ) -> Result<Command> {
        let path = |name: &str| home.join(name);
        for name in ["images", "mount", ".criu"] {
            fs::create_dir(path(name))?;
        }
        let file_of = |place: Place| match place {
            Place::Global => path("global.conf"),
            Place::Home => path(".criu/default.conf"),
            Place::Environment => path("environment.conf"),
            Place::Named => path("named.conf"),
        };
        for (place, text) in &settings.files {
            fs::write(file_of(*place), text)?;
        }
        let mut command = self.hosts.source.net.command("unshare");
        command.args(["--mount", "--", "sh", "-c", SCRIPT, "sh"]);
        command
            .arg(path("mount"))
            .arg(file_of(Place::Global))
            .arg(program);
        command
            .arg(action)
            .arg("-D")
            .arg(path("images"))
            .args(&self.keys);
        command.args(&settings.words).env("HOME", home);
        if settings.files.contains_key(&Place::Named) {
            command.arg("--config").arg(file_of(Place::Named));
        }
        match settings.files.contains_key(&Place::Environment) {
            true => command.env("CRIU_CONFIG_FILE", file_of(Place::Environment)),
            false => command.env_remove("CRIU_CONFIG_FILE"),
        };
        Ok(command)
    }

    fn outcome(&self, server: &mut Spawned, log: &Path, images: &Path) -> Result<Outcome> {
        let mut ended = None;
        let found = wait::until("a page server", GENEROUS, || {
            // One that gives up now may still be in the list: it takes no connection.
            if let Some(address) = self.listener()?
                && let Some(tls) = self.speaks_tls(address)?
            {
                return Ok(Some(Some((address, tls))));
            }
            if ended.is_none() {
                ended = server.ended()?;
            }
            // In the background it may listen although what was started has ended well.
            Ok(ended
                .as_ref()
                .filter(|ended| !ended.status.success())
                .map(|_| None))
        })?;
        let Some((address, tls)) = found else {
            return Ok(Outcome::Refused(fs::read_to_string(log)?));
        };
        let _ = server.kill();
        wait::until("its end", GENEROUS, || {
            Ok(self.listener()?.is_none().then_some(()))
        })
        .or_else(|error| {
            if images.join("p.pid").exists() {
                Ok(())
            } else {
                Err(error)
            }
        })?;
        Ok(Outcome::Listens {
            address,
            tls,
            files: files_in(images)?,
        })
    }

    /// Who listens in the network, where nobody else does.
    fn listener(&self) -> Result<Option<SocketAddr>> {
        self.hosts.source.net.enter(|| {
            for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
                for line in fs::read_to_string(table)?.lines().skip(1) {
                    let fields: Vec<&str> = line.split_whitespace().collect();
                    if fields.get(3) == Some(&"0A") {
                        return socket_address(fields[1]).map(Some);
                    }
                }
            }
            Ok(None)
        })
    }

    /// Whether TLS is spoken there; `None` if nobody takes the connection.
    fn speaks_tls(&self, address: SocketAddr) -> Result<Option<bool>> {
        self.hosts.source.net.enter(|| {
            let loopback: IpAddr = match address {
                SocketAddr::V4(_) => [127, 0, 0, 1].into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            let ip = if address.ip().is_unspecified() {
                loopback
            } else {
                address.ip()
            };
            let mut stream = match TcpStream::connect((ip, address.port())) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(None),
                connected => connected?,
            };
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(&client_hello()?)?;
            // It may have reset the connection already.
            let _ = stream.shutdown(Shutdown::Write);
            let mut first = [0];
            // A server without TLS says nothing to that, or resets the connection.
            let got = stream.read(&mut first).unwrap_or(0);
            Ok(Some(got == 1 && matches!(first[0], 0x15 | 0x16)))
        })
    }
}

/// The files in `dir`, but for images and hidden ones.
fn files_in(dir: &Path) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.ends_with(".img") && !name.starts_with('.') {
            files.insert(name);
        }
    }
    Ok(files)
}

/// What a client says first under TLS.
fn client_hello() -> Result<Vec<u8>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), "localhost".try_into()?)?;
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes)?;
    Ok(bytes)
}

/// An address as /proc/net/tcp shows it: words of 32 bits in the machine's order.
fn socket_address(text: &str) -> Result<SocketAddr> {
    let (ip, port) = text.split_once(':').context("no port")?;
    let port = u16::from_str_radix(port, 16)?;
    let words = ip.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word)?, 16)?;
        Ok(word.to_ne_bytes())
    });
    let bytes = words.collect::<Result<Vec<[u8; 4]>>>()?.concat();
    ensure!(bytes.len() == 4 || bytes.len() == 16, "{text}");
    let ip: IpAddr = match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(bytes) => bytes.into(),
        Err(_) => <[u8; 4]>::try_from(bytes.as_slice())?.into(),
    };
    Ok(SocketAddr::new(ip, port))
}

fn at(place: Place, text: &str) -> Settings {
    Settings {
        files: BTreeMap::from([(place, text.to_owned())]),
        words: Vec::new(),
    }
}

fn with(mut settings: Settings, place: Place, text: &str) -> Settings {
    settings.files.insert(place, text.to_owned());
    settings
}

fn and(mut settings: Settings, words: &str) -> Settings {
    settings
        .words
        .extend(words.split_whitespace().map(str::to_owned));
    settings
}

/// The rules one by one.
pub(crate) fn by_hand() -> Vec<Settings> {
    use Place::{Environment, Global, Home, Named};
    let named = |text| at(Named, text);
    vec![
        // The order of the files: each says another port.
        at(Global, "port 2001\ntls\naddress 127.0.0.2\n"),
        with(at(Global, "port 2001\ntls\n"), Home, "port 2002\nno-tls\n"),
        with(
            with(at(Global, "port 2001\n"), Home, "port 2002"),
            Environment,
            "port 2003\ntls",
        ),
        with(
            with(at(Global, "tls\n"), Environment, "port 2003"),
            Named,
            "port 2004",
        ),
        and(
            with(at(Global, "port 2001\ntls"), Named, "port 2004"),
            "--port 2005 --no-tls",
        ),
        and(
            at(Global, "port 2001\ntls\n"),
            "--no-default-config --port 2006",
        ),
        and(
            with(at(Home, "tls"), Environment, "port 2003"),
            "--no-default-config",
        ),
        // A file that is not there.
        and(
            at(Home, "port 2002\ntls"),
            "--config /nowhere.conf --port 2007",
        ),
        // Lines.
        named("  # a comment\n\n\t\n   port 2010   # ten\ntls # secure\n"),
        named("port=2011\naddress=127.0.0.2\ntls"),
        named("port\t2012\ntls\t\n"),
        named("port 2013\t# a tab\n"),
        named("port 2014\t#a tab\n"),
        named("tls yes\nport 2015"),
        named("tls#no\nport 2015"),
        named("port = 2016\n"),
        named("port =2016\n"),
        named("port 2017 2018\n"),
        named("port 2017 8\n"),
        named("port 2018 \\\ntls\n"),
        named("port 2019\r\nlog-file a.log\n"),
        named("port 2020x\n"),
        named("port x\n"),
        named("--port 2021\n"),
        named("por 2022\nno-auto-dedup\n"),
        named("bogus\nport 2022\n"),
        named("port 2023\ntcp-established\nghost-limit 1M\nmanage-cgroups=soft\nverbosity 4\n"),
        named("port 2024\nport 2025\ntls\nno-tls\n"),
        named("port \"2026\"\nlog-file \"a b.log\"\n"),
        named("port \"2026\"x\nlog-file \"a\\\"b.log\"\n"),
        named("port 2027\nlog-file \"quite a long name with blanks.log\"\n"),
        named("port 2028\nlog-file \"a#b.log\"\n"),
        named("port 2028\nlog-file a#b.log\n"),
        named("port 2029\nlog-file a\\\"b.log # c\n"),
        named("port \"2030\nlog-file a.log\n"),
        named("port \"\"\n"),
        named("port 2031\nwork-dir images\nimages-dir .\n"),
        named("daemon\npidfile p.pid\nport 2032\nlog-file d.log\n"),
        named("port\ntls\n"),
        named("tls --\nport 2033\n"),
    ]
}

/// A set of files that is the same for the same seed.
pub(crate) fn generated(seed: u64) -> Settings {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut settings = Settings::default();
    for place in Place::ALL {
        if random.u8(..3) == 0 || place == Place::Named {
            let lines = (0..random.usize(1..5)).map(|_| line(&mut random));
            settings.files.insert(place, lines.collect());
        }
    }
    // In the end it always has a port, if that is not refused.
    and(settings, &format!("--port {}", random.u16(3000..4000)))
}

fn line(random: &mut fastrand::Rng) -> String {
    const OPTIONS: &[(&str, &[&str])] = &[
        ("port", &["4001", "4002", "4003x", "0x"]),
        ("address", &["127.0.0.1", "127.0.0.2", "::1"]),
        ("log-file", &["a.log", "b", "a\\\"b.log"]),
        ("tls", &[""]),
        ("no-tls", &[""]),
        ("auto-dedup", &[""]),
        ("tcp-established", &[""]),
        ("verbosity", &["4"]),
        ("ghost-limit", &["1M"]),
        ("external", &["mnt[]"]),
    ];
    let choose =
        |random: &mut fastrand::Rng, from: &[&'static str]| from[random.usize(..from.len())];
    let (name, values) = OPTIONS[random.usize(..OPTIONS.len())];
    let value = choose(random, values);
    let before = choose(random, &["", "", "", " ", "\t", "# "]);
    let between = choose(random, &[" ", " ", "  ", "\t", " \t", "="]);
    let behind = choose(
        random,
        &["", "", "", " ", " # c", "#c", " #", "\t", " x", " xy"],
    );
    let end = choose(random, &["\n", "\n", "\n", "\n\n", "\r\n"]);
    let quote = if random.u8(..4) == 0 { "\"" } else { "" };
    match value {
        "" => format!("{before}{name}{behind}{end}"),
        _ => format!("{before}{name}{between}{quote}{value}{quote}{behind}{end}"),
    }
}
