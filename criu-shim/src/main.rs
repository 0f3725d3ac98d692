//! The program `criu` that stands before the real one: see the library of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    criu_shim::run_program()
}
