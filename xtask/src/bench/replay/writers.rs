//! Clients that write to a Redis at a steady rate, and count what is acknowledged.
//!
//! A write is due at its time, whether the one before has been answered or not: what a pause holds up is written behind
//! it at once. A connection that ends is made again.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use testbed::net::NetNs;
use testbed::wait::GENEROUS;

use super::Case;

/// Clients.
const CLIENTS: u32 = 4;

/// Before a client whose connection has ended connects again.
const AGAIN: Duration = Duration::from_millis(1);

/// The most that a client is told at once while it fills the Redis, bytes: a piece of the recorder's.
const BATCH_BYTES: usize = 16 << 10;

/// Each so many writes of a client, one counts.
const COUNTED: u64 = 8;

/// The longest answer, bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// One connection.
pub(super) struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects from the network of this thread.
    pub(super) fn connect(at: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(GENEROUS))?;
        stream.set_nodelay(true)?;
        Ok(Client(BufReader::new(stream)))
    }

    /// Sends commands.
    fn send(&mut self, commands: &[u8]) -> Result<()> {
        Ok(self.0.get_mut().write_all(commands)?)
    }

    /// Reads an answer: a word, a number or a value.
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the connection has ended");
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", rest)) => Ok(rest.to_owned()),
            Some(("$", length)) => {
                let length: usize = length.parse().with_context(|| line.to_owned())?;
                ensure!(length <= ANSWER_BYTES_MAX, "{line}");
                let mut bytes = vec![0; length + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Ok(String::from_utf8(bytes)?)
            }
            _ => bail!("{line}"),
        }
    }

    fn ask(&mut self, words: &[&[u8]]) -> Result<String> {
        let mut command = Vec::new();
        add(&mut command, words);
        self.send(&command)?;
        self.answer()
    }
}

/// Adds a command in Redis's protocol.
fn add(commands: &mut Vec<u8>, words: &[&[u8]]) {
    commands.extend(format!("*{}\r\n", words.len()).bytes());
    for word in words {
        commands.extend(format!("${}\r\n", word.len()).bytes());
        commands.extend_from_slice(word);
        commands.extend_from_slice(b"\r\n");
    }
}

/// A write of a value, of which half can be made smaller.
fn set(commands: &mut Vec<u8>, case: &Case, random: &mut Rng) {
    let key = format!("key:{}", random.u32(..case.keys));
    let mut value = vec![b'x'; case.value_bytes as usize];
    let half = value.len() / 2;
    random.fill(&mut value[half..]);
    add(commands, &[b"SET", key.as_bytes(), &value]);
}

/// Tells the Redis as many bytes of commands as the case has.
pub(super) fn fill(at: SocketAddr, case: &Case) -> Result<()> {
    let mut client = Client::connect(at)?;
    let mut random = Rng::with_seed(case.seed);
    let mut left = u64::from(case.log_mib) << 20;
    let mut batch = Vec::new();
    while left > 0 {
        let mut count = 0;
        batch.clear();
        while count == 0 || batch.len() + case.value_bytes as usize + 64 <= BATCH_BYTES {
            set(&mut batch, case, &mut random);
            count += 1;
        }
        client.send(&batch)?;
        for _ in 0..count {
            client.answer()?;
        }
        left = left.saturating_sub(u64::try_from(batch.len())?);
    }
    Ok(())
}

/// What all clients have seen.
#[derive(Debug)]
struct Seen {
    began: Instant,
    stop: AtomicBool,
    answers: AtomicU64,
    /// When the last answer came, µs since the beginning.
    last_us: AtomicU64,
    /// The longest time in which none of them had an answer, µs.
    longest_us: AtomicU64,
    /// The last number that each one's counter was said to have.
    counters: Vec<AtomicU64>,
}

impl Seen {
    fn answered(&self) {
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let last = self.last_us.fetch_max(now, Ordering::SeqCst);
        self.longest_us
            .fetch_max(now.saturating_sub(last), Ordering::SeqCst);
        self.answers.fetch_add(1, Ordering::SeqCst);
    }
}

/// Clients that write. Their threads end on drop.
pub(super) struct Writers {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Writers {
    /// Starts them in `net`, and waits until each has an answer.
    pub(super) fn start(net: &NetNs, at: SocketAddr, case: &Case) -> Result<Writers> {
        let seen = Arc::new(Seen {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            last_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            counters: (0..CLIENTS).map(|_| AtomicU64::new(0)).collect(),
        });
        let mut writers = Writers {
            seen: Arc::clone(&seen),
            threads: Vec::new(),
        };
        for number in 0..CLIENTS {
            let (seen, case, enter) = (Arc::clone(&seen), *case, net.entrance());
            let thread = thread::spawn(move || {
                enter()?;
                write(at, number, &case, &seen)
            });
            writers.threads.push(thread);
        }
        writers.expect_answers()?;
        Ok(writers)
    }

    /// Answers so far.
    pub(super) fn answers(&self) -> u64 {
        self.seen.answers.load(Ordering::SeqCst)
    }

    /// The longest time without an answer since this was last asked for.
    pub(super) fn take_longest(&self) -> Duration {
        Duration::from_micros(self.seen.longest_us.swap(0, Ordering::SeqCst))
    }

    /// Waits until each client's counter has gone on.
    pub(super) fn expect_answers(&mut self) -> Result<()> {
        let counters = || {
            let values = self.seen.counters.iter();
            values.map(|counter| counter.load(Ordering::SeqCst))
        };
        let before: Vec<u64> = counters().collect();
        testbed::wait::until("the writers' answers", GENEROUS, || {
            let has_ended = self.threads.iter().any(JoinHandle::is_finished);
            ensure!(!has_ended, "a writer has ended");
            let have_all = counters().zip(&before).all(|(now, &then)| now > then);
            Ok(have_all.then_some(()))
        })
    }

    /// Ends them; fails if one of them has lost an acknowledged write, or if the service at `at` has.
    pub(super) fn finish(mut self, net: &NetNs, at: SocketAddr) -> Result<()> {
        self.join()?;
        let mut client = net.enter(|| Client::connect(at))?;
        for (number, counter) in self.seen.counters.iter().enumerate() {
            let there: u64 = client
                .ask(&[b"GET", counter_of(number).as_bytes()])?
                .parse()?;
            let acknowledged = counter.load(Ordering::SeqCst);
            ensure!(
                there >= acknowledged,
                "{there} of {acknowledged} writes are there"
            );
        }
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        self.seen.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(written) => written.context("a writer")?,
                Err(_) => bail!("a writer panicked"),
            }
        }
        Ok(())
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("{error:#}");
        }
    }
}

fn counter_of(number: usize) -> String {
    format!("counter:{number}")
}

fn write(at: SocketAddr, number: u32, case: &Case, seen: &Seen) -> Result<()> {
    let mut random = Rng::with_seed(case.seed ^ u64::from(number + 1) << 32);
    let pace = Duration::from_secs(1) * CLIENTS / case.writes_per_s;
    let at_number = usize::try_from(number)?;
    let (counter, acknowledged) = (counter_of(at_number), &seen.counters[at_number]);
    let mut client: Option<Client> = None;
    let mut command = Vec::new();
    let mut due = Instant::now() + pace * number / CLIENTS;
    let mut count: u64 = 0;
    while !seen.stop.load(Ordering::SeqCst) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let Some(open) = &mut client else {
            client = Client::connect(at).ok();
            if client.is_none() {
                thread::sleep(AGAIN);
            }
            continue;
        };
        let is_counted = count.is_multiple_of(COUNTED);
        command.clear();
        match is_counted {
            true => add(&mut command, &[b"INCR", counter.as_bytes()]),
            false => set(&mut command, case, &mut random),
        }
        let answer = open.send(&command).and_then(|()| open.answer());
        let Ok(answer) = answer else {
            client = None;
            continue;
        };
        if is_counted {
            // What was sent and not answered may count.
            let now: u64 = answer.parse()?;
            let before = acknowledged.swap(now, Ordering::SeqCst);
            ensure!(
                now > before,
                "{now} came after {before}: acknowledged writes are lost"
            );
        }
        seen.answered();
        count += 1;
        due += pace;
    }
    Ok(())
}
