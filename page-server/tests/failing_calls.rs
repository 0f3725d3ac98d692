//! Each call that a page server makes about its images fails in turn, once or from then on: it says what failed, and
//! nothing is left that looks whole and is not. Whoever was told of success has whole images.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;
mod place;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{FIRST_PAGE, PAGE, Run, check_images, naive_memory, page_content, write_target};
use dump_bytes::{bare, bytes_of, dump, header};
use nix::errno::Errno;
use pageferry::criu::header::{Header, Op, PageFlags, Target, Wire};
use testbed::failing::{CallCounts, FailingCalls, Failure};
use testbed::gate;
use testbed::wait::{GENEROUS, until};

const FIRST: Target = Target::Process(7);
const SECOND: Target = Target::Process(8);

/// More calls than any of these runs makes.
const CALLS_MAX: u64 = 1000;

/// A page server whose calls fail, and where it works.
struct Server {
    child: Child,
    counts: CallCounts,
    root: tempfile::TempDir,
}

impl Server {
    /// Starts one on `root`, whose directory `images` is there, unless it does not start.
    fn start(
        root: tempfile::TempDir,
        failing: &FailingCalls,
        failure: &Failure,
        args: &[&str],
    ) -> (Server, Option<TcpStream>) {
        let images = root.path().canonicalize().unwrap().join("images");
        let work = root.path().join("work");
        fs::create_dir(&work).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
        command
            .args([
                "--address",
                "127.0.0.1",
                "--io",
                "epoll",
                "-o",
                "log",
                "-v3",
            ])
            .args(["--port-file", "port", "--local-timeout", "0", "-D"])
            .arg(&images)
            .arg("-W")
            .arg(&work)
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let counts = failing.apply(&mut command, &images, failure, &root.path().join("counts"));
        let child = command.spawn().unwrap();
        let counts = counts.unwrap();
        let mut server = Server {
            child,
            counts,
            root,
        };
        let port = until("the port, or an end", GENEROUS, || {
            let port = fs::read_to_string(work.join("port")).ok();
            let ended = server.child.try_wait()?.is_some();
            Ok((ended || port.is_some()).then_some(port))
        });
        let stream = port.unwrap().and_then(|port| {
            // It may be over by now.
            TcpStream::connect(("127.0.0.1", port.trim().parse().unwrap())).ok()
        });
        (server, stream)
    }

    fn images(&self) -> std::path::PathBuf {
        self.root.path().join("images")
    }

    /// Waits for its end, which no signal may have brought, and tells whether it was a success, and its log.
    fn end(&mut self) -> (bool, String) {
        let status = until("the server's end", GENEROUS, || {
            Ok(self.child.try_wait()?)
        })
        .unwrap();
        assert_eq!(status.signal(), None, "{}", self.log());
        (status.success(), self.log())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.path().join("work/log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `case` with every call failing in turn, once and from then on. It returns how many calls there were and the name
/// of the one that failed.
fn for_every_call(
    errno: Errno,
    case: impl Fn(&Failure) -> (u64, Option<String>) + Sync,
) -> BTreeSet<String> {
    let mut failed = BTreeSet::new();
    for forever in [false, true] {
        for number in 1..CALLS_MAX {
            let last = if forever { u64::MAX >> 1 } else { number };
            let failure = Failure {
                calls: number..=last,
                errno,
                thread: None,
            };
            match case(&failure) {
                (_, Some(name)) => failed.insert(name),
                (_, None) => break,
            };
            assert!(number + 1 < CALLS_MAX, "still calls that fail");
        }
    }
    failed
}

fn first_runs() -> Vec<Run> {
    vec![
        Run::present(FIRST_PAGE, 3, PageFlags::default(), 1),
        Run::present(FIRST_PAGE + 9, 200, PageFlags::LAZY, 9),
    ]
}

fn second_runs() -> Vec<Run> {
    vec![Run::present(FIRST_PAGE, 2, PageFlags::default(), 400)]
}

fn send(stream: &mut TcpStream) -> Vec<u8> {
    let bytes = dump(&[(FIRST, first_runs()), (SECOND, second_runs())], Wire::V2);
    let mut answers = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        let _ = answers.read_to_end(&mut received);
        received
    });
    // The server may end it.
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(Shutdown::Write);
    reader.join().unwrap()
}

/// What has the name of an image is whole: nobody takes less for a dump.
fn expect_whole_or_absent(images: &Path) -> usize {
    let mut whole = 0;
    for (target, runs) in [(FIRST, first_runs()), (SECOND, second_runs())] {
        if images.join(target.pagemap_name()).exists() {
            check_images(images, target, &naive_memory(&[runs]));
            whole += 1;
        }
    }
    whole
}

fn received(failing: &FailingCalls, failure: &Failure, args: &[&str]) -> (u64, Option<String>) {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("images")).unwrap();
    let (mut server, stream) = Server::start(root, failing, failure, args);
    let answers = stream
        .map(|mut stream| send(&mut stream))
        .unwrap_or_default();
    let (succeeded, log) = server.end();
    let (counted, failed) = server.counts.read().unwrap();
    let what = format!("{failed:?}, {failure:?}, {args:?}: {answers:?}\n{log}");
    let whole = expect_whole_or_absent(&server.images());
    // has_parent twice, and the status of CLOSE.
    let told_of_success = answers == [0; 6];
    assert_eq!(succeeded, told_of_success, "{what}");
    match told_of_success {
        true => assert_eq!(whole, 2, "{what}"),
        false => {
            let error = log.lines().find(|line| line.contains("error: "));
            let error = error.unwrap_or_else(|| panic!("{what}"));
            let reason = std::io::Error::from(failure.errno).to_string();
            assert!(
                error.contains(&reason) && error.contains("images"),
                "{what}"
            );
        }
    }
    (counted, failed)
}

#[test]
fn a_dump_is_received_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(dir.path())) else {
        return;
    };
    let failed = for_every_call(Errno::ENOSPC, |failure| {
        received(&failing, failure, &["--sync", "close"])
    });
    for call in ["open64", "rename", "fsync"] {
        assert!(failed.contains(call), "{call} is not among {failed:?}");
    }
    assert!(
        failed.iter().any(|call| call.contains("write")),
        "{failed:?}"
    );
}

/// The rest of what a receiving server can do with pages, and the other error.
#[test]
#[ignore = "takes minutes: cargo nextest run -p page-server --test failing_calls --run-ignored all"]
fn a_dump_is_received_whole_or_not_at_all_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(dir.path())) else {
        return;
    };
    for errno in [Errno::EIO, Errno::ENOSPC] {
        for args in [
            &["--sync", "none"][..],
            &["--sync", "always"],
            &["--compress"],
            &["--dedup-content"],
        ] {
            let failed = for_every_call(errno, |failure| received(&failing, failure, args));
            assert!(failed.contains("rename"), "{failed:?}");
        }
    }
}

/// A client gets the pages as they are in the images, or none: never others.
fn served(failing: &FailingCalls, failure: &Failure) -> (u64, Option<String>) {
    let root = tempfile::tempdir().unwrap();
    let images = root.path().join("images");
    fs::create_dir(&images).unwrap();
    write_target(&images, FIRST, Wire::V2, 1, &first_runs());
    let (mut server, stream) = Server::start(root, failing, failure, &["--lazy-pages"]);
    let got = stream.map(|mut stream| fetch_all(&mut stream));
    let all: u64 = first_runs().iter().map(|run| run.pages).sum();
    if let Some(pages) = got {
        if pages < all {
            let is_logged = || {
                let log = server.log();
                Ok((log.contains("error: ") || log.contains("warning: ")).then_some(()))
            };
            until("what failed", GENEROUS, is_logged)
                .unwrap_or_else(|_| panic!("{}", server.log()));
        }
        // It waits for a client that could not be served, to come again.
        server.child.kill().unwrap();
        server.child.wait().unwrap();
    } else {
        let (succeeded, log) = server.end();
        assert!(!succeeded && log.contains("error: "), "{failure:?}: {log}");
    }
    let (counted, failed) = server.counts.read().unwrap();
    if failed.is_none() {
        assert_eq!(got, Some(all), "{}", server.log());
    }
    (counted, failed)
}

/// Asks for every page, one by one and many at once, and counts those that come. Any that comes is right.
fn fetch_all(stream: &mut TcpStream) -> u64 {
    let mut got = 0;
    for run in first_runs() {
        for (first, pages) in [(0, 1), (1, run.pages - 1)] {
            let at = (run.start_page + first) << PAGE.shift();
            let mut request = header(Op::Get, PageFlags::default(), pages, at, FIRST);
            // Requests name the pid alone.
            request.dst_id = 7;
            if stream.write_all(&bytes_of(&request, Wire::V2)).is_err() {
                return got;
            }
            let mut answer = vec![0; bytes_of(&request, Wire::V2).len()];
            if stream.read_exact(&mut answer).is_err() {
                return got;
            }
            let answer = Header::decode(Wire::V2, &answer).unwrap();
            assert!(answer.pages.get() <= pages);
            for page in 0..answer.pages.get() {
                let mut content = vec![0; PAGE.as_usize()];
                if stream.read_exact(&mut content).is_err() {
                    return got;
                }
                let seed = run.seeds[(first + page) as usize];
                assert!(
                    content == page_content(seed),
                    "page {page} of a run is another"
                );
                got += 1;
            }
        }
    }
    let _ = stream.write_all(&bytes_of(&bare(Op::Close, FIRST), Wire::V2));
    got
}

#[test]
fn a_client_gets_right_pages_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(dir.path())) else {
        return;
    };
    let failed = for_every_call(Errno::EIO, |failure| served(&failing, failure));
    assert!(failed.contains("open64"), "{failed:?}");
    assert!(
        failed
            .iter()
            .any(|call| call.contains("read") || call.contains("sendfile")),
        "{failed:?}"
    );
}
