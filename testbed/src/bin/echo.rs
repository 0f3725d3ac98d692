//! A service that sends back what it gets, to one client at a time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use anyhow::Result;
use clap::Parser;

/// Listens and answers.
#[derive(Parser)]
struct Args {
    /// Where.
    #[arg(long)]
    listen: SocketAddr,
}

fn main() -> Result<()> {
    let listener = TcpListener::bind(Args::parse().listen)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = stream.read(&mut bytes)?;
            if count == 0 {
                break;
            }
            stream.write_all(&bytes[..count])?;
        }
    }
}
