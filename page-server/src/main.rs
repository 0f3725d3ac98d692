//! The program `page-server`: see the library of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    page_server::run_program()
}
