//! `page-server swrk FD`: one request over an inherited socket says what the command line says
//! otherwise, as go-criu and P.Haul ask CRIU.
//!
//! ```text
//! client --request--> swrk --fork--> page server            listens before the answer is sent
//! client <--answer--- swrk                                  port and pid
//! client --WAIT_PID-> swrk                                  if the request said keep_open
//! ```

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{MsgFlags, getsockopt, recv, send, sockopt};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry::criu::rpc::{Options, Request, Response, ServerInfo, kind};
use pageferry::daemon::{Daemon, Forked, WaitingChild, fork_waiting};
use pageferry::engine::io::transport::parse_host;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::RPC_MESSAGE_BYTES_MAX;
use pageferry::sys::process::inherited_descriptor;
use prost::Message;

use crate::args::Args;

/// CRIU's own name for a log without a name, in the work directory.
const LOG_FILE: &str = "criu.log";

/// A client with its request to start a page server.
#[derive(Debug)]
pub(crate) struct Rpc {
    client: Client,
    /// Whether the server is to be a child instead of going to the background.
    child: bool,
    keep_open: bool,
    answered: bool,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    pid: Pid,
}

impl Rpc {
    /// Waits for the request over descriptor `number` and puts what it says into `args`. A request
    /// that cannot be met is answered so.
    pub(crate) fn accept(number: RawFd, args: &mut Args) -> Result<Rpc> {
        let socket = inherited_descriptor(number).map_err(|error| {
            let text = format!("swrk: descriptor {number} is not open");
            Error::wrap(Kind::Usage, text, error)
        })?;
        let credentials = getsockopt(&socket, sockopt::PeerCredentials);
        let credentials = credentials.map_err(|errno| {
            let text = format!("swrk: descriptor {number} is no local socket");
            Error::wrap(Kind::Usage, text, errno)
        })?;
        let client = Client {
            socket,
            pid: Pid::from_raw(credentials.pid()),
        };
        let request = client.receive()?.ok_or_else(|| {
            Error::new(Kind::PeerLost, "swrk: the client hung up without a request")
        })?;
        match client.apply(&request, args) {
            Ok(()) => Ok(Rpc {
                child: request.kind == kind::PAGE_SERVER_CHLD,
                keep_open: request.keep_open.unwrap_or(false),
                answered: false,
                client,
            }),
            Err(error) => {
                client.send(&Response::failed(answer_kind(request.kind), &error))?;
                Err(error)
            }
        }
    }

    /// The server listens: forks it and answers with its `port` and pid. Returns in the server alone.
    pub(crate) fn listening(&mut self, daemon: &mut Daemon, port: u16) -> Result<()> {
        let kind = match self.child {
            true => Forked::Child,
            false => Forked::Background,
        };
        match fork_waiting(kind)? {
            None => {
                self.answered = true;
                daemon.ready()
            }
            Some(server) => {
                self.answer(server, port)?;
                // Never back from here: what the server holds is not this process's to clean up.
                let ended = match self.keep_open {
                    true => self.client.serve_waits(),
                    false => Ok(()),
                };
                if let Err(error) = &ended {
                    eprintln!("error: {error}");
                }
                std::process::exit(i32::from(ended.is_err()))
            }
        }
    }

    fn answer(&mut self, server: WaitingChild, port: u16) -> Result<()> {
        let pid = server.pid().as_raw();
        server.let_go()?;
        self.answered = true;
        self.client.send(&Response {
            kind: kind::PAGE_SERVER,
            success: true,
            server: Some(ServerInfo {
                port: Some(port.into()),
                pid: Some(pid),
                ..ServerInfo::default()
            }),
            ..Response::default()
        })
    }

    /// Tells the client that no server was started, if it has not heard of one.
    pub(crate) fn refuse(&mut self, why: &str) {
        if !std::mem::replace(&mut self.answered, true)
            && let Err(error) = self.client.send(&Response::failed(kind::PAGE_SERVER, why))
        {
            eprintln!("error: {error}");
        }
    }
}

/// CRIU answers both ways to start a page server alike.
fn answer_kind(request: i32) -> i32 {
    match request {
        kind::PAGE_SERVER_CHLD => kind::PAGE_SERVER,
        kind::PAGE_SERVER | kind::WAIT_PID => request,
        _ => kind::EMPTY,
    }
}

impl Client {
    /// The next request; `None` when the client has hung up.
    fn receive(&self) -> Result<Option<Request>> {
        let mut message = [0; RPC_MESSAGE_BYTES_MAX];
        let flags = MsgFlags::MSG_TRUNC;
        let bytes = recv(self.socket.as_raw_fd(), &mut message, flags);
        let bytes = bytes.map_err(|errno| {
            Error::wrap(Kind::PeerLost, "swrk: cannot receive a request", errno)
        })?;
        if bytes == 0 {
            return Ok(None);
        }
        let message = message.get(..bytes).ok_or_else(|| {
            let text = format!("swrk: a request of {bytes} bytes is longer than any of CRIU's");
            Error::new(Kind::Protocol, text)
        })?;
        let request = Request::decode(message);
        request.map(Some).map_err(|error| {
            Error::wrap(
                Kind::Protocol,
                "swrk: a request cannot be understood",
                error,
            )
        })
    }

    fn send(&self, response: &Response) -> Result<()> {
        let message = response.encode_to_vec();
        let sent = send(self.socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
        sent.map(|_| ())
            .map_err(|errno| Error::wrap(Kind::PeerLost, "swrk: cannot answer", errno))
    }

    /// Answers how children ended, until the client hangs up.
    fn serve_waits(&self) -> Result<()> {
        while let Some(request) = self.receive()? {
            let ended = match request.kind {
                kind::WAIT_PID => wait_status(request.pid.unwrap_or(0)),
                other => Err(Error::new(
                    Kind::Unsupported,
                    format!("swrk: request {other} is not one that a page server answers"),
                )),
            };
            self.send(&match ended {
                Ok(status) => Response {
                    kind: kind::WAIT_PID,
                    success: true,
                    status: Some(status),
                    ..Response::default()
                },
                Err(error) => Response::failed(answer_kind(request.kind), error),
            })?;
        }
        Ok(())
    }

    /// Puts what `request` says into `args`.
    fn apply(&self, request: &Request, args: &mut Args) -> Result<()> {
        if !matches!(request.kind, kind::PAGE_SERVER | kind::PAGE_SERVER_CHLD) {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "swrk: request {} is for CRIU itself: a page server starts page servers",
                    request.kind
                ),
            ));
        }
        let options = request.options.clone().unwrap_or(Options {
            images_dir_fd: -1,
            ..Options::default()
        });
        args.common.images_dir = self.images_dir(&options)?;
        if let Some(number) = options.work_dir_fd.filter(|number| *number >= 0) {
            args.common.work_dir = Some(self.descriptor_path(number)?);
        }
        args.common.log_file = log_file(&options)?;
        if let Some(level) = options.log_level {
            args.common.verbosity = u32::try_from(level).unwrap_or(0);
        }
        if let Some(server) = options.server {
            if let Some(port) = server.port {
                let port = u16::try_from(port)
                    .map_err(|_| Error::new(Kind::Usage, format!("swrk: {port} is no port")))?;
                args.common.port = Some(port);
            }
            if let Some(address) = server.address.filter(|address| !address.is_empty()) {
                let host = parse_host(&address).map_err(|problem| {
                    Error::new(
                        Kind::Usage,
                        format!("swrk: the address of the request: {problem}"),
                    )
                })?;
                args.common.address = Some(host);
            }
            args.ps_socket = server.socket_fd.or(args.ps_socket);
        }
        args.lazy_pages |= options.lazy_pages.unwrap_or(false);
        args.auto_dedup |= options.auto_dedup.unwrap_or(false);
        let tls = &mut args.tls;
        tls.tls |= options.tls.unwrap_or(false);
        tls.tls_no_cn_verify |= options.tls_no_cn_verify.unwrap_or(false);
        let path = |given: Option<String>| given.map(PathBuf::from);
        args.prev_images_dir = path(options.parent_img).or(args.prev_images_dir.take());
        tls.tls_cacert = path(options.tls_cacert).or(tls.tls_cacert.take());
        tls.tls_cacrl = path(options.tls_cacrl).or(tls.tls_cacrl.take());
        tls.tls_cert = path(options.tls_cert).or(tls.tls_cert.take());
        tls.tls_key = path(options.tls_key).or(tls.tls_key.take());
        Ok(())
    }

    fn images_dir(&self, options: &Options) -> Result<PathBuf> {
        match (&options.images_dir, options.images_dir_fd) {
            (_, number) if number >= 0 => self.descriptor_path(number),
            (Some(dir), _) => Ok(PathBuf::from(dir)),
            (None, _) => Err(Error::new(
                Kind::Usage,
                "swrk: the request names no images directory",
            )),
        }
    }

    /// What descriptor `number` of the client is open at.
    fn descriptor_path(&self, number: i32) -> Result<PathBuf> {
        let link = PathBuf::from(format!("/proc/{}/fd/{number}", self.pid));
        fs::read_link(&link).map_err(|error| Error::file("follow", &link, error))
    }
}

/// The log's name, in the work directory.
fn log_file(options: &Options) -> Result<Option<PathBuf>> {
    match &options.log_file {
        Some(name) if name.contains('/') => Err(Error::new(
            Kind::Usage,
            format!("swrk: the log file {name} may not lie outside the work directory"),
        )),
        Some(name) => Ok(Some(name.into())),
        None if options.log_to_stderr == Some(true) => Ok(None),
        None => Ok(Some(LOG_FILE.into())),
    }
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
        Ok(other) => Err(Error::new(
            Kind::Io,
            format!("swrk: pid {pid} has not ended: {other:?}"),
        )),
        Err(errno) => {
            let text = format!("swrk: cannot wait for pid {pid}");
            Err(Error::wrap(Kind::Usage, text, errno))
        }
    }
}
