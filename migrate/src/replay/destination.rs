//! The service that the log is replayed to: its connections, and what it answers.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{REPLAY_AHEAD_BYTES_MAX, REPLAY_PIECE_BYTES_MAX};
use pageferry::replay::{Difference, Entry, Player, Step, WaitReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time::timeout;

/// A service and the state of its replay, used by one thread.
#[derive(Debug)]
pub(crate) struct Destination {
    address: String,
    stall: Duration,
    shared: Rc<Shared>,
    sending: RefCell<BTreeMap<u32, Sending>>,
}

type Sending = Rc<tokio::sync::Mutex<OwnedWriteHalf>>;

#[derive(Debug)]
struct Shared {
    player: RefCell<Player>,
    difference: RefCell<Option<Difference>>,
    /// Answers have come, or a connection has ended.
    changed: Notify,
    /// Entries were taken: who reads too far ahead may read again.
    taken: Notify,
}

impl Destination {
    pub(crate) fn new(address: &str, player: Player, stall: Duration) -> Destination {
        Destination {
            address: address.to_owned(),
            stall,
            shared: Rc::new(Shared {
                player: RefCell::new(player),
                difference: RefCell::new(None),
                changed: Notify::new(),
                taken: Notify::new(),
            }),
            sending: RefCell::default(),
        }
    }

    pub(super) fn entries(&self) -> u64 {
        self.shared.player.borrow().entries()
    }

    /// Fails if an answer differs from the recorded one.
    pub(crate) fn expect_no_difference(&self) -> Result<()> {
        let difference = self.shared.difference.borrow_mut().take();
        difference.map_or(Ok(()), |difference| Err(self.differs(difference)))
    }

    fn differs(&self, difference: Difference) -> Error {
        let text = format!(
            "{} does not answer as the recorded service did",
            self.address
        );
        Error::wrap(Kind::Protocol, text, difference)
    }

    /// What the next entry asks for.
    pub(super) fn take(&self, entry: &Entry) -> Result<Step> {
        self.expect_no_difference()?;
        let step = self.shared.player.borrow_mut().take(entry);
        self.shared.taken.notify_waiters();
        step.map_err(|difference| self.differs(difference))
    }

    pub(super) async fn connect(&self, connection: u32) -> Result<()> {
        let connected = timeout(self.stall, TcpStream::connect(&self.address)).await;
        let stream = connected.unwrap_or_else(|elapsed| Err(elapsed.into()));
        let stream = stream.map_err(|error| {
            Error::wrap(
                Kind::PeerLost,
                format!("cannot connect to {}", self.address),
                error,
            )
        })?;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("connection {connection}: {error}");
        }
        let (answers, sending) = stream.into_split();
        let sending = Rc::new(tokio::sync::Mutex::new(sending));
        self.sending.borrow_mut().insert(connection, sending);
        let shared = Rc::clone(&self.shared);
        tokio::task::spawn_local(async move { shared.read(connection, answers).await });
        Ok(())
    }

    fn sending(&self, connection: u32) -> Option<Sending> {
        self.sending.borrow().get(&connection).cloned()
    }

    pub(super) async fn send(&self, connection: u32, bytes: &[u8]) -> Result<()> {
        let Some(sending) = self.sending(connection) else {
            return Ok(());
        };
        let mut sending = sending.lock().await;
        match timeout(self.stall, sending.write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            // Whether that is right is judged when the recording ends the connection.
            Ok(Err(_)) => {
                self.shared.player.borrow_mut().lost(connection);
                Ok(())
            }
            Err(_) => {
                let text = format!("{} reads nothing of connection {connection}", self.address);
                Err(self.stalled(&text))
            }
        }
    }

    fn stalled(&self, what: &str) -> Error {
        let seconds = self.stall.as_secs_f64();
        let entry = self.entries().saturating_sub(1);
        let text = format!("entry {entry}: {what} (waited {seconds} s: --stall)");
        Error::new(Kind::PeerLost, text)
    }

    pub(super) async fn finish(&self, connection: u32) {
        let sending = self.sending.borrow_mut().remove(&connection);
        if let Some(sending) = sending {
            // The service may have ended it.
            let _ = sending.lock().await.shutdown().await;
        }
    }

    /// Waits for the answers that had come at this place of the recording.
    pub(super) async fn wait(&self) -> Result<()> {
        loop {
            self.expect_no_difference()?;
            let wait_reason = self.shared.player.borrow().wait_reason();
            let Some(wait_reason) = wait_reason else {
                return Ok(());
            };
            if timeout(self.stall, self.shared.changed.notified())
                .await
                .is_err()
            {
                return Err(self.stalled(&describe(wait_reason)));
            }
        }
    }

    /// Ends all connections, and judges when the service has ended them too.
    pub(crate) async fn end_all(&self) -> Result<()> {
        let connections: Vec<u32> = self.sending.borrow().keys().copied().collect();
        for connection in connections {
            self.finish(connection).await;
        }
        loop {
            self.expect_no_difference()?;
            let open = self.shared.player.borrow().open_connections();
            let Some(&connection) = open.first() else {
                break;
            };
            let changed = timeout(self.stall, self.shared.changed.notified()).await;
            if changed.is_err() {
                return Err(self.stalled(&describe(WaitReason::End { connection })));
            }
        }
        let judged = self.shared.player.borrow_mut().close();
        judged.map_err(|difference| self.differs(difference))
    }
}

impl Shared {
    async fn read(&self, connection: u32, mut answers: OwnedReadHalf) {
        let mut buffer = vec![0; REPLAY_PIECE_BYTES_MAX];
        loop {
            while self.is_far_ahead(connection) {
                self.taken.notified().await;
            }
            let read = answers.read(&mut buffer).await.unwrap_or(0);
            let judged = match read {
                0 => self.player.borrow_mut().ended(connection),
                read => self
                    .player
                    .borrow_mut()
                    .received(connection, &buffer[..read]),
            };
            let is_over = read == 0 || judged.is_err();
            if let Err(difference) = judged {
                self.difference.borrow_mut().get_or_insert(difference);
            }
            self.changed.notify_one();
            if is_over {
                return;
            }
        }
    }

    fn is_far_ahead(&self, connection: u32) -> bool {
        self.player.borrow().ahead(connection) >= REPLAY_AHEAD_BYTES_MAX
    }
}

fn describe(wait_reason: WaitReason) -> String {
    match wait_reason {
        WaitReason::Answers {
            connection,
            has,
            wants,
        } => format!(
            "connection {connection} has {has} bytes of answers, and had {wants} in the recording"
        ),
        WaitReason::End { connection } => {
            format!("the service does not end connection {connection} as in the recording")
        }
    }
}
