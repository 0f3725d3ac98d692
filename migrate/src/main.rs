//! The `pageferry` command: see the library of this package.
//!
//! Under the name `page-server`, `lazy-client` or `criu`, by a link, it is that program: packages install one file for
//! all four.

use std::env::args_os;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let name = args_os().next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(|name| name.to_str()) {
        Some("page-server") => page_server::run_program(),
        Some("lazy-client") => lazy_client::run_program(),
        Some("criu") => criu_shim::run_program(),
        _ => pageferry_cli::run(),
    }
}
