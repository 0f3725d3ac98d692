//! What the fuzzers do with their bytes, as plain functions: libFuzzer calls them with bytes that it made up, and
//! `cargo test` with the committed corpora.
//!
//! ```text
//! src/main.rs, under libFuzzer ──> run(bytes)     of the target that the environment names: `cargo xtask fuzz`
//! tests/corpora.rs             ──> run(bytes)     each file of corpus/NAME, and each seed
//! ```
//!
//! A target returns when the code under test has said yes or no, and panics when it broke a promise: a number beyond
//! its limit, an answer that depends on where the bytes were cut, something read back that is not what was written.
//!
//! Each target has a canary: a bug behind as much of its input as an honest peer would need to get there. It is there
//! only when the fuzzer is told to plant it. A fuzzer that does not find it cannot find anything.

mod archives;
mod commands;
mod criu;
mod documents;
mod events;
mod ferry;
mod file_trees;
mod frames;
mod images;
mod known_hashes;
mod planner;
mod records;
mod scratch;
mod sessions;
mod tls;
mod working_sets;

use std::sync::atomic::{AtomicBool, Ordering};

/// Names the target of the fuzzer.
pub const TARGET_VARIABLE: &str = "FUZZ_TARGET";

/// Tells the fuzzer to plant the bugs, if it is there.
pub const CANARY_VARIABLE: &str = "FUZZ_CANARY";

static CANARIES: AtomicBool = AtomicBool::new(false);

/// A function that is given bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus's directory.
    pub name: &'static str,
    /// What it does. It panics where a promise is broken.
    pub run: fn(&[u8]),
    /// Honest input, which the corpus begins with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    target("deframer", criu::deframer, criu::stream_seeds),
    target("receive", criu::receive, criu::stream_seeds),
    target("serve", criu::serve, criu::request_seeds),
    target("fetch", criu::fetch, criu::answer_seeds),
    target("lazy_socket", records::lazy_socket, records::lazy_seeds),
    target("rpc", records::rpc, records::rpc_seeds),
    target("pagemap", images::pagemap, images::pagemap_seeds),
    target("messages", images::messages, images::message_seeds),
    target("chain", images::chain, images::chain_seeds),
    target("ferry_frames", ferry::frames, ferry::frame_seeds),
    target("ferry_batch", ferry::batch, ferry::batch_seeds),
    target("ferry_messages", ferry::messages, ferry::message_seeds),
    target("ferry_receiver", sessions::receiver, ferry::session_seeds),
    target("ferry_sender", sessions::sender, ferry::sender_seeds),
    target("ferry_postcopy", sessions::postcopy, ferry::session_seeds),
    target(
        "known_hashes",
        known_hashes::known_hashes,
        known_hashes::seeds,
    ),
    target("ferry_link", sessions::link, sessions::link_seeds),
    target("planner", planner::planner, planner::seeds),
    target("drain", planner::drain, planner::seeds),
    target("config_file", commands::config_file, commands::file_seeds),
    target("command_line", commands::command_line, commands::line_seeds),
    target("migration", records::migration, records::migration_seeds),
    target("events", events::events, events::seeds),
    target("trace", records::trace, records::trace_seeds),
    target("working_set", working_sets::decode, working_sets::seeds),
    target("tls", tls::records, tls::seeds),
    target(
        "image_stream",
        archives::image_stream,
        archives::stream_seeds,
    ),
    target("archive", archives::container, archives::container_seeds),
    target(
        "file_operations",
        file_trees::operations,
        file_trees::operation_seeds,
    ),
    target("file_index", file_trees::index, file_trees::index_seeds),
    target("oci_layout", documents::oci_layout, documents::layout_seeds),
    target("service_log", documents::service_log, documents::log_seeds),
    target("rules", documents::rules, documents::rule_seeds),
];

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds }
}

/// The target that [`TARGET_VARIABLE`] names, with its canary if [`CANARY_VARIABLE`] says so: for the fuzzer alone.
///
/// # Panics
///
/// There is no such target.
pub fn chosen() -> &'static Target {
    let planted = std::env::var_os(CANARY_VARIABLE).is_some();
    CANARIES.store(planted, Ordering::Relaxed);
    let name = std::env::var(TARGET_VARIABLE).unwrap_or_default();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.expect("FUZZ_TARGET names a target")
}

/// The planted bug of a target.
fn canary(reached: bool) {
    let planted = reached && CANARIES.load(Ordering::Relaxed);
    assert!(!planted, "the canary is found");
}

/// Takes `COUNT` bytes off the front of `data`; zeros stand for what is missing.
fn take<const COUNT: usize>(data: &mut &[u8]) -> [u8; COUNT] {
    let mut out = [0; COUNT];
    let there = COUNT.min(data.len());
    out[..there].copy_from_slice(&data[..there]);
    *data = &data[there..];
    out
}

/// Takes one byte off the front of `data`, or zero.
fn byte(data: &mut &[u8]) -> u8 {
    let [byte] = take(data);
    byte
}
