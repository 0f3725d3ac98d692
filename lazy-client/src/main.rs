//! The program `lazy-client`: see the library of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    lazy_client::run_program()
}
