//! A connection to the server under test.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;
use pageferry::tls::TlsStream;
use socket2::SockRef;
use testbed::wait::is_interrupted;

use super::pages::Pages;
use super::recording::Recording;

/// How long a run may take that nothing is wrong with: 8 GiB at a tenth of the usual rates.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);

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

/// Makes a call again whose time is up, until [`TIMEOUT`] is or the program is interrupted.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let started = Instant::now();
    loop {
        match call() {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                    && started.elapsed() < TIMEOUT
                    && !is_interrupted() => {}
            result => return result,
        }
    }
}

impl Connection {
    /// Sends a recording whose pages are loaded, with the calls of CRIU: the socket is corked, each
    /// header is sent, and the pages behind it are spliced from where they are. Secured pages are read
    /// and encrypted.
    pub(super) fn send(&mut self, recording: &Recording, mut pages: Pages) -> Result<()> {
        if let Connection::Plain(socket) = self {
            SockRef::from(&*socket).set_tcp_cork(true)?;
        }
        let mut piece = Vec::new();
        for (header, payload) in recording.frames() {
            self.write_all(header)?;
            let mut left = payload;
            while left > 0 {
                left -= match self {
                    Connection::Plain(socket) => patiently(|| pages.splice(socket, left))?,
                    Connection::Secure(_) => {
                        pages.read(left.min(PIECE_BYTES), &mut piece)?;
                        self.write_all(&piece)?;
                        piece.len() as u64
                    }
                };
            }
        }
        match self {
            // Sends what the cork held back, as CRIU has it sent when it waits for an answer.
            Connection::Plain(socket) => socket.set_nodelay(true)?,
            Connection::Secure(_) => self.flush()?,
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
