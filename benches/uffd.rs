//! What this kernel's mechanisms around userfaultfd cost: docs/laboratory.md.
//!
//! `cargo bench --bench uffd [-- WORD]`, or `cargo xtask bench kernel` for JSON and plots.

use std::process::ExitCode;

fn main() -> ExitCode {
    testbed::laboratory::main()
}
