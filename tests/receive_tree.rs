//! A page server that stores each page of a process tree once: every process has its own memory afterwards, whatever it
//! shares with others, and a dump that ends early leaves nothing.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::{PAGE, Run, check_images, level, naive_memory, with_large_runs, with_true_holes};
use dump_bytes::{dump, send};
use pageferry::criu::header::{Target, Wire};
use pageferry::engine::io::Io;
use pageferry::engine::receive::ingest_modes::IngestOptions;
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::engine::receive::{ReceiveContext, receive_client};
use pageferry::error::Result;
use pageferry::image::store::Sync;
use pageferry::observe::received::Received;
use pageferry::stream::Stream;
use proptest::prelude::*;

const SHMEM: Target = Target::Shmem(9);

/// Receives `bytes`, which come in pieces, into `dir`.
fn receive(
    dir: &Path,
    previous: Option<&str>,
    dedup_content: bool,
    bytes: &[u8],
    piece: usize,
) -> Result<Received> {
    let options = StoreOptions {
        previous: previous.map(Into::into),
        sync: Sync::Close,
        dedup_tree: true,
        ..StoreOptions::new(dir, PAGE)
    };
    let context = ReceiveContext {
        ingest: IngestOptions {
            dedup_content,
            dedup_tree: true,
            ..IngestOptions::default()
        },
        ..ReceiveContext::new(Stores::open(options, None)?, Io::Epoll)
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sender = send(theirs, bytes.to_vec(), piece);
    let (received, result) = receive_client(Stream::plain(ours), &context);
    sender.join().unwrap();
    result.map(|()| received)
}

/// The names in a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Processes of which some have forked, and the next dump of them on top of the first.
    #[test]
    fn a_tree_reads_back_as_sent(
        levels in prop::collection::vec(level(), 3), shmem in level(), later in prop::collection::vec(level(), 3),
        large in 30..200u64, dedup_content: bool, v1: bool,
        piece in prop::sample::select(vec![1000usize, 60_000, 1 << 20]),
    ) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        let alone = |runs: Vec<Run>| with_true_holes(with_large_runs(runs, large), &BTreeMap::new());
        // Two of each.
        let processes: Vec<(Target, Vec<Run>)> = (1..)
            .zip(levels.iter().chain(&levels))
            .map(|(pid, runs)| (Target::Process(pid), alone(runs.clone())))
            .collect();
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        std::fs::create_dir(&new).unwrap();
        let mut targets = processes.clone();
        targets.push((SHMEM, alone(shmem.clone())));
        let bytes = dump(&targets, wire);
        receive(&old, None, false, &bytes, piece).unwrap();
        for (target, runs) in &targets {
            check_images(&old, *target, &naive_memory(std::slice::from_ref(runs)));
        }
        let again: Vec<(Target, Vec<Run>)> = targets
            .iter()
            .zip(later.iter().cycle())
            .map(|((target, before), runs)| {
                let before = naive_memory(std::slice::from_ref(before));
                (*target, with_true_holes(runs.clone(), &before))
            })
            .collect();
        receive(&new, Some("../old"), dedup_content, &dump(&again, wire), piece).unwrap();
        for ((target, before), (_, runs)) in targets.iter().zip(&again) {
            check_images(&new, *target, &naive_memory(&[runs.clone(), before.clone()]));
        }
    }

    #[test]
    fn a_tree_cut_anywhere_leaves_nothing(
        runs in level(), large in 30..300u64, cut in any::<prop::sample::Index>(),
    ) {
        let runs = with_true_holes(with_large_runs(runs, large), &BTreeMap::new());
        let bytes = dump(&[1, 2, 3].map(|pid| (Target::Process(pid), runs.clone())), Wire::V2);
        let cut = cut.index(bytes.len());
        let tmp = tempfile::tempdir().unwrap();
        receive(tmp.path(), None, false, &bytes[..cut], 1 << 20).unwrap_err();
        prop_assert_eq!(names(tmp.path()), Vec::<String>::new());
    }
}

/// The disk is full once the directories of the tree are laid out, or before.
#[test]
fn a_full_disk_leaves_nothing() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if testbed::gate::root().is_none() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let runs = vec![Run::present(
        common::FIRST_PAGE,
        400,
        pageferry::criu::header::PageFlags::LAZY,
        1,
    )];
    let bytes = dump(
        &[1, 2].map(|pid| (Target::Process(pid), runs.clone())),
        Wire::V2,
    );
    // In pages: 400 of them, and what directories, links and pagemaps take.
    let mut failed = 0;
    for size in [300, 401, 403, 405, 407, 500] {
        let options = format!("size={}", size * 4096);
        let flags = MsFlags::empty();
        mount(
            Some("tmpfs"),
            tmp.path(),
            Some("tmpfs"),
            flags,
            Some(options.as_str()),
        )
        .unwrap();
        let received = receive(tmp.path(), None, false, &bytes, 1 << 20);
        let left = names(tmp.path());
        umount2(tmp.path(), MntFlags::MNT_DETACH).unwrap();
        match received {
            Ok(_) => assert!(left.iter().any(|name| name == "tree"), "{left:?}"),
            Err(error) => {
                failed += 1;
                assert!(left.is_empty(), "{size} pages: {left:?} after {error}");
            }
        }
    }
    assert!(failed > 1);
}
