//! A page server that receives: whatever a dump says is in the images afterwards, with either driver;
//! and what is no dump leaves nothing.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{
    FIRST_PAGE, PAGE, Run, check_images, files, level, naive_memory, with_large_runs,
    with_true_holes,
};
use dump_bytes::{bare, bytes_of, dump, frame, header, send};
use pageferry::criu::header::{Header, Op, PageFlags, Target, Wire};
use pageferry::engine::io::Io;
use pageferry::engine::io::driver::Writes;
use pageferry::engine::receive::ingest_modes::IngestOptions;
use pageferry::engine::receive::stores::{StoreOptions, Stores};
use pageferry::engine::receive::{ReceiveContext, receive_client};
use pageferry::error::{Kind, Result};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::observe::received::Received;
use pageferry::stream::Stream;
use proptest::prelude::*;

const PID: Target = Target::Process(7);
const SHMEM: Target = Target::Shmem(9);

fn options(dir: &Path, previous: Option<&str>) -> StoreOptions {
    StoreOptions {
        previous: previous.map(PathBuf::from),
        ..StoreOptions::new(dir, PAGE)
    }
}

/// A driver, and when files are written.
type Driver = (Io, Writes);

const EPOLL: Driver = (Io::Epoll, Writes::Beside);

const ALL_WRITES: [Writes; 2] = [Writes::Beside, Writes::Between];

fn context(dir: &Path, previous: Option<&str>, (io, writes): Driver) -> ReceiveContext {
    let stores = Stores::open(options(dir, previous), None).unwrap();
    ReceiveContext {
        writes,
        ..ReceiveContext::new(stores, io)
    }
}

/// One session in which `bytes` come in pieces, and the server's answers.
fn session(context: &ReceiveContext, bytes: &[u8], piece: usize) -> (Result<Received>, Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sender = send(theirs, bytes.to_vec(), piece);
    let (received, result) = receive_client(Stream::plain(ours), context);
    (result.map(|()| received), sender.join().unwrap())
}

/// All ways that this kernel allows.
fn drivers() -> Vec<Driver> {
    let uring = testbed::gate::need("io_uring", Io::choose(Some(Io::Uring)));
    let drivers = uring.into_iter().chain([Io::Epoll]);
    drivers
        .flat_map(|io| ALL_WRITES.map(|writes| (io, writes)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A dump and the next one on top of it, cut into pieces of any size, received in all ways:
    /// the images have what was said, and are the same to the last byte.
    #[test]
    fn all_ways_store_what_was_said(
        first in level(), second in level(), shmem in level(), large in 30..300u64, v1: bool,
        piece in prop::sample::select(vec![7usize, 1000, 4096, 60_000, 1 << 20]),
    ) {
        let wire = if v1 { Wire::V1 } else { Wire::V2 };
        let first = with_true_holes(with_large_runs(first, large), &BTreeMap::new());
        let memory = naive_memory(std::slice::from_ref(&first));
        let second = with_true_holes(second, &memory);
        let shmem = with_true_holes(shmem, &BTreeMap::new());
        let mut images = Vec::new();
        for driver in drivers() {
            let tmp = tempfile::tempdir().unwrap();
            let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
            std::fs::create_dir(&old).unwrap();
            std::fs::create_dir(&new).unwrap();
            let bytes = dump(&[(PID, first.clone())], wire);
            let (received, answers) = session(&context(&old, None, driver), &bytes, piece);
            let received = received.unwrap();
            prop_assert_eq!(answers, [0, 0, 0, 0, 0]);
            prop_assert_eq!(received.wire_bytes, bytes.len() as u64);
            let stored = memory.values().filter(|seed| seed.is_some()).count();
            prop_assert_eq!(received.pages.received, stored as u64);
            check_images(&old, PID, &memory);

            let bytes = dump(&[(PID, second.clone()), (SHMEM, shmem.clone())], wire);
            let (received, answers) = session(&context(&new, Some("../old"), driver), &bytes, piece);
            received.unwrap();
            prop_assert_eq!(answers, [1, 0, 0, 0, 0, 0]);
            check_images(&new, PID, &naive_memory(&[second.clone(), first.clone()]));
            check_images(&new, SHMEM, &naive_memory(std::slice::from_ref(&shmem)));
            images.push((files(&old), files(&new)));
        }
        prop_assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    }

    /// Whatever is done with pages that are zero, known or compressible: the memory is the same.
    #[test]
    fn inspected_pages_read_back_as_sent(
        first in level(), second in level(), dedup_content: bool, compress: bool,
        piece in prop::sample::select(vec![1000usize, 60_000, 1 << 20]),
    ) {
        let first = with_true_holes(with_large_runs(first, 150), &BTreeMap::new());
        let before = naive_memory(std::slice::from_ref(&first));
        // Many pages of the second dump are just what they were.
        let second = with_true_holes(with_large_runs(second, 100), &before);
        let after = naive_memory(&[second.clone(), first.clone()]);
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        std::fs::create_dir(&new).unwrap();
        let ingest = IngestOptions { dedup_content, compress, ..IngestOptions::default() };
        let receive = |dir: &Path, previous, runs: &[Run]| {
            let context = ReceiveContext { ingest, ..context(dir, previous, EPOLL) };
            let bytes = dump(&[(PID, runs.to_vec())], Wire::V2);
            session(&context, &bytes, piece).0.unwrap()
        };
        receive(&old, None, &first);
        check_images(&old, PID, &before);
        let received = receive(&new, Some("../old"), &second);
        check_images(&new, PID, &after);

        let sent = |seed: &u32| second.iter().flat_map(|run| &run.seeds).filter(|sent| *sent == seed).count() as u64;
        if dedup_content || compress {
            prop_assert_eq!(received.kept.zero, sent(&0));
        }
        // CRIU reads no parents for some of what is not LAZY.
        let lazy = |run: &&Run| run.flags.has(PageFlags::LAZY);
        let in_second = |page: u64| second.iter().filter(lazy).find_map(|run| {
            let at = page.checked_sub(run.start_page)?;
            run.seeds.get(at as usize).copied()
        });
        let known = before.iter().filter(|(page, seed)| {
            let now = in_second(**page);
            now.is_some() && now == **seed && now != Some(0)
        });
        let known = if dedup_content { known.count() as u64 } else { 0 };
        prop_assert_eq!(received.kept.same_as_parent, known);
    }

    /// A dump that ends anywhere, in order or by a reset, leaves nothing.
    #[test]
    fn a_dump_cut_anywhere_leaves_nothing(
        runs in level(), large in 30..300u64, cut in any::<prop::sample::Index>(),
    ) {
        let runs = with_true_holes(with_large_runs(runs, large), &BTreeMap::new());
        let bytes = dump(&[(PID, runs)], Wire::V2);
        let cut = cut.index(bytes.len());
        for driver in drivers() {
            let tmp = tempfile::tempdir().unwrap();
            let (received, _) = session(&context(tmp.path(), None, driver), &bytes[..cut], 1 << 20);
            let error = received.unwrap_err();
            prop_assert_eq!(error.kind(), Kind::PeerLost);
            prop_assert_eq!(files(tmp.path()), BTreeMap::new());
        }
    }

    /// Neither does garbage, nor a dump with a spoilt byte in a header.
    #[test]
    fn garbage_leaves_nothing(garbage in prop::collection::vec(any::<u8>(), 32..4096)) {
        for driver in drivers() {
            let tmp = tempfile::tempdir().unwrap();
            let (received, _) = session(&context(tmp.path(), None, driver), &garbage, 4096);
            prop_assert!(received.is_err());
            prop_assert_eq!(files(tmp.path()), BTreeMap::new());
        }
    }
}

/// What a peer may not say, and words of the error that it earns.
#[test]
fn hostile_dumps_are_refused_with_their_place() {
    let open = bytes_of(&bare(Op::Open2, PID), Wire::V2);
    let page = FIRST_PAGE * 4096;
    let with = |frame: Header, payload: &[u8]| {
        [open.clone(), bytes_of(&frame, Wire::V2), payload.to_vec()].concat()
    };
    let pages = |op, flags, count, vaddr| header(op, flags, count, vaddr, PID);
    let here = PageFlags::PRESENT;
    let block = |len: u32, bytes: &[u8]| [len.to_le_bytes().to_vec(), bytes.to_vec()].concat();
    let short = lz4_flex::block::compress(&[1; 4000]);
    let compressed = pages(Op::AddFlagsCompressed, here, 1, page);
    let cases: Vec<(Vec<u8>, Vec<&str>)> = vec![
        (
            with(pages(Op::AddFlags, here, 1 << 40, page), &[]),
            vec!["pid 7", "0x1000000"],
        ),
        (
            with(pages(Op::AddFlags, here, u64::MAX, page), &[]),
            vec!["pid 7", "0x1000000"],
        ),
        (
            with(pages(Op::AddFlags, PageFlags::PARENT, 1, page), &[]),
            vec!["pid 7", "parent"],
        ),
        (with(bare(Op::Get, PID), &[]), vec!["--lazy-pages"]),
        (
            with(compressed, &block(4097, &[])),
            vec!["pid 7 at 0x1000000", "4097"],
        ),
        (
            with(compressed, &block(3, &[0xff; 3])),
            vec!["pid 7 at 0x1000000", "damaged"],
        ),
        (
            with(compressed, &block(short.len() as u32, &short)),
            vec!["pid 7 at 0x1000000", "4000 bytes"],
        ),
        (
            with(bare(Op::Open2, PID), &[]),
            vec!["pid 7", "second time"],
        ),
    ];
    for driver in drivers() {
        for (bytes, words) in &cases {
            let tmp = tempfile::tempdir().unwrap();
            // More bytes than the server will read: it must not wait for the end.
            let bytes = [bytes.clone(), vec![0; 256]].concat();
            let (received, answers) = session(&context(tmp.path(), None, driver), &bytes, 1 << 20);
            let error = received.unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{error} lacks {word}");
            }
            assert!(answers.len() <= 1, "CLOSE was not answered");
            assert_eq!(files(tmp.path()), BTreeMap::new());
        }
    }
}

#[test]
fn one_page_frames_are_one_entry_and_one_run_in_the_file() {
    let runs: Vec<Run> = (0..600)
        .map(|page| Run::present(FIRST_PAGE + u64::from(page), 1, PageFlags::LAZY, page + 1))
        .collect();
    for driver in drivers() {
        let tmp = tempfile::tempdir().unwrap();
        let bytes = dump(&[(PID, runs.clone())], Wire::V2);
        session(&context(tmp.path(), None, driver), &bytes, 1 << 20)
            .0
            .unwrap();
        check_images(tmp.path(), PID, &naive_memory(std::slice::from_ref(&runs)));
        let dir = ImageDir::open(tmp.path(), PAGE).unwrap();
        let chain = Chain::open(&dir, PID, Missing::Refuse).unwrap();
        assert_eq!(chain.extents().len(), 1);
    }
}

#[test]
fn force_close_leaves_the_socket_for_another_session() {
    for driver in drivers() {
        let tmp = tempfile::tempdir().unwrap();
        let context = context(tmp.path(), None, driver);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for target in [PID, SHMEM] {
            let run = Run::present(FIRST_PAGE, 3, PageFlags::LAZY, 5);
            let bytes = [
                bytes_of(&bare(Op::Open2, target), Wire::V2),
                frame(target, &run, Wire::V2),
                bytes_of(&bare(Op::ForceClose, target), Wire::V2),
            ]
            .concat();
            std::io::Write::write_all(&mut theirs, &bytes).unwrap();
            let again = Stream::plain(ours.try_clone().unwrap());
            receive_client(again, &context).1.unwrap();
            let mut answers = [9; 5];
            std::io::Read::read_exact(&mut theirs, &mut answers).unwrap();
            assert_eq!(answers, [0; 5]);
            check_images(tmp.path(), target, &naive_memory(&[vec![run]]));
        }
    }
}

/// A dump that fails before its first page says CLOSE alone, and waits for the answer: in either layout,
/// however its bytes come, and whatever layout was asked for. A socket that it keeps has no byte of it
/// left then.
#[test]
fn a_close_without_anything_before_it_is_answered() {
    for (op, wire, told) in [Op::Close, Op::ForceClose].into_iter().flat_map(|op| {
        [Wire::V1, Wire::V2]
            .into_iter()
            .flat_map(move |wire| [(op, wire, None), (op, wire, Some(wire))])
    }) {
        let close = Header {
            dst_id: 0,
            ..bare(op, PID)
        };
        let close = bytes_of(&close, wire);
        for cut in 1..=close.len() {
            let tmp = tempfile::tempdir().unwrap();
            let context = ReceiveContext {
                wire: told,
                ..context(tmp.path(), None, EPOLL)
            };
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let bytes = close.clone();
            let dump = std::thread::spawn(move || {
                let (first, rest) = bytes.split_at(cut);
                std::io::Write::write_all(&mut theirs, first).unwrap();
                std::thread::yield_now();
                std::io::Write::write_all(&mut theirs, rest).unwrap();
                let mut answer = [9; 4];
                std::io::Read::read_exact(&mut theirs, &mut answer).unwrap();
                if op == Op::ForceClose {
                    // Whoever has the socket next reads this first.
                    std::io::Write::write_all(&mut theirs, b"next").unwrap();
                }
                answer
            });
            let kept = ours.try_clone().unwrap();
            receive_client(Stream::plain(ours), &context).1.unwrap();
            assert_eq!(dump.join().unwrap(), [0; 4]);
            if op == Op::ForceClose {
                let mut next = [0; 4];
                std::io::Read::read_exact(&mut &kept, &mut next).unwrap();
                assert_eq!(&next, b"next", "{wire:?} cut at {cut}");
            }
        }
    }
}

#[test]
fn a_peer_that_goes_on_after_close_is_not_listened_to() {
    let tmp = tempfile::tempdir().unwrap();
    let context = context(tmp.path(), None, EPOLL);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let run = Run::present(FIRST_PAGE, 3, PageFlags::LAZY, 5);
    let bytes = dump(&[(PID, vec![run])], Wire::V2);
    // Until it is told that nobody listens any more.
    let sender = std::thread::spawn(move || {
        std::io::Write::write_all(&mut theirs, &bytes).unwrap();
        while std::io::Write::write_all(&mut theirs, &[7; 64]).is_ok() {}
    });
    receive_client(Stream::plain(ours), &context).1.unwrap();
    sender.join().unwrap();
    assert_eq!(files(tmp.path()).len(), 2);
}

#[test]
fn a_silent_peer_is_given_up() {
    let open = bytes_of(&bare(Op::Open2, PID), Wire::V2);
    let large = Run::present(FIRST_PAGE, 1024, PageFlags::LAZY, 1);
    let mut within_pages = dump(&[(PID, vec![large])], Wire::V2);
    within_pages.truncate(100_000);
    for (driver, said) in drivers()
        .into_iter()
        .flat_map(|driver| [(driver, &open), (driver, &within_pages)])
    {
        let tmp = tempfile::tempdir().unwrap();
        let context = ReceiveContext {
            idle_timeout: Some(Duration::from_millis(20)),
            ..context(tmp.path(), None, driver)
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &theirs, said).unwrap();
        let error = receive_client(Stream::plain(ours), &context).1.unwrap_err();
        assert_eq!(error.kind(), Kind::PeerLost);
        assert!(error.to_string().contains("--idle-timeout"), "{error}");
        assert_eq!(files(tmp.path()), BTreeMap::new());
        drop(theirs);
    }
}

#[test]
fn sessions_at_once_share_a_directory() {
    for driver in drivers() {
        let tmp = tempfile::tempdir().unwrap();
        let context = Arc::new(context(tmp.path(), None, driver));
        let runs = |pid: u32| vec![Run::present(FIRST_PAGE, 64, PageFlags::LAZY, pid * 100)];
        std::thread::scope(|scope| {
            for pid in 1..=6 {
                let context = Arc::clone(&context);
                scope.spawn(move || {
                    let bytes = dump(&[(Target::Process(pid), runs(pid))], Wire::V2);
                    session(&context, &bytes, 5000).0.unwrap();
                });
            }
        });
        for pid in 1..=6 {
            check_images(
                tmp.path(),
                Target::Process(pid),
                &naive_memory(&[runs(pid)]),
            );
        }
    }
}

#[test]
fn sessions_may_have_a_directory_each() {
    let tmp = tempfile::tempdir().unwrap();
    let context = ReceiveContext {
        stores: Stores::open(
            options(tmp.path(), None),
            Some("{peer}-{seq}".parse().unwrap()),
        )
        .unwrap(),
        ..context(tmp.path(), None, EPOLL)
    };
    let run = Run::present(FIRST_PAGE, 3, PageFlags::LAZY, 5);
    let bytes = dump(&[(PID, vec![run.clone()])], Wire::V1);
    session(&context, &bytes, 4096).0.unwrap();
    session(&context, &bytes[..100], 4096).0.unwrap_err();
    session(&context, &bytes, 4096).0.unwrap();
    for name in ["local-1", "local-3"] {
        check_images(
            &tmp.path().join(name),
            PID,
            &naive_memory(&[vec![run.clone()]]),
        );
    }
    assert!(!tmp.path().join("local-2").exists());
}

#[test]
fn old_senders_cannot_be_given_compressed_images() {
    let tmp = tempfile::tempdir().unwrap();
    let context = ReceiveContext {
        ingest: IngestOptions {
            compress: true,
            ..IngestOptions::default()
        },
        ..context(tmp.path(), None, EPOLL)
    };
    let bytes = dump(
        &[(PID, vec![Run::present(FIRST_PAGE, 3, PageFlags::LAZY, 5)])],
        Wire::V1,
    );
    let error = session(&context, &bytes, 4096).0.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("--compress"), "{error}");
}

#[test]
fn parents_lose_what_is_new_but_only_after_close() {
    let tmp = tempfile::tempdir().unwrap();
    let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
    std::fs::create_dir(&old).unwrap();
    std::fs::create_dir(&new).unwrap();
    let whole = vec![Run::present(FIRST_PAGE, 100, PageFlags::LAZY, 7)];
    let bytes = dump(&[(PID, whole.clone())], Wire::V2);
    session(&context(&old, None, EPOLL), &bytes, 1 << 20)
        .0
        .unwrap();
    let before = files(&old);

    let context = ReceiveContext {
        auto_dedup: true,
        ..context(&new, Some("../old"), EPOLL)
    };
    let next = vec![
        Run::absent(FIRST_PAGE, 10, PageFlags::PARENT),
        Run::present(FIRST_PAGE + 10, 60, PageFlags::LAZY, 1007),
        Run::absent(FIRST_PAGE + 70, 30, PageFlags::PARENT),
    ];
    let bytes = dump(&[(PID, next.clone())], Wire::V2);
    let cut = bytes.len() - 1;
    session(&context, &bytes[..cut], 1 << 20).0.unwrap_err();
    assert_eq!(files(&old), before);
    session(&context, &bytes, 1 << 20).0.unwrap();
    let pages = |files: &BTreeMap<String, Vec<u8>>| files["pages-65537.img"].clone();
    let mut punched = pages(&before);
    punched[10 * 4096..70 * 4096].fill(0);
    assert_eq!(pages(&files(&old)), punched);
    check_images(&new, PID, &naive_memory(&[next, whole]));
}
