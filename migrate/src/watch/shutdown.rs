//! A shutdown of the host waits until the actions for it are over: a delay inhibitor of systemd-logind.
//!
//! ```text
//! a rule with `when.shutdown` ──> Inhibit("shutdown", "delay") ──> a descriptor: logind waits while it is open
//! PrepareForShutdown(true)  ──> Event::Shutdown(number) ──> actions ──> release(number): the descriptor is closed
//! PrepareForShutdown(false) ──> Event::Shutdown(None): the shutdown was given up; a new descriptor
//! ```
//!
//! logind waits for `InhibitDelayMaxSec=` of logind.conf at most, which is 5 s unless set.

use std::os::fd::OwnedFd;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use zbus::connection::Builder;
use zbus::message::{Message, Type};
use zbus::{Connection, MatchRule, MessageStream, OwnedVariant};

use super::Event;
use super::action::STARTING;

const LOGIND: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// How long logind may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Before a lost connection to the bus is made again.
const AGAIN: Duration = Duration::from_secs(5);

/// Tells of shutdowns and holds them back, until it is dropped.
#[derive(Debug)]
pub(super) struct Shutdown {
    connection: Connection,
    first: Option<u64>,
    release: mpsc::UnboundedSender<u64>,
    task: JoinHandle<()>,
}

impl Shutdown {
    /// Asks logind to tell, and to wait if it `holds`.
    pub(super) async fn open(holds: bool, events: mpsc::Sender<Event>) -> Result<Shutdown> {
        let link = Link::open(holds).await?;
        let (release, released) = mpsc::unbounded_channel();
        Ok(Shutdown {
            connection: link.connection.clone(),
            first: link.under_way(),
            release,
            task: tokio::spawn(follow(link, released, events)),
        })
    }

    /// The shutdown that was under way when this was opened.
    pub(super) fn first(&self) -> Option<u64> {
        self.first
    }

    /// Fails if logind lets a shutdown wait for less than `delay`.
    pub(super) async fn allows(&self, delay: Option<Duration>) -> Result<()> {
        let answer = property(&self.connection, "InhibitDelayMaxUSec").await?;
        let failed = |error: zbus::Error| Error::wrap(Kind::Protocol, "InhibitDelayMaxUSec", error);
        let longest = Duration::from_micros(u64::try_from(answer).map_err(failed)?);
        match delay {
            Some(delay) if delay > longest => {
                let text = format!(
                    "logind lets a shutdown wait for {} s at most, and `delay` is {} s: set InhibitDelayMaxSec={} in \
                     /etc/systemd/logind.conf",
                    longest.as_secs_f64(),
                    delay.as_secs_f64(),
                    delay.as_secs_f64().ceil(),
                );
                Err(Error::new(Kind::Unsupported, text))
            }
            Some(_) => Ok(()),
            None => {
                let longest = longest.as_secs_f64();
                tracing::info!(
                    "a shutdown waits for its actions for {longest} s at most (InhibitDelayMaxSec of logind)"
                );
                Ok(())
            }
        }
    }

    /// Nothing is left to do before this shutdown. Another one that has begun meanwhile waits.
    pub(super) fn release(&self, shutdown: u64) {
        // Without a receiver nothing is held.
        let _ = self.release.send(shutdown);
    }
}

impl Drop for Shutdown {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows what logind tells, and connects again when the bus is lost, until nobody listens.
async fn follow(
    mut link: Link,
    mut released: mpsc::UnboundedReceiver<u64>,
    events: mpsc::Sender<Event>,
) {
    while let Err(error) = link.follow(&mut released, &events).await {
        tracing::error!("shutdowns are not watched: {error}; trying again");
        let (holds, count) = (link.holds, link.count);
        // logind waits for a descriptor also when nobody is connected any more.
        let kept = link.lock.take();
        drop(link);
        link = loop {
            sleep(AGAIN).await;
            if let Ok(link) = Link::open(holds).await {
                break link;
            }
        };
        link.count += count;
        if link.lock.is_none() {
            link.lock = kept;
        }
        tracing::info!("shutdowns are watched again");
        if events
            .send(Event::Shutdown(link.under_way()))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// A connection to the bus.
#[derive(Debug)]
struct Link {
    connection: Connection,
    signals: MessageStream,
    /// Shutdowns are held back, and not only told.
    holds: bool,
    is_going_down: bool,
    /// How many shutdowns have begun.
    count: u64,
    /// logind waits while it is open.
    lock: Option<OwnedFd>,
}

impl Link {
    async fn open(holds: bool) -> Result<Link> {
        let failed = |error: zbus::Error| {
            let text = "`when.shutdown` needs systemd-logind on the system bus of D-Bus, which cannot be reached";
            Error::wrap(Kind::Unsupported, text, error)
        };
        let connected = Builder::system().method_timeout(ANSWER_LIMIT).build();
        let connection = match timeout(ANSWER_LIMIT, connected).await {
            Ok(connection) => connection.map_err(failed)?,
            Err(_) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    "the system bus of D-Bus is silent",
                ));
            }
        };
        let signal = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender(LOGIND)
            .path(PATH)
            .interface(MANAGER)
            .member("PrepareForShutdown")
            .build()
            .map_err(failed)?;
        let signals = MessageStream::for_match_rule(signal, &connection, None);
        let mut link = Link {
            signals: signals.await.map_err(failed)?,
            is_going_down: is_going_down(&connection).await?,
            connection,
            holds,
            count: 0,
            lock: None,
        };
        link.hold().await?;
        link.count += u64::from(link.is_going_down);
        if holds && link.is_going_down {
            tracing::warn!("the host is going down already, and does not wait");
        }
        Ok(link)
    }

    /// The number of the shutdown that has begun.
    fn under_way(&self) -> Option<u64> {
        self.is_going_down.then_some(self.count)
    }

    /// Has logind wait for the next shutdown. It does not wait if it has begun.
    async fn hold(&mut self) -> Result<()> {
        if !self.holds || self.is_going_down {
            return Ok(());
        }
        let why = "pageferry watch acts before the host goes down";
        let asked = ("shutdown", "pageferry", why, "delay");
        let refused = match inhibit(&self.connection, &asked).await {
            Ok(lock) => {
                self.lock = Some(lock);
                return Ok(());
            }
            Err(error) => error,
        };
        // A shutdown may have begun meanwhile.
        self.is_going_down = is_going_down(&self.connection).await?;
        match self.is_going_down {
            true => Ok(()),
            false => Err(refused),
        }
    }

    /// Passes on what logind tells. Ends without an error when nobody listens.
    async fn follow(
        &mut self,
        released: &mut mpsc::UnboundedReceiver<u64>,
        events: &mpsc::Sender<Event>,
    ) -> Result<()> {
        loop {
            tokio::select! {
                signal = self.signals.next() => {
                    self.is_going_down = announces_shutdown(signal)?;
                    if self.is_going_down {
                        self.count += 1;
                        tracing::info!("the host is about to go down");
                    } else {
                        tracing::info!("the host does not go down");
                        if self.lock.is_none() {
                            self.hold().await?;
                        }
                    }
                    if events.send(Event::Shutdown(self.under_way())).await.is_err() {
                        return Ok(());
                    }
                }
                shutdown = released.recv() => {
                    let Some(shutdown) = shutdown else {
                        return Ok(());
                    };
                    // One that was given up meanwhile is not the next one.
                    if self.under_way() == Some(shutdown) && self.lock.take().is_some() {
                        tracing::info!("the host may go down");
                    }
                }
            }
        }
    }
}

/// Whether a signal says that the host is about to go down.
fn announces_shutdown(signal: Option<zbus::Result<Message>>) -> Result<bool> {
    let lost = |error: zbus::Error| Error::wrap(Kind::Io, "the system bus of D-Bus", error);
    match signal {
        Some(message) => message
            .and_then(|message| message.body().deserialize())
            .map_err(lost),
        None => Err(Error::new(
            Kind::Io,
            "the system bus of D-Bus has ended the connection",
        )),
    }
}

async fn is_going_down(connection: &Connection) -> Result<bool> {
    let failed = |error: zbus::Error| Error::wrap(Kind::Protocol, "PreparingForShutdown", error);
    let answer = property(connection, "PreparingForShutdown").await?;
    bool::try_from(answer).map_err(failed)
}

/// A property of logind's manager.
async fn property(connection: &Connection, name: &str) -> Result<OwnedVariant> {
    let failed = |error: zbus::Error| {
        let text = format!("systemd-logind does not tell {name}; `when.shutdown` needs it");
        Error::wrap(Kind::Unsupported, text, error)
    };
    let asked = (MANAGER, name);
    let answer = connection.call_method(Some(LOGIND), PATH, Some(PROPERTIES), "Get", &asked);
    let answer = answer.await.map_err(failed)?;
    answer.body().deserialize().map_err(failed)
}

/// Takes an inhibitor: what, who, why, mode.
async fn inhibit(connection: &Connection, asked: &(&str, &str, &str, &str)) -> Result<OwnedFd> {
    let failed = |error: zbus::Error| {
        let text = "logind takes no inhibitor of shutdowns (it needs root, or polkit's \
                    org.freedesktop.login1.inhibit-delay-shutdown)";
        Error::wrap(Kind::Unsupported, text, error)
    };
    let _starting = STARTING.lock().await;
    let answer = connection.call_method(Some(LOGIND), PATH, Some(MANAGER), "Inhibit", asked);
    let answer = answer.await.map_err(failed)?;
    // The descriptor in the answer is closed with it; this one is closed in child processes.
    let lock: zbus::OwnedFd = answer.body().deserialize().map_err(failed)?;
    Ok(lock.into())
}
