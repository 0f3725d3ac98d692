//! A TLS session over a socket: blocking, or as far as it goes without.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::MSG_NOSIGNAL;
use rustls::AlertDescription;
use socket2::{SockRef, Socket};

use super::session::{Plain, TlsSession};
use super::verify::PeerVerifier;
use crate::limits::TLS_OUTGOING_BYTES;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// How long a peer that was told of an error may take to hang up.
const ALERTED: Duration = Duration::from_secs(2);

/// A secured connection. Writes gather ciphertext until there is enough of it or
/// [`TlsStream::flush`]; each begins a record of its own.
#[derive(Debug)]
pub struct TlsStream {
    socket: Socket,
    session: TlsSession,
    verifier: Arc<PeerVerifier>,
    /// This host's certificate in words.
    own: Arc<str>,
    /// Whether the peer has said anything after its handshake.
    has_arrived: bool,
    /// Whether a byte has come, of the handshake or behind it.
    received: bool,
}

impl TlsStream {
    pub(super) fn new(
        socket: Socket,
        session: TlsSession,
        verifier: Arc<PeerVerifier>,
        own: Arc<str>,
    ) -> TlsStream {
        TlsStream {
            socket,
            session,
            verifier,
            own,
            has_arrived: false,
            received: false,
        }
    }

    /// The socket under it, for its options and to wait for.
    pub fn socket(&self) -> SockRef<'_> {
        SockRef::from(&self.socket)
    }

    /// Fills `first` with the next bytes that the peer says, which stay to be read; fewer at the end.
    pub fn peek(&mut self, first: &mut [u8]) -> io::Result<usize> {
        let mut have = 0;
        while have < first.len() {
            match self.read(&mut first[have..]) {
                Ok(0) => break,
                Ok(bytes) => have += bytes,
                Err(error) => {
                    // It may be that nothing more has come yet.
                    self.session.unread(&first[..have]);
                    return Err(error);
                }
            }
        }
        self.session.unread(&first[..have]);
        Ok(have)
    }

    /// Whether a read may find something although the socket is not readable.
    pub fn has_buffered(&self) -> bool {
        self.session.has_buffered()
    }

    /// Whether not a byte has come.
    pub(super) fn has_received_nothing(&self) -> bool {
        !self.received
    }

    /// Whether the handshake is over. Until then nothing can be written.
    pub fn is_established(&self) -> bool {
        self.session.is_established()
    }

    /// Makes reads and writes fail with [`ErrorKind::WouldBlock`] instead of waiting, or wait again.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket.set_nonblocking(nonblocking)
    }

    /// Tells the peer that nothing more will come.
    pub fn close(&mut self) -> io::Result<()> {
        let queued = self.session.close();
        queued.map_err(|error| self.failed(&error))?;
        self.flush()
    }

    /// Sends the first message of the handshake.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        let begun = self.session.handshake();
        begun.map_err(|error| self.failed(&error))?;
        self.send()
    }

    /// Waits until both sides have shown who they are. On failure the peer is told why.
    pub(super) fn handshake(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + HANDSHAKE;
        let result = self.shake_hands(deadline);
        self.socket.set_read_timeout(None)?;
        result
    }

    fn shake_hands(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            let step = self.session.handshake();
            let established = step.map_err(|error| self.failed(&error))?;
            self.flush()?;
            if established {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(not_tls(ErrorKind::TimedOut));
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.receive() {
                Ok(0) => return Err(not_tls(ErrorKind::UnexpectedEof)),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(not_tls(ErrorKind::ConnectionReset));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The end of what the peer says. GnuTLS leaves it to CRIU to check certificates after the
    /// handshake, and CRIU hangs up on those that it refuses.
    fn end(&self) -> io::Result<usize> {
        if self.has_arrived {
            return Ok(0);
        }
        if !self.is_established() {
            return Err(not_tls(ErrorKind::UnexpectedEof));
        }
        let text = format!(
            "the peer hung up right after the TLS handshake: see its log, it may refuse our \
             certificate, {}",
            self.own
        );
        Err(io::Error::new(ErrorKind::ConnectionAborted, text))
    }

    /// Receives ciphertext.
    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match (&self.socket).read(self.session.room()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(bytes) => {
                    self.received |= bytes > 0;
                    self.session.filled(bytes);
                    return Ok(bytes);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends ciphertext until none is left.
    fn send(&mut self) -> io::Result<()> {
        while !self.session.outgoing().is_empty() {
            match self
                .socket
                .send_with_flags(self.session.outgoing(), MSG_NOSIGNAL)
            {
                Ok(bytes) => self.session.sent(bytes),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the peer of an error and gives it time to read that: a connection that is closed with
    /// something unread is reset, and takes the alert with it.
    fn failed(&mut self, error: &rustls::Error) -> io::Error {
        self.session.queue_alert();
        let alerts = !self.session.outgoing().is_empty();
        if alerts && self.socket.set_nonblocking(false).is_ok() && self.send().is_ok() {
            let _ = self.socket.shutdown(Shutdown::Write);
            let deadline = Instant::now() + ALERTED;
            let mut rest = [0; 1024];
            while let Some(left) = deadline.checked_duration_since(Instant::now()) {
                let timeout = Some(left.max(Duration::from_millis(1)));
                let waits = self.socket.set_read_timeout(timeout).is_ok();
                if !waits || !matches!((&self.socket).read(&mut rest), Ok(1..)) {
                    break;
                }
            }
        }
        let problem = self.verifier.problem();
        io::Error::other(problem.unwrap_or_else(|| self.explain(error)))
    }

    fn explain(&self, error: &rustls::Error) -> String {
        match error {
            rustls::Error::AlertReceived(alert) if is_about_certificate(*alert) => {
                format!(
                    "the peer refuses our certificate, {}: it says {alert:?}",
                    self.own
                )
            }
            rustls::Error::AlertReceived(alert) => format!("the peer ends it: it says {alert:?}"),
            rustls::Error::NoCertificatesPresented => "the peer shows no certificate".to_owned(),
            rustls::Error::InvalidMessage(_) => {
                format!("the peer does not speak TLS: is it started with --tls? ({error})")
            }
            _ => error.to_string(),
        }
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for TlsStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.session.read(out);
            match read.map_err(|error| self.failed(&error))? {
                Plain::Bytes(bytes) => {
                    self.has_arrived = true;
                    return Ok(bytes);
                }
                Plain::Ended => return self.end(),
                Plain::NeedsInput => {}
            }
            // What rustls has to say of its own, a key update for example. If the peer takes nothing
            // now because it waits for us to read, so be it.
            match self.send() {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            // An end without notice is an end: CRIU's protocol says itself when all was said.
            if self.receive()? == 0 {
                return self.end();
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.session.outgoing().len() >= TLS_OUTGOING_BYTES {
            self.send()?;
        }
        let taken = &bytes[..bytes.len().min(TLS_OUTGOING_BYTES)];
        let written = self.session.write(taken);
        written.map_err(|error| self.failed(&error))?;
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

fn not_tls(kind: ErrorKind) -> io::Error {
    let what = match kind {
        ErrorKind::TimedOut => "says nothing",
        ErrorKind::UnexpectedEof => "hangs up",
        _ => "resets the connection",
    };
    let text = format!("the peer {what} instead of a TLS handshake: is it started with --tls?");
    io::Error::new(kind, text)
}

fn is_about_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired
            | AlertDescription::NoCertificate
    )
}
