//! A serving page server as a process: what it needs of its host stays bounded.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/dump_bytes.rs"]
mod dump_bytes;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{FIRST_PAGE, PAGE, Run, page_content, write_target};
use dump_bytes::bytes_of;
use pageferry::criu::header::{Header, Op, PageFlags, Target, Wire};
use pageferry::criu::serve::CLOSE_STATUS;
use pageferry::units::{PageCount, Vaddr};
use testbed::process::Spawned;
use testbed::sys::Ended;
use testbed::wait::{GENEROUS, until};

/// Starts a server of `dir` in a shell that says `first`, and connects to it.
fn start(dir: &Path, first: &str) -> (Spawned, TcpStream) {
    let script = format!("{first}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command
        .args(["-c", &script, env!("CARGO_BIN_EXE_page-server")])
        .args(["--lazy-pages", "--address", "127.0.0.1", "-D"])
        .arg(dir)
        .args(["-o", "log", "--port-file", "port"])
        .stdin(Stdio::null());
    let server = Spawned::start("page-server", &mut command, Some(dir.join("log"))).unwrap();
    let port = until("the port", GENEROUS, || {
        Ok(fs::read_to_string(dir.join("port")).ok())
    });
    let port = port.unwrap().trim().parse().unwrap();
    (server, TcpStream::connect(("127.0.0.1", port)).unwrap())
}

fn request(op: Op, pid: u32, page: u64, pages: u64) -> Vec<u8> {
    let header = Header {
        op,
        flags: PageFlags::default(),
        pages: PageCount(pages),
        vaddr: Vaddr(page << PAGE.shift()),
        dst_id: u64::from(pid),
    };
    bytes_of(&header, Wire::V2)
}

/// Asks for pages and takes the answer, which has all of them, to its last page.
fn fetch(client: &mut TcpStream, pid: u32, page: u64, pages: u64) -> Vec<u8> {
    client
        .write_all(&request(Op::Get, pid, page, pages))
        .unwrap();
    let mut header = [0; 32];
    client.read_exact(&mut header).unwrap();
    assert_eq!(
        Header::decode(Wire::V2, &header).unwrap().pages,
        PageCount(pages)
    );
    let mut content = vec![0; PAGE.as_usize()];
    for _ in 0..pages {
        client.read_exact(&mut content).unwrap();
    }
    content
}

fn finish(mut client: TcpStream, mut server: Spawned) -> Ended {
    client.write_all(&request(Op::Close, 0, 0, 0)).unwrap();
    let mut status = [1; 4];
    client.read_exact(&mut status).unwrap();
    assert_eq!(status, CLOSE_STATUS);
    drop(client);
    server.succeed(GENEROUS).unwrap()
}

#[test]
fn a_large_tree_is_served_whatever_the_soft_limit_of_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let pids = 1..300;
    for pid in pids.clone() {
        let runs = [Run::present(FIRST_PAGE, 1, PageFlags::LAZY, pid)];
        write_target(dir.path(), Target::Process(pid), Wire::V2, pid, &runs);
    }
    let (server, mut client) = start(dir.path(), "ulimit -S -n 64");
    for pid in pids {
        assert_eq!(fetch(&mut client, pid, FIRST_PAGE, 1), page_content(pid));
    }
    finish(client, server);
}

#[test]
fn memory_does_not_grow_with_the_image() {
    /// What the whole server may take, whatever the size of the image.
    const MEMORY_BYTES_MAX: u64 = 64 << 20;
    let dir = tempfile::tempdir().unwrap();
    let pages = 3 * (MEMORY_BYTES_MAX >> PAGE.shift());
    let target = Target::Process(7);
    let run = Run::absent(FIRST_PAGE, pages, PageFlags::PRESENT.with(PageFlags::LAZY));
    write_target(dir.path(), target, Wire::V2, 1, &[run]);
    // A hole reads as zeros through the page cache like anything else.
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("pages-1.img"));
    file.unwrap().set_len(pages << PAGE.shift()).unwrap();
    let (server, mut client) = start(dir.path(), ":");
    for pages_at_once in [16, 1024] {
        for page in (0..pages).step_by(pages_at_once) {
            fetch(&mut client, 7, FIRST_PAGE + page, pages_at_once as u64);
        }
    }
    let ended = finish(client, server);
    assert!(
        ended.peak_rss_bytes <= MEMORY_BYTES_MAX,
        "{} bytes",
        ended.peak_rss_bytes
    );
}
