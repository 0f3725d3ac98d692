//! The server's end of `swrk FD`: requests of CRIU's remote procedure calls over an inherited socket.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, getsockopt, recv, send, socketpair, sockopt,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;

use crate::criu::rpc::{Request, Response, kind};
use crate::criu::rpc_fields::Fields;
use crate::error::{Error, Kind, Result};
use crate::limits::RPC_MESSAGE_BYTES_MAX;
use crate::sys::fdpass;
use crate::sys::process::inherited_descriptor;

/// A client that sends requests.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    pid: Pid,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Client {
    /// The one behind descriptor `number`, which this process was started with.
    ///
    /// # Errors
    ///
    /// It is not open, or no local socket.
    pub fn inherited(number: RawFd) -> Result<Client> {
        let socket = inherited_descriptor(number).map_err(|error| {
            let text = format!("swrk: descriptor {number} is not open");
            Error::wrap(Kind::Usage, text, error)
        })?;
        Client::new(socket)
    }

    /// The one at the other end of `socket`.
    ///
    /// # Errors
    ///
    /// It is no local socket.
    pub fn new(socket: OwnedFd) -> Result<Client> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials);
        let credentials = credentials.map_err(|errno| {
            let text = format!(
                "swrk: descriptor {} is not a local socket",
                socket.as_raw_fd()
            );
            Error::wrap(Kind::Usage, text, errno)
        })?;
        Ok(Client {
            socket,
            pid: Pid::from_raw(credentials.pid()),
        })
    }

    /// Its socket alone.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The next request's bytes; `None` when the client has hung up. With `MSG_PEEK` in `flags` they are
    /// there for whoever receives next.
    ///
    /// # Errors
    ///
    /// The connection fails, or the request is longer than any of CRIU's.
    pub fn receive_bytes(&self, flags: MsgFlags) -> Result<Option<Vec<u8>>> {
        let mut message = vec![0; RPC_MESSAGE_BYTES_MAX];
        let flags = flags | MsgFlags::MSG_TRUNC;
        let bytes = recv(self.socket.as_raw_fd(), &mut message, flags);
        let bytes = bytes.map_err(|errno| {
            Error::wrap(Kind::PeerLost, "swrk: cannot receive a request", errno)
        })?;
        if bytes > message.len() {
            let text = format!("swrk: a request of {bytes} bytes is longer than any of CRIU's");
            return Err(Error::new(Kind::Protocol, text));
        }
        message.truncate(bytes);
        Ok((bytes > 0).then_some(message))
    }

    /// The next request; `None` when the client has hung up.
    ///
    /// # Errors
    ///
    /// The connection fails, or the request cannot be understood.
    pub fn receive(&self) -> Result<Option<Request>> {
        let message = self.receive_bytes(MsgFlags::empty())?;
        message.as_deref().map(understood).transpose()
    }

    /// The next request, which stays for whoever receives it; `None` when the client has hung up.
    ///
    /// # Errors
    ///
    /// The connection fails, or the request cannot be understood.
    pub fn peek(&self) -> Result<Option<Request>> {
        let message = self.receive_bytes(MsgFlags::MSG_PEEK)?;
        message.as_deref().map(understood).transpose()
    }

    /// Answers.
    ///
    /// # Errors
    ///
    /// The client has hung up.
    pub fn send(&self, response: &Response) -> Result<()> {
        let message = response.encode_to_vec();
        let sent = send(self.socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
        sent.map(|_| ())
            .map_err(|errno| Error::wrap(Kind::PeerLost, "swrk: cannot answer", errno))
    }

    /// Answers how the child that `request` is about has ended, when it has.
    ///
    /// # Errors
    ///
    /// The client has hung up.
    pub fn answer_wait(&self, request: &Request) -> Result<()> {
        self.send(&match wait_status(request.pid.unwrap_or(0)) {
            Ok(status) => Response {
                kind: kind::WAIT_PID,
                success: true,
                status: Some(status),
                ..Response::default()
            },
            Err(error) => Response::failed(kind::WAIT_PID, error),
        })
    }

    /// What descriptor `number` of the client is open at.
    ///
    /// # Errors
    ///
    /// It is not open, or the client's descriptors may not be seen.
    pub fn descriptor_path(&self, number: i32) -> Result<PathBuf> {
        let link = self.descriptor_link(number);
        fs::read_link(&link).map_err(|error| Error::file("follow", &link, error))
    }

    /// Where descriptor `number` of the client can be opened once more.
    pub fn descriptor_link(&self, number: i32) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{number}", self.pid))
    }
}

/// A message with the descriptor that came with it, if one did: CRIU sends one at most.
#[derive(Debug)]
pub struct SwrkMessage {
    /// The message.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
}

impl SwrkMessage {
    /// Receives a message; `None` if the peer has hung up.
    ///
    /// # Errors
    ///
    /// The connection fails, or the message is longer than any of CRIU's.
    pub fn receive(socket: BorrowedFd<'_>) -> Result<Option<SwrkMessage>> {
        // One byte more tells that a message is too long.
        let mut bytes = vec![0; RPC_MESSAGE_BYTES_MAX + 1];
        let received = fdpass::receive(socket, &mut bytes).map_err(|error| {
            Error::wrap(Kind::PeerLost, "swrk: cannot receive a message", error)
        })?;
        if received.bytes > RPC_MESSAGE_BYTES_MAX {
            let text = "swrk: a message is longer than any of CRIU's";
            return Err(Error::new(Kind::Protocol, text));
        }
        bytes.truncate(received.bytes);
        let descriptor = received.fd;
        Ok((received.bytes > 0).then_some(SwrkMessage { bytes, descriptor }))
    }

    /// Sends it on.
    ///
    /// # Errors
    ///
    /// The peer has hung up.
    pub fn send(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let descriptor = self.descriptor.as_ref().map(AsFd::as_fd);
        fdpass::send(socket, &self.bytes, descriptor)
            .map_err(|error| Error::wrap(Kind::PeerLost, "swrk: cannot send a message", error))
    }

    /// Its fields.
    ///
    /// # Errors
    ///
    /// It is damaged.
    pub fn fields(&self) -> Result<Fields> {
        Fields::decode(&self.bytes).map_err(|error| {
            Error::wrap(
                Kind::Protocol,
                "swrk: a message cannot be understood",
                error,
            )
        })
    }
}

/// A connection for `criu swrk`: this process's end, and the end that CRIU is to inherit.
///
/// # Errors
///
/// No socket can be made.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let kind = SockType::SeqPacket;
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
    pair.map_err(|errno| Error::wrap(Kind::Io, "cannot make a socket", errno))
}

/// Lets programs that are started from here have a descriptor.
///
/// # Errors
///
/// The descriptor is not open.
pub fn inherit(descriptor: BorrowedFd<'_>) -> Result<()> {
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))
        .map(drop)
        .map_err(|errno| Error::wrap(Kind::Io, "cannot hand on a descriptor", errno))
}

fn understood(message: &[u8]) -> Result<Request> {
    Request::decode(message).map_err(|error| {
        Error::wrap(
            Kind::Protocol,
            "swrk: a request cannot be understood",
            error,
        )
    })
}

/// How the child `pid` ended, as `waitpid(2)` tells it.
fn wait_status(pid: u32) -> Result<i32> {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(0));
    if pid.as_raw() <= 0 {
        return Err(Error::new(Kind::Usage, "swrk: WAIT_PID names no process"));
    }
    match waitpid(pid, None) {
        Ok(WaitStatus::Exited(_, code)) => Ok(code << 8),
        Ok(WaitStatus::Signaled(_, signal, dumped)) => Ok(signal as i32 | i32::from(dumped) << 7),
        Ok(_) => Err(Error::new(
            Kind::Io,
            format!("swrk: pid {pid} was stopped or continued instead of ending"),
        )),
        Err(errno) => {
            let text = format!("swrk: cannot wait for pid {pid}");
            Err(Error::wrap(Kind::Usage, text, errno))
        }
    }
}
