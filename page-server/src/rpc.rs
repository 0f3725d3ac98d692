//! `page-server swrk FD`: one request over an inherited socket says what the command line says
//! otherwise, as go-criu and P.Haul ask CRIU.
//!
//! ```text
//! client --request--> swrk --fork--> page server            listens before the answer is sent
//! client <--answer--- swrk                                  port and pid
//! client --WAIT_PID-> swrk                                  if the request said keep_open
//! ```

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use pageferry::criu::rpc::{Options, Request, Response, ServerInfo, kind};
use pageferry::daemon::command_line::{Parsed, parse_with};
use pageferry::daemon::settings::{Environment, RequestedSettings};
use pageferry::daemon::swrk::Client;
use pageferry::daemon::{Daemon, Forked, WaitingChild, fork_waiting};
use pageferry::error::{Error, Kind, Result};

use crate::args::{ACTIONS, Args};

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

impl Rpc {
    /// Waits for the request over descriptor `number`, and reads the command line `argv` anew with what
    /// it says. A request that cannot be met is answered so.
    pub(crate) fn accept(
        number: RawFd,
        argv: &[OsString],
        configured: &Args,
    ) -> Result<(Rpc, Parsed<Args>)> {
        let client = Client::inherited(number)?;
        let request = client.receive()?.ok_or_else(|| {
            Error::new(Kind::PeerLost, "swrk: the client hung up without a request")
        })?;
        match parse(&client, &request, argv, configured) {
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
                    true => serve_waits(&self.client),
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
        server.release()?;
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

    /// Tells the client that no server was started, unless one was reported to it.
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

/// Answers how children ended, until the client hangs up.
fn serve_waits(client: &Client) -> Result<()> {
    while let Some(request) = client.receive()? {
        if request.kind == kind::WAIT_PID {
            client.answer_wait(&request)?;
            continue;
        }
        let text = format!(
            "swrk: request {} is not one that a page server answers",
            request.kind
        );
        client.send(&Response::failed(answer_kind(request.kind), text))?;
    }
    Ok(())
}

fn parse(
    client: &Client,
    request: &Request,
    argv: &[OsString],
    configured: &Args,
) -> Result<Parsed<Args>> {
    let settings = settings(client, request, configured)?;
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
fn settings(client: &Client, request: &Request, configured: &Args) -> Result<RequestedSettings> {
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
    match images_dir(client, &options) {
        Ok(dir) => set(words, "images-dir", dir),
        // The configuration file may name it.
        Err(_) if options.config_file.is_some() => settings.replaced.push("images-dir"),
        Err(error) => return Err(error),
    }
    if let Some(number) = options.work_dir_fd.filter(|number| *number >= 0) {
        set(words, "work-dir", client.descriptor_path(number)?);
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
            .map_err(|_| Error::new(Kind::Usage, format!("swrk: {port} is not a port")))?;
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

fn images_dir(client: &Client, options: &Options) -> Result<PathBuf> {
    match (&options.images_dir, options.images_dir_fd) {
        (_, number) if number >= 0 => client.descriptor_path(number),
        (Some(dir), _) => Ok(PathBuf::from(dir)),
        (None, _) => Err(no_images_dir()),
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
