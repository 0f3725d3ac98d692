//! The `pageferry` command: see the library of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    pageferry_cli::run()
}
