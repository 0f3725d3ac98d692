//! The program `criu` that stands before the real one in PATH. Page servers and lazy-pages daemons are pageferry's;
//! everything else is handed to the real CRIU as it is.
//!
//! ```text
//! criu page-server ...     -> page-server ...
//! criu lazy-pages ...      -> lazy-client ...
//! criu swrk FD, service    -> PAGE_SERVER, PAGE_SERVER_CHLD: page-server; all else: the real criu swrk
//! criu pre-dump, PRE_DUMP  -> a dump that leaves the processes running, where dirty pages cannot be tracked
//! criu ...                 -> the real criu ...
//! ```
//!
//! The real CRIU takes this process's place wherever it can (exec, with the request still in the socket),
//! so that pids, descriptors, notifications and credentials are those of a machine without this program.
//!
//! It is a library so that the `pageferry` binary can be this program too: packages install one file for all programs.

mod config;
mod conversation;
mod emulation;
mod programs;
mod relay;
mod service;

use std::env::args_os;
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use pageferry::daemon::command_line::words::{action, parts};
use pageferry::error::Result;

use config::Config;
use programs::Programs;

/// Runs with the arguments of this process, to its end.
pub fn run_program() -> ExitCode {
    pageferry::daemon::end_on_panic();
    let argv: Vec<OsString> = args_os().skip(1).collect();
    match run(argv) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut argv: Vec<OsString>) -> Result<ExitCode> {
    let config = Config::load(&mut argv)?;
    let programs = Programs::find(&config)?;
    let parts = parts(&argv);
    let word = action(&parts).and_then(OsStr::to_str);
    match word {
        Some("page-server") => {
            let mut options = Vec::new();
            if emulation::stores_differences(&parts) && config.emulates_pre_dump() {
                options.push("--dedup-content".into());
            }
            programs.become_page_server(&[options, argv].concat())
        }
        Some("lazy-pages") => programs.become_lazy_client(&argv),
        Some("swrk") => conversation::swrk(&parts, &argv, &config, &programs),
        Some("service") => service::run(&parts),
        Some("dump" | "pre-dump") if emulation::concerns(&parts) && config.emulates_pre_dump() => {
            emulation::command_line(&parts, &programs)
        }
        Some("check") if config.emulates_pre_dump() => emulation::check(&parts, &programs),
        _ => programs.become_criu(&argv),
    }
}
