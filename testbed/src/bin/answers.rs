//! A small HTTP service: each answer tells at which address it was asked. SIGTERM ends it at once, whoever is
//! connected, as a service ends that has no time to be gentle.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::Result;
use clap::Parser;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

/// Listens and answers.
#[derive(Parser)]
struct Args {
    /// Where.
    #[arg(long)]
    listen: SocketAddr,

    /// So many questions for /ready are answered by 503 first.
    #[arg(long, default_value_t = 0)]
    warm_up: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // Process 1 of a PID namespace gets no signal that it does not handle.
    let mut signals = Signals::new([SIGTERM])?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            std::process::exit(0);
        }
    });
    let cold = Arc::new(AtomicU32::new(args.warm_up));
    for stream in TcpListener::bind(args.listen)?.incoming() {
        let (stream, cold) = (stream?, Arc::clone(&cold));
        thread::spawn(move || {
            // A client that goes away is no mistake of this service's.
            let _ = serve(&stream, &cold);
        });
    }
    Ok(())
}

/// Answers all questions of a connection.
fn serve(stream: &TcpStream, cold: &AtomicU32) -> Result<()> {
    stream.set_nodelay(true)?;
    let here = stream.local_addr()?.ip().to_string();
    let mut lines = BufReader::new(stream);
    loop {
        let (mut first, mut closes) = (String::new(), false);
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if first.is_empty() {
                first.clone_from(&line);
            }
            closes |= line.to_ascii_lowercase().trim() == "connection: close";
            if line == "\r\n" {
                break;
            }
        }
        let is_cold = first.starts_with("GET /ready ")
            && cold
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok();
        let status = if is_cold { "503 Not Yet" } else { "200 OK" };
        let end = if closes { "close" } else { "keep-alive" };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: {end}\r\n\r\n{here}",
            here.len()
        );
        (&mut &*stream).write_all(answer.as_bytes())?;
        if closes {
            return Ok(());
        }
    }
}
