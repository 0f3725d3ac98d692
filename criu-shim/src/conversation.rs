//! `criu swrk FD`: who answers each request.
//!
//! | request | who answers |
//! |---|---|
//! | PAGE_SERVER, PAGE_SERVER_CHLD | page-server: takes this process's place, or is asked once if more requests follow |
//! | WAIT_PID | this process: such servers come to it when who started them has ended |
//! | PRE_DUMP, SINGLE_PRE_DUMP, and DUMP with a parent | where pre-dumps are emulated: a real CRIU, asked otherwise |
//! | VERSION, FEATURE_CHECK, CPUINFO_* before further requests | a real CRIU, by way of this process |
//! | all else | the real CRIU: takes this process's place, and reads the request itself |

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::socket::MsgFlags;
use pageferry::criu::rpc::{Request, Response, kind};
use pageferry::criu::rpc_fields::{FEATURE_MEM_TRACK, Fields, options, request, response};
use pageferry::daemon::command_line::words::Part;
use pageferry::daemon::swrk::{Client, inherit};
use pageferry::error::{Error, Kind, Result};

use crate::config::Config;
use crate::emulation::{self, RequestResources};
use crate::programs::Programs;
use crate::relay::RealCriu;

/// A client and what is needed to answer it.
pub(crate) struct Conversation<'a> {
    pub(crate) client: Client,
    pub(crate) programs: &'a Programs,
    pub(crate) config: &'a Config,
    /// Options for a real CRIU and for page-server, as they were given for swrk or the service.
    pub(crate) options: Vec<OsString>,
    /// Whether the client came to a service, which may not do all that swrk may.
    pub(crate) is_service: bool,
}

/// Answers the client behind the descriptor on the command line.
pub(crate) fn swrk(
    parts: &[Part],
    argv: &[OsString],
    config: &Config,
    programs: &Programs,
) -> Result<ExitCode> {
    let mut words = parts.iter().filter(|part| part.is_word()).skip(1);
    let number = words
        .next()
        .and_then(|part| part.words[0].to_str()?.parse().ok());
    let Some(number) = number else {
        // It says what is wrong.
        return programs.become_criu(argv);
    };
    let given = parts.iter().filter(|part| !part.is_word());
    Conversation {
        client: Client::inherited(number)?,
        programs,
        config,
        options: given.flat_map(|part| part.words.clone()).collect(),
        is_service: config.is_for_service,
    }
    .hold()
}

impl Conversation<'_> {
    /// Answers until the last request.
    pub(crate) fn hold(self) -> Result<ExitCode> {
        // Page servers outlive who starts them, and are waited for here.
        set_child_subreaper(true)
            .map_err(|errno| Error::wrap(Kind::Io, "cannot adopt page servers", errno))?;
        loop {
            let Ok(asked) = self.client.peek() else {
                // Not understood here, perhaps by the real one.
                return self.become_criu();
            };
            let Some(asked) = asked else {
                return Ok(ExitCode::SUCCESS);
            };
            let more = asked.keep_open.unwrap_or(false);
            match asked.kind {
                kind::PAGE_SERVER | kind::PAGE_SERVER_CHLD if more => {
                    self.ask_page_server(&asked)?;
                }
                kind::PAGE_SERVER | kind::PAGE_SERVER_CHLD => {
                    return self.become_page_server(&asked);
                }
                kind::WAIT_PID => {
                    self.client.receive()?;
                    self.client.answer_wait(&asked)?;
                    if !more {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                kind::PRE_DUMP | kind::SINGLE_PRE_DUMP | kind::DUMP if self.is_emulated()? => {
                    let done = self.emulate(asked.kind)?;
                    if !done || asked.kind != kind::PRE_DUMP {
                        return Ok(ExitCode::from(u8::from(!done)));
                    }
                }
                kind::FEATURE_CHECK if self.config.emulates_pre_dump() => {
                    self.relay()?;
                    if !more {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                kind::DUMP | kind::RESTORE => return self.become_criu(),
                _ if more => self.relay()?,
                _ => return self.become_criu(),
            }
        }
    }

    fn page_server_words(&self, asked: &Request, more: bool) -> Result<Vec<OsString>> {
        inherit(self.client.as_fd())?;
        let mut words = self.options.clone();
        let differs = asked.options.as_ref().is_some_and(|options| {
            options.parent_img.is_some() && options.lazy_pages != Some(true)
        });
        if differs && self.config.emulates_pre_dump() {
            words.push("--dedup-content".into());
        }
        if more {
            words.push("--one-request".into());
        }
        words.push("swrk".into());
        words.push(self.client.as_fd().as_raw_fd().to_string().into());
        Ok(words)
    }

    /// Lets page-server answer this request, which it takes from the socket.
    fn ask_page_server(&self, asked: &Request) -> Result<()> {
        if self.refuses()? {
            return Ok(());
        }
        let words = self.page_server_words(asked, true)?;
        let ended = self.programs.page_server().args(words).status();
        // The client was told already that it could not be met.
        ended
            .map(drop)
            .map_err(|error| Error::wrap(Kind::Usage, "cannot start page-server", error))
    }

    fn become_page_server(&self, asked: &Request) -> Result<ExitCode> {
        if self.refuses()? {
            return Ok(ExitCode::FAILURE);
        }
        let words = self.page_server_words(asked, false)?;
        self.programs.become_page_server(&words)
    }

    fn become_criu(&self) -> Result<ExitCode> {
        if self.refuses()? {
            return Ok(ExitCode::FAILURE);
        }
        inherit(self.client.as_fd())?;
        let number = self.client.as_fd().as_raw_fd().to_string();
        let words = [&self.options[..], &["swrk".into(), number.into()]].concat();
        self.programs.become_criu(&words)
    }

    /// The fields of the next request, which is still to be received.
    fn next_fields(&self) -> Result<Fields> {
        let message = self.client.receive_bytes(MsgFlags::MSG_PEEK)?;
        understood(&message.unwrap_or_default())
    }

    /// Answers what a service may not do, since anybody may be its client: to name descriptors of its own.
    fn refuses(&self) -> Result<bool> {
        if !self.is_service {
            return Ok(false);
        }
        let fields = self.next_fields()?;
        let given = fields.message(request::OPTIONS).map_err(damaged)?;
        let server = given.message(options::PAGE_SERVER).map_err(damaged)?;
        let of_swrk = [options::RST_SIBLING, options::INHERIT_FD].iter();
        let refused = of_swrk.into_iter().any(|field| given.get(*field).is_some())
            || server.get(options::PAGE_SERVER_FD).is_some();
        if refused {
            self.client.receive()?;
            let kind = fields.int(request::KIND).unwrap_or_default();
            let text = "rst_sibling, inherit_fd and descriptors are not allowed in a service";
            self.client.send(&Response::failed(kind, text))?;
        }
        Ok(refused)
    }

    /// Whether the next request is one that the real CRIU cannot meet without dirty tracking.
    fn is_emulated(&self) -> Result<bool> {
        if !self.config.emulates_pre_dump() {
            return Ok(false);
        }
        let fields = self.next_fields()?;
        let given = fields.message(request::OPTIONS).map_err(damaged)?;
        let is_dump = fields.int(request::KIND) == Some(kind::DUMP);
        Ok(!is_dump || given.is_on(options::TRACK_MEM) || given.get(options::PARENT_IMG).is_some())
    }

    /// Meets a request for a pre-dump, or for a dump after one. Returns whether that was done.
    fn emulate(&self, kind: i32) -> Result<bool> {
        if self.refuses()? {
            return Ok(false);
        }
        let Some(message) = self.client.receive_bytes(MsgFlags::empty())? else {
            return Ok(false);
        };
        let mut fields = understood(&message)?;
        let given = fields.message(request::OPTIONS).map_err(damaged)?;
        let mut resources = RequestResources::default();
        let changed = emulation::changed(kind, &given, &self.client, self.programs, &mut resources);
        let changed = match changed {
            Ok(changed) => changed,
            Err(error) => {
                self.client.send(&Response::failed(kind, &error))?;
                return Err(error);
            }
        };
        fields.set(request::KIND, number(kind::DUMP));
        fields.set_message(request::OPTIONS, &changed);
        let real = RealCriu::start(self.programs, &self.options)?;
        resources.close_handed_on();
        let done = real.ask(fields.encode(), self.client.as_fd(), |answer| {
            if kind != kind::DUMP {
                answer.set(response::KIND, number(kind));
                answer.remove(response::DUMP);
            }
        })?;
        resources.finish(done)?;
        Ok(done)
    }

    /// Hands the next request to a real CRIU.
    fn relay(&self) -> Result<()> {
        let Some(message) = self.client.receive_bytes(MsgFlags::empty())? else {
            return Ok(());
        };
        let mut fields = understood(&message)?;
        let mut given = fields.message(request::OPTIONS).map_err(damaged)?;
        let mut resources = RequestResources::default();
        if fields.get(request::OPTIONS).is_some() {
            resources.descriptors(&mut given, &self.client)?;
            fields.set_message(request::OPTIONS, &given);
        }
        let wanted = fields.message(request::FEATURES).map_err(damaged)?;
        let tracking = wanted.is_on(FEATURE_MEM_TRACK) && self.config.emulates_pre_dump();
        let real = RealCriu::start(self.programs, &self.options)?;
        let done = real.ask(fields.encode(), self.client.as_fd(), |answer| {
            // What the tracking is wanted for is done here in another way.
            if tracking && let Ok(mut features) = answer.message(response::FEATURES) {
                features.set(FEATURE_MEM_TRACK, 1);
                answer.set_message(response::FEATURES, &features);
            }
        });
        done.map(drop)
    }
}

fn number(kind: i32) -> u64 {
    u64::from(kind.unsigned_abs())
}

fn understood(message: &[u8]) -> Result<Fields> {
    Fields::decode(message).map_err(damaged)
}

fn damaged(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(
        Kind::Protocol,
        "swrk: a request cannot be understood",
        error,
    )
}
