//! Threads that talk to a service, each over a connection of its own that must last.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::net::NetNs;
use crate::wait::{self, GENEROUS};

/// How long a client waits for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Answers that each client must get from now on: the one under way may have been asked before.
const ENOUGH: u64 = 3;

/// What one client asks, and how it judges the answers.
pub trait ServiceClient: Send {
    /// Asks and checks the answer; false if there is nothing more to ask.
    ///
    /// # Errors
    /// The connection has ended, or the answer is wrong.
    fn ask(&mut self) -> Result<bool>;

    /// Looks at the whole, at the end.
    ///
    /// # Errors
    /// Something is lost or wrong.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Clients that ask on and on. Their threads end on drop.
#[derive(Debug)]
pub struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    answers: Arc<AtomicU64>,
    /// Its longest time without an answer since it was last asked for, µs.
    longest: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Clients {
    /// Starts them, and waits until each has an answer.
    ///
    /// # Errors
    /// One of them gets none, or a wrong one.
    pub fn start(talks: Vec<Box<dyn ServiceClient>>) -> Result<Clients> {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = talks.into_iter().map(|mut talk| {
            let answers = Arc::new(AtomicU64::new(0));
            let longest = Arc::new(AtomicU64::new(0));
            let (ended, counted, waited) = (stop.clone(), answers.clone(), longest.clone());
            let thread = thread::spawn(move || {
                let said = converse(&mut *talk, &ended, (&counted, &waited));
                said.with_context(|| format!("after {} answers", counted.load(Ordering::Relaxed)))
            });
            Client {
                answers,
                longest,
                thread: Some(thread),
            }
        });
        let threads = threads.collect();
        let mut clients = Clients { stop, threads };
        clients.expect_answers()?;
        Ok(clients)
    }

    /// Answers that all clients have got so far.
    pub fn answers(&self) -> u64 {
        let counts = self.threads.iter().map(|client| &client.answers);
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Waits until each client has answers to questions that are asked from now on.
    ///
    /// # Errors
    /// A connection has ended, an answer was wrong, or a client has nothing more to ask.
    pub fn expect_answers(&mut self) -> Result<()> {
        for at in 0..self.threads.len() {
            let answers = Arc::clone(&self.threads[at].answers);
            let enough = answers.load(Ordering::Relaxed) + ENOUGH;
            wait::until("answers of the service", GENEROUS, || {
                let over = self.threads[at]
                    .thread
                    .as_ref()
                    .is_none_or(JoinHandle::is_finished);
                if over {
                    self.threads[at].join()?;
                    bail!("a client has nothing more to ask");
                }
                Ok((answers.load(Ordering::Relaxed) >= enough).then_some(()))
            })?;
        }
        Ok(())
    }

    /// The longest time that a client had no answer, since this was last asked for.
    pub fn take_longest(&self) -> Duration {
        let waits = self
            .threads
            .iter()
            .map(|client| client.longest.swap(0, Ordering::Relaxed));
        Duration::from_micros(waits.max().unwrap_or_default())
    }

    /// Ends the conversations, and lets each look at the whole.
    ///
    /// # Errors
    /// A connection broke, an answer was wrong, or something is lost.
    pub fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.iter_mut().try_for_each(Client::join)?;
        ensure!(self.answers() > 0, "nobody was answered");
        Ok(())
    }
}

impl Client {
    fn join(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(said)) => said,
            Some(Err(_)) => bail!("a client panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in &mut self.threads {
            if let Err(error) = client.join() {
                eprintln!("a client: {error:#}");
            }
        }
    }
}

/// Asks until it is to stop or has all.
fn converse(
    talk: &mut dyn ServiceClient,
    stop: &AtomicBool,
    (answers, longest): (&AtomicU64, &AtomicU64),
) -> Result<()> {
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let more = talk.ask()?;
        let waited = u64::try_from(last.elapsed().as_micros()).unwrap_or(u64::MAX);
        longest.fetch_max(waited, Ordering::Relaxed);
        last = Instant::now();
        answers.fetch_add(1, Ordering::Relaxed);
        if !more {
            break;
        }
    }
    talk.finish()
}

/// A connection from `net`, in which it stays.
pub(super) fn connect(net: &NetNs, to: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = wait::until("the service to listen", GENEROUS, || {
        match net.enter(|| Ok(TcpStream::connect(to))) {
            Ok(Ok(stream)) => Ok(Some(stream)),
            Ok(Err(_)) => Ok(None),
            Err(error) => Err(error),
        }
    })?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// Sends a question.
pub(super) fn send(stream: &mut BufReader<TcpStream>, bytes: &[u8]) -> Result<()> {
    stream.get_mut().write_all(bytes).context("asking")
}
