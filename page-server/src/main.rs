//! Wiring and exit codes.
fn main() {}
