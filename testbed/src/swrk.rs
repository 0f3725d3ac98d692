//! CRIU's remote procedure calls, as go-criu and P.Haul make them: `criu swrk FD`, and one request
//! for a page server over the socket.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use anyhow::{Result, bail, ensure};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use pageferry::criu::rpc::{Request, Response};
use prost::Message;

use crate::process::Spawned;
use crate::wait::GENEROUS;

/// Bytes of an answer: more than any of them has.
const ANSWER_BYTES: usize = 4096;

/// A started `swrk`, and the client's end of its socket.
#[derive(Debug)]
pub struct Swrk {
    /// Its process.
    pub process: Spawned,
    socket: OwnedFd,
}

impl Swrk {
    /// Starts `program swrk`, which is CRIU or in its place.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut program: Command) -> Result<Swrk> {
        // Servers outlive their starter, and come to this process then.
        set_child_subreaper(true)?;
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags)?;
        program.args(["swrk", "1"]).stdout(theirs);
        Ok(Swrk {
            process: Spawned::start("swrk", &mut program, None)?,
            socket: ours,
        })
    }

    /// Sends bytes that need be no request.
    ///
    /// # Errors
    /// It has hung up.
    pub fn send(&self, message: &[u8]) -> Result<()> {
        send(self.socket.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// Sends a request and waits for the answer.
    ///
    /// # Errors
    /// There is none, or it cannot be understood.
    pub fn ask(&self, request: &Request) -> Result<Response> {
        self.send(&request.encode_to_vec())?;
        let mut answer = [0; ANSWER_BYTES];
        let bytes = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        ensure!(bytes > 0, "swrk hung up without an answer");
        Ok(Response::decode(&answer[..bytes])?)
    }

    /// Hangs up, and waits until it has ended with success.
    ///
    /// # Errors
    /// It fails, or runs on.
    pub fn finish(mut self) -> Result<()> {
        drop(self.socket);
        self.process.succeed(GENEROUS).map(drop)
    }
}

/// The parent of a process.
///
/// # Errors
/// There is no such process.
pub fn parent_of(pid: i32) -> Result<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may hold anything: the state, then the parent.
    let field = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(1));
    match field {
        Some(parent) => Ok(parent.parse()?),
        None => bail!("/proc/{pid}/stat: {stat}"),
    }
}
