//! A real systemd-logind on a bus of its own, for shutdowns that shut nothing down.
//!
//! ```text
//!   dbus-daemon, BED/logind/bus ──── systemd-logind, in a chroot of its own: /run, /etc, /dev are its own
//!        ├────────────────────────── a stand-in for PID 1: it is told to start poweroff.target, and notes it
//!        └────────────────────────── what is tested, by DBUS_SYSTEM_BUS_ADDRESS
//! ```
//!
//! The stand-in is the only part that is simulated. logind asks it whether poweroff.target is loaded and to start it;
//! that is all that a shutdown is to logind. Invariant: no socket of the host's system bus is ever opened.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context, Result, ensure};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::StreamExt;
use zbus::connection::Builder;
use zbus::message::{Message, Type};
use zbus::{Connection, MessageStream, ObjectPath, Variant};

use crate::criu::Suite;
use crate::debian::{program, unpacked};
use crate::process::Spawned;
use crate::wait::{self, GENEROUS};

const LOGIND: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";

const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const SYSTEMD_MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// The job of the only unit that is started.
const JOB: &str = "/org/freedesktop/systemd1/job/1";

/// Anybody may do anything: nobody else knows of this bus.
const BUS: &str = r#"<busconfig>
<type>system</type>
<listen>unix:path=SOCKET</listen>
<auth>EXTERNAL</auth>
<policy context="default">
<allow user="*"/> <allow own="*"/> <allow send_type="method_call"/> <allow send_type="signal"/>
<allow send_requested_reply="true" send_type="method_return"/> <allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/> <allow receive_type="method_return"/> <allow receive_type="error"/>
<allow receive_type="signal"/> <allow send_destination="*"/> <allow receive_sender="*"/>
</policy>
</busconfig>
"#;

/// Becomes logind. Words: the directory of the test's, `usr` to have, the longest delay in seconds. It begins in a mount
/// namespace of its own.
const START: &str = r#"set -eu
work=$1 usr=$2 root=$1/root
mount --make-rprivate /
mkdir -p "$root"
mount -t tmpfs none "$root"
for dir in usr proc sys dev etc/systemd run/systemd/system var/lib tmp; do mkdir -p "$root/$dir"; done
mkdir -p "$root$work"
for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done
echo "root:x:0:0:root:/root:/bin/sh" > "$root/etc/passwd"
echo "root:x:0:" > "$root/etc/group"
printf '[Login]\nInhibitDelayMaxSec=%s\nNAutoVTs=0\nReserveVT=0\n' "$3" > "$root/etc/systemd/logind.conf"
mount --bind "$usr" "$root/usr"
mount --bind "$work" "$root$work"
for dir in proc sys; do mount --rbind "/$dir" "$root/$dir"; done
for device in null zero urandom random; do : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
exec env -i PATH=/usr/bin:/usr/sbin SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console \
    DBUS_SYSTEM_BUS_ADDRESS="unix:path=$work/bus" chroot "$root" /usr/lib/systemd/systemd-logind
"#;

/// What logind needs.
#[derive(Clone, Debug)]
pub struct Programs {
    bus: PathBuf,
    usr: PathBuf,
}

impl Programs {
    /// Fetched, unless they are here.
    ///
    /// # Errors
    /// No Debian archive, no network, or no such package.
    pub fn fetched() -> Result<Programs> {
        Ok(Programs {
            bus: program(Suite::Trixie, "dbus-daemon", "bin/dbus-daemon")?,
            usr: unpacked(Suite::Trixie, "systemd")?.join("usr"),
        })
    }
}

/// A bus. It ends with this.
#[derive(Debug)]
pub struct Bus {
    daemon: Spawned,
    work: PathBuf,
}

impl Bus {
    /// Starts one in the directory `dir`.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn start(programs: &Programs, dir: &Path) -> Result<Bus> {
        let work = dir.join("logind");
        fs::create_dir_all(&work)?;
        let socket = work.join("bus");
        if socket.exists() {
            // Of a bus before this one.
            fs::remove_file(&socket)?;
        }
        let settings = work.join("bus.conf");
        fs::write(
            &settings,
            BUS.replace("SOCKET", &socket.display().to_string()),
        )?;
        let log = work.join("bus.log");
        let mut command = Command::new(&programs.bus);
        command
            .args(["--nofork", "--nopidfile", "--nosyslog", "--config-file"])
            .arg(&settings)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&log)?)
            .stderr(fs::File::options().append(true).open(&log)?);
        let mut daemon = Spawned::start("dbus-daemon", &mut command, Some(log))?;
        wait::until("the bus", GENEROUS, || {
            ensure!(daemon.ended()?.is_none(), "{}", daemon.log_tail());
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Bus { daemon, work })
    }

    /// What `DBUS_SYSTEM_BUS_ADDRESS` is to be.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.work.join("bus").display())
    }

    /// What the bus has said.
    pub fn log(&self) -> String {
        self.daemon.log_tail()
    }
}

/// A logind on a bus. Both end with this.
#[derive(Debug)]
pub struct Logind {
    logind: Spawned,
    bus: Bus,
    runtime: Runtime,
    connection: Connection,
    first: StandIn,
}

/// What plays PID 1, in a thread that ends with this.
#[derive(Debug)]
struct StandIn {
    started: Receiver<String>,
    /// A word for each job that is to be cancelled.
    cancel: UnboundedSender<()>,
}

impl Logind {
    /// Starts one in the directory `dir`, which lets a shutdown wait for `delay_s` seconds at most.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn start(programs: &Programs, dir: &Path, delay_s: u32) -> Result<Logind> {
        let bus = Bus::start(programs, dir)?;
        let runtime = runtime()?;
        let connection = runtime.block_on(connect(&bus.address()))?;
        let first = StandIn::start(&bus.address())?;
        let log = bus.work.join("logind.log");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", START, "sh"])
            .args([&bus.work, &programs.usr])
            .arg(delay_s.to_string())
            .stdin(Stdio::null())
            .stdout(fs::File::create(&log)?)
            .stderr(fs::File::options().append(true).open(&log)?);
        let logind = Spawned::start("systemd-logind", &mut command, Some(log))?;
        let mut logind = Logind {
            logind,
            bus,
            runtime,
            connection,
            first,
        };
        wait::until("logind to answer", GENEROUS, || {
            let ended = logind.logind.ended()?;
            ensure!(ended.is_none(), "logind has ended: {ended:?}");
            Ok(logind.inhibitors().ok().map(drop))
        })
        .with_context(|| logind.logind.log_tail())?;
        Ok(logind)
    }

    /// What `DBUS_SYSTEM_BUS_ADDRESS` is to be.
    pub fn address(&self) -> String {
        self.bus.address()
    }

    /// Who holds back what: `shutdown by pageferry (delay)`.
    ///
    /// # Errors
    /// logind does not answer.
    pub fn inhibitors(&self) -> Result<Vec<String>> {
        let answer = self.call("ListInhibitors", &())?;
        let found: Vec<(String, String, String, String, u32, u32)> = answer.body().deserialize()?;
        let line = |(what, who, _, mode, _, _): &_| format!("{what} by {who} ({mode})");
        Ok(found.iter().map(line).collect())
    }

    /// Asks for the host to be powered off; returns when logind has begun.
    ///
    /// # Errors
    /// logind refuses it; the error shows its log.
    pub fn power_off(&self) -> Result<()> {
        let asked = self.call("PowerOff", &(false,)).map(drop);
        asked.with_context(|| self.logind.log_tail())
    }

    /// Waits until PID 1 is told to bring the host down.
    ///
    /// # Errors
    /// It is not.
    pub fn expect_down(&self) -> Result<()> {
        let unit = self.first.started.recv_timeout(GENEROUS);
        let unit = unit.with_context(|| self.logind.log_tail())?;
        ensure!(unit == "poweroff.target", "{unit}");
        Ok(())
    }

    /// Whether PID 1 has been told so.
    pub fn is_down(&self) -> bool {
        self.first.started.try_recv().is_ok()
    }

    /// The host stays up: the job of PID 1 was cancelled.
    ///
    /// # Errors
    /// The stand-in has ended.
    pub fn cancel(&self) -> Result<()> {
        Ok(self.first.cancel.send(())?)
    }

    fn call<B>(&self, name: &str, body: &B) -> Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let connection = &self.connection;
        let answer = connection.call_method(Some(LOGIND), PATH, Some(MANAGER), name, body);
        Ok(self.runtime.block_on(answer)?)
    }
}

async fn connect(address: &str) -> Result<Connection> {
    let connected = Builder::address(address).method_timeout(GENEROUS);
    Ok(connected.build().await?)
}

fn runtime() -> Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread();
    Ok({ runtime }.enable_all().build()?)
}

impl StandIn {
    fn start(address: &str) -> Result<StandIn> {
        let ((noted, started), (cancel, cancelled)) = (channel(), unbounded_channel());
        let (ready, is_ready) = channel();
        let address = address.to_owned();
        thread::spawn(move || {
            let played = runtime().and_then(|runtime| {
                runtime.block_on(async {
                    let connection = connect(&address).await?;
                    let calls = MessageStream::from(&connection);
                    connection.request_name(SYSTEMD).await?;
                    ready.send(())?;
                    play(&connection, calls, &noted, cancelled).await
                })
            });
            if let Err(error) = played {
                eprintln!("the stand-in for PID 1: {error:#}");
            }
        });
        is_ready.recv().context("the stand-in for PID 1")?;
        Ok(StandIn { started, cancel })
    }
}

/// Answers as PID 1 would, and notes which units are to be started.
async fn play(
    connection: &Connection,
    mut calls: MessageStream,
    started: &Sender<String>,
    mut cancelled: UnboundedReceiver<()>,
) -> Result<()> {
    loop {
        tokio::select! {
            call = calls.next() => {
                // The bus has ended.
                let Some(Ok(call)) = call else { return Ok(()) };
                if call.message_type() == Type::MethodCall {
                    answer(connection, &call, started).await?;
                }
            }
            word = cancelled.recv() => {
                if word.is_none() {
                    return Ok(());
                }
                let job = (1_u32, ObjectPath::try_from(JOB)?, "poweroff.target", "canceled");
                let (path, manager) = (SYSTEMD_PATH, SYSTEMD_MANAGER);
                let told = connection.emit_signal(None::<&str>, path, manager, "JobRemoved", &job);
                told.await?;
            }
        }
    }
}

async fn answer(connection: &Connection, call: &Message, started: &Sender<String>) -> Result<()> {
    let header = call.header();
    let name = header.member().context("a call without a name")?;
    match name.as_str() {
        "Subscribe" => connection.reply(&header, &()).await?,
        "GetUnit" | "LoadUnit" => {
            let unit = ObjectPath::try_from("/org/freedesktop/systemd1/unit/poweroff_2etarget")?;
            connection.reply(&header, &unit).await?;
        }
        "Get" => connection.reply(&header, &Variant::from("loaded")).await?,
        "StartUnit" => {
            let (unit, _mode): (String, String) = call.body().deserialize()?;
            started.send(unit)?;
            connection
                .reply(&header, &ObjectPath::try_from(JOB)?)
                .await?;
        }
        other => {
            let unknown = "org.freedesktop.DBus.Error.UnknownMethod";
            connection
                .reply_error(&header, unknown, &format!("no {other} here"))
                .await?;
        }
    }
    Ok(())
}
