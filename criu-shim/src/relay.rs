//! One request to a real CRIU on behalf of a client: messages and descriptors pass both ways, until the
//! answer.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Child;

use pageferry::criu::rpc::kind;
use pageferry::criu::rpc_fields::{Fields, response};
use pageferry::daemon::swrk::{self, SwrkMessage, inherit};
use pageferry::error::{Error, Kind, Result};

use crate::programs::Programs;

/// A real CRIU that answers one request.
pub(crate) struct RealCriu {
    process: Child,
    socket: OwnedFd,
}

impl RealCriu {
    pub(crate) fn start(programs: &Programs, options: &[OsString]) -> Result<RealCriu> {
        let (ours, theirs) = swrk::pair()?;
        inherit(theirs.as_fd())?;
        let number = theirs.as_raw_fd().to_string();
        let mut command = programs.criu();
        let process = command.args(options).args(["swrk", &number]).spawn();
        let process = process
            .map_err(|error| Error::wrap(Kind::Usage, "cannot start the real criu", error))?;
        Ok(RealCriu {
            process,
            socket: ours,
        })
    }

    /// Asks `request` for the client at `client`, to whom notifications and the answer go, changed by
    /// `change`. Returns whether the answer says success.
    pub(crate) fn ask(
        mut self,
        request: Vec<u8>,
        client: BorrowedFd<'_>,
        change: impl Fn(&mut Fields),
    ) -> Result<bool> {
        let asked = self.converse(request, client, change);
        // It would wait for further requests.
        drop(self.socket);
        let _ = self.process.wait();
        asked
    }

    fn converse(
        &mut self,
        request: Vec<u8>,
        client: BorrowedFd<'_>,
        change: impl Fn(&mut Fields),
    ) -> Result<bool> {
        let request = SwrkMessage {
            bytes: request,
            descriptor: None,
        };
        request.send(self.socket.as_fd())?;
        loop {
            let Some(mut message) = SwrkMessage::receive(self.socket.as_fd())? else {
                // As without this program the client sees that nobody is there any more.
                return Err(Error::new(
                    Kind::PeerLost,
                    "the real criu ended without an answer",
                ));
            };
            let mut fields = message.fields()?;
            if fields.int(response::KIND) == Some(kind::NOTIFY) {
                message.send(client)?;
                let Some(reply) = SwrkMessage::receive(client)? else {
                    return Err(Error::new(
                        Kind::PeerLost,
                        "the client hung up within a request",
                    ));
                };
                reply.send(self.socket.as_fd())?;
                continue;
            }
            change(&mut fields);
            message.bytes = fields.encode();
            message.send(client)?;
            return Ok(fields.is_on(response::SUCCESS));
        }
    }
}
