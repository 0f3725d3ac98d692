//! One last difference, by pageferry inside a freeze or by rsync.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use serde::Serialize;
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::net::TwoHosts;
use testbed::process::{Spawned, run as carry_out};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

use super::{Case, Contender};

/// Of the link between the hosts.
const BITS_PER_S: u64 = 1_000_000_000;

/// Bytes of each file, but for the last one.
const FILE_BYTES: u64 = 1 << 20;

/// Where changes begin: databases and file systems write pages.
const STEP_BYTES: u64 = 4096;

/// The longest run.
const LIMIT: Duration = Duration::from_secs(900);

/// Where sshd listens.
const SSH_PORT: u16 = 2222;

/// What the last difference took.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Run {
    /// From the look for it until it is on the destination's disk (rsync: until rsync has ended).
    pub(super) last_ms: f64,
    /// That were sent for it.
    pub(super) bytes: u64,
    /// Of that time, what the freeze waited for it when all else was done.
    pub(super) waited_ms: Option<f64>,
    /// The whole freeze, with images, pages and restore of a small process.
    pub(super) downtime_ms: Option<f64>,
}

/// Brings a directory to the other host, changes it, and brings the difference as `who` does.
pub(super) fn run(criu: &Criu, case: &Case, who: Contender) -> Result<Run> {
    let test_dir = TestDir::new()?;
    let hosts = TwoHosts::new(Some(BITS_PER_S))?;
    let files = Files::make(&test_dir, case)?;
    let there = test_dir.path("there");
    let ran = match who {
        Contender::Pageferry => by_pageferry(&test_dir, criu, &hosts, (&files, &there)),
        Contender::Rsync => by_rsync(&test_dir, &hosts, (&files, &there)),
    };
    if ran.is_err() {
        test_dir.show_logs();
    }
    let run = ran.with_context(|| format!("{who:?}"))?;
    let compared = carry_out(Command::new("diff").arg("-r").arg(&files.dir).arg(&there));
    compared.context("what arrived differs")?;
    Ok(run)
}

/// A directory, and a script that changes it.
struct Files {
    dir: PathBuf,
    change: PathBuf,
}

impl Files {
    fn make(test_dir: &TestDir, case: &Case) -> Result<Files> {
        let (dir, pieces) = (test_dir.path("files"), test_dir.path("pieces"));
        let mut random = Rng::with_seed(case.seed);
        let bytes = u64::from(case.mib) << 20;
        let count = bytes / FILE_BYTES;
        let path = |number: u64| dir.join(format!("{:03}/{number:06}", number % 100));
        for number in 0..count {
            let path = path(number);
            fs::create_dir_all(path.parent().context("a directory")?)?;
            write(&path, FILE_BYTES, &mut random)?;
        }
        let piece = u64::from(case.piece_kib) << 10;
        let changed = (bytes / 100 * u64::from(case.percent)).div_ceil(piece);
        write(&pieces, changed * piece, &mut random)?;
        let mut script = "set -e\n".to_owned();
        for number in 0..changed {
            // Distinct files, as long as there are so many.
            let file = path(number * count / changed);
            let at = random.u64(..=(FILE_BYTES - piece) / STEP_BYTES);
            writeln!(
                script,
                "dd if={} of={} bs={STEP_BYTES} skip={} seek={at} count={} conv=notrunc status=none",
                pieces.display(),
                file.display(),
                number * piece / STEP_BYTES,
                piece / STEP_BYTES
            )?;
        }
        let change = test_dir.path("change.sh");
        fs::write(&change, script)?;
        Ok(Files { dir, change })
    }

    fn command(&self) -> String {
        format!("sh {}", self.change.display())
    }
}

/// Writes a file of which half can be made smaller.
fn write(path: &Path, bytes: u64, random: &mut Rng) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut page = vec![0; usize::try_from(STEP_BYTES)?];
    for _ in 0..bytes / STEP_BYTES {
        let half = page.len() / 2;
        let (noise, words) = page.split_at_mut(half);
        random.fill(noise);
        let word = random.u64(..).to_le_bytes();
        words
            .chunks_mut(word.len())
            .for_each(|chunk| chunk.copy_from_slice(&word));
        file.write_all(&page)?;
    }
    Ok(file.flush()?)
}

fn by_pageferry(
    test_dir: &TestDir,
    criu: &Criu,
    hosts: &TwoHosts,
    (files, there): (&Files, &Path),
) -> Result<Run> {
    let area = AreaSpec::new(Mapping::Private, 64, Content::Mixed);
    let spec = LoadSpec::new(test_dir.path("load"), vec![area]);
    let mut load = Load::start(spec, Some(&hosts.source.net))?;
    let dir = test_dir.path("agent");
    let insecure = ["--insecure".to_owned()];
    let agent = Agent::start(&criu.path, &dir, Some(&hosts.destination), &insecure)?;
    let volume = format!("{}:{}", files.dir.display(), there.display());
    let moves = |id| {
        Move::new(criu, test_dir.path("source"), id)
            .in_net(&hosts.source.net)
            .with(&["--volume", &volume])
    };
    let ahead = moves("ahead").with(&["--preload"]);
    ahead.start(&load, &agent)?.succeed(LIMIT)?;
    let change = files.command();
    let last = moves("last").with(&[
        "--mode",
        "cold",
        "--pre-freeze",
        &change,
        "--hook-limit",
        "5m",
    ]);
    last.start(&load, &agent)?.succeed(LIMIT)?;
    load.wait_until_gone()?;
    let report = last.report()?;
    let freeze = &report["files"]["freeze"];
    let number = |value: &Value| value.as_f64().context("a field of the report");
    load.steer(agent.init()?)?;
    Ok(Run {
        last_ms: number(&freeze["ms"])?,
        bytes: freeze["bytes"].as_u64().context("bytes")?,
        waited_ms: Some(number(&report["phases_ms"]["files"])?),
        downtime_ms: Some(number(&report["downtime_ms"])?),
    })
}

fn by_rsync(test_dir: &TestDir, hosts: &TwoHosts, (files, there): (&Files, &Path)) -> Result<Run> {
    let ssh = Ssh::start(test_dir, hosts)?;
    ssh.rsync(hosts, &files.dir, there)?;
    carry_out(Command::new("sh").arg(&files.change))?;
    let began = Instant::now();
    let printed = ssh.rsync(hosts, &files.dir, there)?;
    let last_ms = began.elapsed().as_secs_f64() * 1e3;
    let bytes = printed.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("Total bytes sent: ")?;
        rest.replace(',', "").parse().ok()
    });
    Ok(Run {
        last_ms,
        bytes: bytes.with_context(|| printed.clone())?,
        ..Run::default()
    })
}

/// An sshd at the destination, and what lets the source in.
struct Ssh {
    _server: Spawned,
    shell: String,
}

impl Ssh {
    fn start(test_dir: &TestDir, hosts: &TwoHosts) -> Result<Ssh> {
        let dir = test_dir.path("ssh");
        fs::create_dir_all(&dir)?;
        // sshd goes there before it knows who calls.
        fs::create_dir_all("/run/sshd")?;
        for name in ["host", "user"] {
            let mut make = Command::new("ssh-keygen");
            make.args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.join(name));
            carry_out(&mut make)?;
        }
        fs::copy(dir.join("user.pub"), dir.join("allowed"))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        let at = &hosts.destination;
        let shown = dir.display();
        let settings = format!(
            "ListenAddress {}\nPort {SSH_PORT}\nHostKey {shown}/host\nAuthorizedKeysFile {shown}/allowed\n\
             StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n",
            at.address
        );
        fs::write(dir.join("sshd.conf"), settings)?;
        let mut server = at.net.command("/usr/sbin/sshd");
        let log = dir.join("sshd.log");
        server.args(["-D", "-e", "-f"]).arg(dir.join("sshd.conf"));
        server.stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut server = Spawned::start("sshd", &mut server, Some(log.clone()))?;
        wait::until("sshd to listen", GENEROUS, || {
            ensure!(server.ended()?.is_none(), "sshd: {}", server.log_tail());
            let printed = fs::read_to_string(&log)?;
            Ok(printed.contains("Server listening").then_some(()))
        })?;
        let shell = format!(
            "ssh -q -p {SSH_PORT} -i {shown}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        );
        Ok(Ssh {
            _server: server,
            shell,
        })
    }

    /// Brings a directory to the destination; what rsync says.
    fn rsync(&self, hosts: &TwoHosts, from: &Path, to: &Path) -> Result<String> {
        let mut rsync = hosts.source.net.command("rsync");
        rsync.args(["-az", "--delete", "--stats", "-e", &self.shell]);
        rsync.arg(format!("{}/", from.display()));
        rsync.arg(format!(
            "root@{}:{}/",
            hosts.destination.address,
            to.display()
        ));
        let output = carry_out(&mut rsync)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
