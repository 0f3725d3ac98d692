//! A connection to the server under test.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pageferry::tls::TlsStream;
use testbed::wait::is_interrupted;

use super::recording::Recording;
use super::run::PATIENCE;

/// After so long without progress it is asked whether the program was interrupted.
pub(super) const LOOK_UP: Duration = Duration::from_secs(1);

/// Most bytes in a TLS record: CRIU's server moves records whole, through a pipe whose length is a
/// power of two, and waits for ever if they do not fill it to the last page. CRIU itself sends 16 KiB,
/// a little more than what our side puts in one record.
const PIECE_BYTES: u64 = 8 << 10;

/// See the module's text. Sockets have [`LOOK_UP`] as their timeouts.
pub(super) enum Connection {
    Plain(TcpStream),
    Secure(Box<TlsStream>),
}

/// Makes a call again whose time is up, until [`PATIENCE`] is or the program is interrupted.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let started = Instant::now();
    loop {
        match call() {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                    && started.elapsed() < PATIENCE
                    && !is_interrupted() => {}
            result => return result,
        }
    }
}

impl Connection {
    /// Sends a recording. Over a plain connection the kernel sends its pages without a copy, as CRIU
    /// sends those of a process.
    pub(super) fn send(&mut self, recording: &Recording) -> Result<()> {
        let mut file = File::open(&recording.path)?;
        match self {
            // `io::copy` is sendfile(2) here, and goes on where it stopped.
            Connection::Plain(socket) => {
                patiently(|| io::copy(&mut file, socket))?;
            }
            Connection::Secure(_) => {
                let mut piece = Vec::new();
                for part in recording.parts() {
                    let mut left = part.end - part.start;
                    while left > 0 {
                        piece.clear();
                        let most = left.min(PIECE_BYTES);
                        let read = (&mut file).take(most).read_to_end(&mut piece)?;
                        ensure!(read as u64 == most, "the recording has become shorter");
                        self.write_all(&piece)?;
                        left -= most;
                    }
                }
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Tells the server that nothing more will come, and waits for it to hang up.
    pub(super) fn end(mut self) -> Result<()> {
        match &mut self {
            Connection::Plain(socket) => socket.shutdown(Shutdown::Write)?,
            Connection::Secure(stream) => patiently(|| stream.close())?,
        }
        // However it hangs up: what it had to say was heard before.
        let _ = self.read(&mut [0]);
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        patiently(|| match self {
            Connection::Plain(socket) => socket.read(buffer),
            Connection::Secure(stream) => stream.read(buffer),
        })
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        patiently(|| match self {
            Connection::Plain(socket) => socket.write(bytes),
            Connection::Secure(stream) => stream.write(bytes),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        patiently(|| match self {
            Connection::Plain(socket) => socket.flush(),
            Connection::Secure(stream) => stream.flush(),
        })
    }
}
