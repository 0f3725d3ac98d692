//! One TLS session: ciphertext in and out on one side, plaintext on the other. No descriptor here.
//!
//! ```text
//! socket --> incoming --(rustls)--> plain --> caller
//! socket <-- outgoing <--(rustls)----------- caller
//! ```
//!
//! Each [`TlsSession::write`] begins a new record. That matters to CRIU: its lazy-pages daemon reads
//! just the bytes that it waits for and goes back to epoll, which does not know of what is left of a
//! decrypted record. So a header never shares a record with what follows it.

use std::fmt;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};

use crate::limits::TLS_BUFFER_BYTES;

/// Most plaintext in a record: a multiple of both header lengths of CRIU's protocol, so that no
/// request is ever cut by the end of a record. (RFC 8446 allows 16384.)
pub(super) const RECORD_BYTES: usize = 170 * 96;

/// What a record adds to its plaintext at most: header, explicit nonce, content type, tag.
const RECORD_OVERHEAD_BYTES: usize = 64;

/// The longest record that a peer may send, with its header: TLS 1.2 lets it grow by 2048 bytes.
const WIRE_RECORD_BYTES_MAX: usize = 5 + (16 << 10) + 2048;

const _: () = assert!(TLS_BUFFER_BYTES / 2 >= WIRE_RECORD_BYTES_MAX);

/// What a read came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plain {
    /// So many bytes of plaintext, at least one.
    Bytes(usize),
    /// Nothing before more ciphertext comes.
    NeedsInput,
    /// The peer has said that nothing more will come.
    Ended,
}

/// See the module's text.
#[derive(Debug)]
pub struct TlsSession {
    connection: Connection,
    incoming: Incoming,
    outgoing: Outgoing,
    plain: PlainBuffer,
    established: bool,
    ended: bool,
    failed: bool,
}

enum Connection {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Connection::Client(_) => "Client",
            Connection::Server(_) => "Server",
        })
    }
}

/// Ciphertext from the peer that was not looked at yet.
#[derive(Debug)]
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Ciphertext for the peer that is not sent yet. The buffer only grows: bytes that rustls is about to
/// write need not be cleared for each record.
#[derive(Default, Debug)]
struct Outgoing {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// Plaintext that no read has taken yet.
#[derive(Default, Debug)]
struct PlainBuffer {
    bytes: Vec<u8>,
    taken: usize,
}

/// What is to be encrypted.
#[derive(Clone, Copy, Debug)]
enum Say<'a> {
    Nothing,
    Data(&'a [u8]),
    /// That nothing more will come.
    Goodbye,
}

/// Why rustls stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// Something was done, and so many bytes of plaintext came; go on.
    Progress(usize),
    /// The handshake needs input.
    Handshaking,
    /// Established, and all input is used up. Whatever was to be encrypted is in `outgoing`.
    Idle,
    /// Both sides said that nothing more will come.
    Closed,
}

impl From<UnbufferedClientConnection> for TlsSession {
    fn from(connection: UnbufferedClientConnection) -> TlsSession {
        TlsSession::new(Connection::Client(Box::new(connection)))
    }
}

impl From<UnbufferedServerConnection> for TlsSession {
    fn from(connection: UnbufferedServerConnection) -> TlsSession {
        TlsSession::new(Connection::Server(Box::new(connection)))
    }
}

impl TlsSession {
    fn new(connection: Connection) -> TlsSession {
        TlsSession {
            connection,
            incoming: Incoming {
                buffer: vec![0; TLS_BUFFER_BYTES].into(),
                start: 0,
                end: 0,
            },
            outgoing: Outgoing::default(),
            plain: PlainBuffer::default(),
            established: false,
            ended: false,
            failed: false,
        }
    }

    /// Room for ciphertext from the socket; never empty while a read says that it needs input.
    pub fn room(&mut self) -> &mut [u8] {
        self.incoming.room()
    }

    /// `bytes` of the room have been filled.
    pub fn filled(&mut self, bytes: usize) {
        self.incoming.end += bytes;
    }

    /// Ciphertext for the socket.
    pub fn outgoing(&self) -> &[u8] {
        self.outgoing.bytes()
    }

    /// `bytes` of the outgoing ciphertext are sent.
    pub fn sent(&mut self, bytes: usize) {
        self.outgoing.sent(bytes);
    }

    /// Whether a read would find plaintext without more input, or may find some.
    pub(super) fn has_buffered(&self) -> bool {
        !self.plain.is_empty() || self.incoming.has_record()
    }

    /// Whether the handshake is over.
    pub(super) fn is_established(&self) -> bool {
        self.established
    }

    /// Goes on with the handshake as far as the input allows. True when it is over.
    pub fn handshake(&mut self) -> Result<bool, rustls::Error> {
        while !self.established {
            match self.step(Say::Nothing, &mut [])? {
                Stop::Progress(_) | Stop::Idle => {}
                Stop::Handshaking => return Ok(false),
                Stop::Closed => return Err(rustls::Error::HandshakeNotComplete),
            }
        }
        Ok(true)
    }

    /// Fills `out` as far as plaintext has come.
    pub fn read(&mut self, out: &mut [u8]) -> Result<Plain, rustls::Error> {
        let mut filled = self.plain.take(out);
        while filled < out.len() && !self.ended {
            match self.step(Say::Nothing, &mut out[filled..])? {
                Stop::Progress(bytes) => filled += bytes,
                Stop::Handshaking | Stop::Idle => break,
                Stop::Closed => self.ended = true,
            }
        }
        Ok(match filled {
            0 if self.ended => Plain::Ended,
            0 => Plain::NeedsInput,
            bytes => Plain::Bytes(bytes),
        })
    }

    /// The next reads find `bytes`, which were read before, again.
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        let plain = &mut self.plain;
        drop(plain.bytes.splice(..plain.taken, bytes.iter().copied()));
        plain.taken = 0;
    }

    /// Encrypts `bytes` into records of their own, to be sent.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), rustls::Error> {
        for record in bytes.chunks(RECORD_BYTES) {
            loop {
                match self.step(Say::Data(record), &mut [])? {
                    Stop::Idle => break,
                    Stop::Progress(_) => {}
                    Stop::Handshaking | Stop::Closed => {
                        return Err(rustls::Error::HandshakeNotComplete);
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come.
    pub fn close(&mut self) -> Result<(), rustls::Error> {
        while self.established && matches!(self.step(Say::Goodbye, &mut [])?, Stop::Progress(_)) {}
        Ok(())
    }

    /// After an error: puts the alert that tells the peer of it into the outgoing ciphertext.
    pub(super) fn queue_alert(&mut self) {
        // What waits to be encoded comes before any more input is looked at, and nothing but the
        // alert waits: everything else was taken before the input that failed.
        let _ = self.advance(Say::Nothing, &mut []);
    }

    /// Lets rustls do one thing: read records into `out`, say something of its own, or encrypt what
    /// `say` says. After an error it is not let near the input again.
    fn step(&mut self, say: Say<'_>, out: &mut [u8]) -> Result<Stop, rustls::Error> {
        if self.failed {
            let text = "the TLS session has failed before";
            return Err(rustls::Error::General(text.to_owned()));
        }
        let stop = self.advance(say, out);
        self.failed = stop.is_err();
        self.established |= matches!(stop, Ok(Stop::Idle));
        stop
    }

    fn advance(&mut self, say: Say<'_>, out: &mut [u8]) -> Result<Stop, rustls::Error> {
        let TlsSession {
            connection,
            incoming,
            outgoing,
            plain,
            ended,
            ..
        } = self;
        let mut outputs = Outputs {
            outgoing,
            plain,
            ended,
            out,
        };
        let input = &mut incoming.buffer[incoming.start..incoming.end];
        let (used, stop) = match connection {
            Connection::Client(client) => outputs.handle(client.process_tls_records(input), say),
            Connection::Server(server) => outputs.handle(server.process_tls_records(input), say),
        };
        incoming.start += used;
        stop
    }
}

/// Where what rustls gives goes.
struct Outputs<'a> {
    outgoing: &'a mut Outgoing,
    /// For plaintext that does not fit into `out`.
    plain: &'a mut PlainBuffer,
    ended: &'a mut bool,
    /// Room of the reader.
    out: &'a mut [u8],
}

impl Outputs<'_> {
    /// Does what rustls asks for; says how much input it has used up.
    fn handle<Data>(
        &mut self,
        status: UnbufferedStatus<'_, '_, Data>,
        say: Say<'_>,
    ) -> (usize, Result<Stop, rustls::Error>) {
        let mut used = status.discard;
        let state = match status.state {
            Ok(state) => state,
            Err(error) => return (used, Err(error)),
        };
        let stop = match state {
            ConnectionState::ReadTraffic(mut traffic) => {
                let mut filled = 0;
                loop {
                    match traffic.next_record() {
                        Some(Ok(record)) => {
                            filled += self.plain.pass(record.payload, &mut self.out[filled..]);
                            used += record.discard;
                        }
                        Some(Err(error)) => break Err(error),
                        None => break Ok(Stop::Progress(filled)),
                    }
                }
            }
            ConnectionState::EncodeTlsData(mut message) => self.append(0, |out| {
                message.encode(out).map_err(|error| match error {
                    EncodeError::InsufficientSize(size) => Refused::TooSmall(size),
                    EncodeError::AlreadyEncoded => Refused::Never,
                })
            }),
            ConnectionState::TransmitTlsData(message) => {
                // It is in `outgoing`, in its order.
                message.done();
                Ok(Stop::Progress(0))
            }
            ConnectionState::WriteTraffic(mut traffic) => {
                let written = match say {
                    Say::Nothing => Ok(Stop::Idle),
                    Say::Data(data) => self.append(data.len(), |out| {
                        traffic.encrypt(data, out).map_err(Refused::from)
                    }),
                    Say::Goodbye => self.append(0, |out| {
                        traffic.queue_close_notify(out).map_err(Refused::from)
                    }),
                };
                written.map(|_| Stop::Idle)
            }
            ConnectionState::PeerClosed => {
                *self.ended = true;
                Ok(Stop::Progress(0))
            }
            ConnectionState::Closed => Ok(Stop::Closed),
            ConnectionState::BlockedHandshake => Ok(Stop::Handshaking),
            // Early data is switched off; other states do not exist in this version.
            _ => Err(rustls::Error::General("an unknown TLS state".to_owned())),
        };
        (used, stop)
    }

    /// Appends to `outgoing` what `fill` writes: about `bytes` bytes.
    fn append(
        &mut self,
        bytes: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<usize, Refused>,
    ) -> Result<Stop, rustls::Error> {
        let mut room = bytes + RECORD_OVERHEAD_BYTES;
        loop {
            match fill(self.outgoing.room(room)) {
                Ok(bytes) => {
                    self.outgoing.end += bytes;
                    return Ok(Stop::Progress(0));
                }
                Err(Refused::TooSmall(size)) if size.required_size > room => {
                    room = size.required_size;
                }
                Err(_) => return Err(rustls::Error::EncryptError),
            }
        }
    }
}

/// Why rustls wrote nothing.
enum Refused {
    TooSmall(InsufficientSizeError),
    Never,
}

impl From<EncryptError> for Refused {
    fn from(error: EncryptError) -> Refused {
        match error {
            EncryptError::InsufficientSize(size) => Refused::TooSmall(size),
            EncryptError::EncryptExhausted => Refused::Never,
        }
    }
}

impl Incoming {
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > self.buffer.len() / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// Whether a whole record has come. Its length is in bytes 3 and 4.
    fn has_record(&self) -> bool {
        match self.buffer[self.start..self.end] {
            [_, _, _, high, low, ref body @ ..] => {
                body.len() >= usize::from(u16::from_be_bytes([high, low]))
            }
            _ => false,
        }
    }
}

impl Outgoing {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Room for `bytes` more bytes.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.end + bytes;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.end..end]
    }

    fn sent(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
}

impl PlainBuffer {
    /// Moves `bytes`, which come after all that is here, to `out` as far as they may pass and fit,
    /// and keeps the rest. Returns how many went to `out`.
    fn pass(&mut self, bytes: &[u8], out: &mut [u8]) -> usize {
        let passing = match self.is_empty() {
            true => bytes.len().min(out.len()),
            false => 0,
        };
        out[..passing].copy_from_slice(&bytes[..passing]);
        self.bytes.extend_from_slice(&bytes[passing..]);
        passing
    }

    fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    /// Moves what fits into `out`.
    fn take(&mut self, out: &mut [u8]) -> usize {
        let left = &self.bytes[self.taken..];
        let bytes = left.len().min(out.len());
        out[..bytes].copy_from_slice(&left[..bytes]);
        self.taken += bytes;
        if self.is_empty() {
            self.bytes.clear();
            self.taken = 0;
        }
        bytes
    }
}
