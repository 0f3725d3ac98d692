//! `page-server swrk FD`: one request over an inherited socket says what the command line says
//! otherwise, as go-criu and P.Haul ask CRIU.
//!
//! ```text
//! client --request--> swrk --fork--> page server            listens before the answer is sent
//! client <--answer--- swrk                                  port and pid
//! client --WAIT_PID-> swrk                                  if the request said keep_open
//! ```

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{MsgFlags, getsockopt, recv, send, sockopt};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry::criu::rpc::{Options, Request, Response, ServerInfo, kind};
use pageferry::daemon::command_line::{Parsed, parse_with};
use pageferry::daemon::settings::{Environment, RequestedSettings};
use pageferry::daemon::{Daemon, Forked, WaitingChild, fork_waiting};
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::RPC_MESSAGE_BYTES_MAX;
use pageferry::sys::process::inherited_descriptor;
use prost::Message;

use crate::ACTIONS;
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
    /// Waits for the request over descriptor `number`, and reads the command line `argv` anew with what
    /// it says. A request that cannot be met is answered so.
    pub(crate) fn accept(
        number: RawFd,
        argv: &[OsString],
        configured: &Args,
    ) -> Result<(Rpc, Parsed<Args>)> {
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
        match client.parse(&request, argv, configured) {
            Ok(parsed) => {
                let rpc = Rpc {
                    child: request.kind == kind::PAGE_SERVER_CHLD,
                    keep_open: request.keep_open.unwrap_or(false) && !configured.one_request,
                    answered: false,
                    client,
                };
                Ok((rpc, parsed))
            }
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

    fn parse(
        &self,
        request: &Request,
        argv: &[OsString],
        configured: &Args,
    ) -> Result<Parsed<Args>> {
        let settings = self.settings(request, configured)?;
        let names_no_dir = settings.replaced.contains(&"images-dir");
        let environment = Environment::of_process();
        let parsed = parse_with::<Args>(ACTIONS, argv.to_vec(), &environment, &settings);
        let parsed = parsed
            .map_err(|error| Error::wrap(Kind::Usage, "swrk: the request cannot be met", error))?;
        if names_no_dir && parsed.args.common.images_dir == Path::new(".") {
            return Err(no_images_dir());
        }
        Ok(parsed)
    }

    /// What `request` says, as words of a command line; `configured` is what was said before.
    fn settings(&self, request: &Request, configured: &Args) -> Result<RequestedSettings> {
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
        let mut settings = RequestedSettings {
            config_file: options.config_file.as_ref().map(PathBuf::from),
            ..RequestedSettings::default()
        };
        let words = &mut settings.words;
        match self.images_dir(&options) {
            Ok(dir) => set(words, "images-dir", dir),
            // The configuration file may name it.
            Err(_) if options.config_file.is_some() => settings.replaced.push("images-dir"),
            Err(error) => return Err(error),
        }
        if let Some(number) = options.work_dir_fd.filter(|number| *number >= 0) {
            set(words, "work-dir", self.descriptor_path(number)?);
        }
        match log_file(&options)? {
            Some(name) => set(words, "log-file", name),
            None if options.log_to_stderr == Some(true) => settings.replaced.push("log-file"),
            None if configured.common.log_file.is_none() => set(words, "log-file", LOG_FILE),
            None => {}
        }
        if let Some(level) = options.log_level {
            set(words, "verbosity", level.max(0).to_string());
        }
        if let Some(server) = &options.server {
            // CRIU takes both from here, also if they are not given.
            settings.replaced.extend(["address", "port"]);
            let port = server.port.unwrap_or(0);
            let port = u16::try_from(port)
                .map_err(|_| Error::new(Kind::Usage, format!("swrk: {port} is no port")))?;
            set(words, "port", port.to_string());
            set_if(words, "address", server.address.as_ref());
            set_if(
                words,
                "ps-socket",
                server.socket_fd.map(|number| number.to_string()),
            );
        }
        switch(words, "lazy-pages", options.lazy_pages);
        switch(words, "auto-dedup", options.auto_dedup);
        // CRIU cannot turn these off by a request.
        switch(words, "tls", options.tls.filter(|on| *on));
        switch(
            words,
            "tls-no-cn-verify",
            options.tls_no_cn_verify.filter(|on| *on),
        );
        set_if(words, "prev-images-dir", options.parent_img.as_ref());
        set_if(words, "tls-cacert", options.tls_cacert.as_ref());
        set_if(words, "tls-cacrl", options.tls_cacrl.as_ref());
        set_if(words, "tls-cert", options.tls_cert.as_ref());
        set_if(words, "tls-key", options.tls_key.as_ref());
        Ok(settings)
    }

    fn images_dir(&self, options: &Options) -> Result<PathBuf> {
        match (&options.images_dir, options.images_dir_fd) {
            (_, number) if number >= 0 => self.descriptor_path(number),
            (Some(dir), _) => Ok(PathBuf::from(dir)),
            (None, _) => Err(no_images_dir()),
        }
    }

    /// What descriptor `number` of the client is open at.
    fn descriptor_path(&self, number: i32) -> Result<PathBuf> {
        let link = PathBuf::from(format!("/proc/{}/fd/{number}", self.pid));
        fs::read_link(&link).map_err(|error| Error::file("follow", &link, error))
    }
}

fn no_images_dir() -> Error {
    Error::new(Kind::Usage, "swrk: the request names no images directory")
}

fn set(words: &mut Vec<OsString>, name: &str, value: impl AsRef<OsStr>) {
    let mut word = OsString::from(format!("--{name}="));
    word.push(value);
    words.push(word);
}

fn set_if(words: &mut Vec<OsString>, name: &str, value: Option<impl AsRef<OsStr>>) {
    if let Some(value) = value {
        set(words, name, value);
    }
}

fn switch(words: &mut Vec<OsString>, name: &str, on: Option<bool>) {
    if let Some(on) = on {
        let no = if on { "" } else { "no-" };
        words.push(format!("--{no}{name}").into());
    }
}

/// The log's name, in the work directory, if the request has one.
fn log_file(options: &Options) -> Result<Option<PathBuf>> {
    match &options.log_file {
        Some(name) if name.contains('/') => Err(Error::new(
            Kind::Usage,
            format!("swrk: the log file {name} may not lie outside the work directory"),
        )),
        Some(name) => Ok(Some(name.into())),
        None => Ok(None),
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
