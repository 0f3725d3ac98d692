//! Writes what one connection brings into a file: the least that receiving a dump can cost, as a
//! process that is measured like a page server.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;

/// What is received and written at a time, bytes: of the sizes from 64 KiB to 4 MiB the one that
/// measured best, for it stays in the processor's cache between the two calls.
const PIECE_BYTES: usize = 256 << 10;

/// The descriptor that `--status-fd` may name: standard output.
const STATUS_FD: u32 = 1;

/// Stores the bytes of one connection over loopback, and ends.
#[derive(Parser)]
struct Args {
    /// Where they go.
    file: PathBuf,
    /// Where to write the port.
    #[arg(long)]
    port_file: PathBuf,
    /// The descriptor that a zero byte goes to when it listens.
    #[arg(long)]
    status_fd: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.status_fd == STATUS_FD, "--status-fd must be 1");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    fs::write(&args.port_file, listener.local_addr()?.port().to_string())?;
    let mut file = File::create(&args.file)?;
    let mut ready = io::stdout();
    ready.write_all(&[0])?;
    ready.flush()?;

    let (mut connection, _) = listener.accept()?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match connection.read(&mut piece)? {
            0 => return Ok(()),
            bytes => file.write_all(&piece[..bytes])?,
        }
    }
}
