//! Makes the samples with the programs of another build.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;

use pageferry::criu::header::{PageFlags, Wire};
use pageferry::ferry::frame::Kind;
use pageferry::ferry::hello::Role;
use pageferry::ferry::message::{Ack, Answer};
use testbed::daemons::{Make, Options, PageServer};
use testbed::wait::GENEROUS;

use crate::common::{FIRST_PAGE, Run, TARGET, write_target};
use crate::dump_bytes::dump;
use crate::ferry_client::{Connection, OPENED, hello};
use crate::ferry_client_features;
use crate::forwarding::write_pstree;
use crate::samples::{Image, images, round, whole};

/// See README.md beside the samples.
#[test]
#[ignore = "makes the samples anew: see tests/compat/8da3145/README.md"]
fn make_samples() {
    let [programs, out] = ["COMPAT_PROGRAMS", "COMPAT_OUT"].map(|name| {
        let value = std::env::var_os(name).unwrap_or_else(|| panic!("{name} names a directory"));
        PathBuf::from(value)
    });
    let build = Make::Build(&programs);
    let work = tempfile::tempdir().unwrap();
    make_images(build, work.path(), &out);
    make_rounds(build, work.path(), &out);
    make_post_copy(build, work.path(), &out);
}

fn make_images(build: Make<'_>, work: &Path, out: &Path) {
    for image in images() {
        let Image {
            name,
            wire,
            levels,
            options,
        } = image;
        let dir = work.join(name);
        let server = PageServer::receiving(build, &Options::new(&dir).with(options)).unwrap();
        send_dump(server.address(), &levels[0], wire);
        server.finish(GENEROUS).unwrap();
        fs::create_dir_all(out.join(name)).unwrap();
        for entry in dir.read_dir().unwrap() {
            let path = entry.unwrap().path();
            let copy = out.join(name).join(path.file_name().unwrap());
            if path.is_symlink() {
                symlink(path.read_link().unwrap(), copy).unwrap();
            } else if path.extension().is_some_and(|end| end == "img") {
                fs::copy(&path, copy).unwrap();
            }
        }
    }
}

fn make_rounds(build: Make<'_>, work: &Path, out: &Path) {
    let recorder = Recorder::new();
    let forward = ["--forward", &recorder.address().to_string(), "--keep"];
    let near = Options::new(work.join("near")).with(&forward);
    let mut near = PageServer::receiving(build, &near).unwrap();
    for number in [1, 2] {
        let mut options = Options::new(work.join(format!("round-{number}")));
        if number == 2 {
            options = options.on_parent(Path::new("../round-1"));
        }
        let far = PageServer::receiving(build, &options).unwrap();
        thread::scope(|scope| {
            let recorded = scope.spawn(|| recorder.record(far.address()));
            send_dump(near.address(), &round(number), Wire::V2);
            let (sender, receiver) = recorded.join().unwrap();
            fs::write(out.join(format!("round-{number}.sender")), sender).unwrap();
            fs::write(out.join(format!("round-{number}.receiver")), receiver).unwrap();
        });
        far.finish(GENEROUS).unwrap();
    }
    near.process().kill().unwrap();
}

fn make_post_copy(build: Make<'_>, work: &Path, out: &Path) {
    let (source, here) = (work.join("source"), work.join("here"));
    for (dir, runs) in [
        (&source, whole()),
        (&here, vec![Run::absent(FIRST_PAGE, 8, PageFlags::LAZY)]),
    ] {
        fs::create_dir_all(dir).unwrap();
        write_pstree(dir);
        write_target(dir, TARGET, Wire::V2, 1, &runs);
    }
    let dump = PageServer::serving(build, &Options::new(&source)).unwrap();
    let from = ["--forward-lazy", &dump.address().to_string()];
    let forwarder = PageServer::receiving(build, &Options::new(&here).with(&from)).unwrap();
    let (recorder, address) = (Recorder::new(), forwarder.address());
    thread::scope(|scope| {
        let of_stream = scope.spawn(|| recorder.record(address));
        let features = ferry_client_features();
        let mut stream = Connection::dial(recorder.address(), &hello(Role::Receiver, features, 1));
        let of_faults = scope.spawn(|| recorder.record(address));
        let mut faults = Connection::dial(recorder.address(), &hello(Role::Requester, features, 1));
        faults.ask(1, FIRST_PAGE + 3, 2);
        assert_eq!(faults.next().kind, Kind::FaultPages);
        stream.open();
        let close = loop {
            let came = stream.next();
            if came.kind == Kind::Close {
                break came.number;
            }
        };
        let mut end = Ack {
            safe: close,
            answer: Answer {
                to: close,
                ..OPENED.answer
            },
            complete: true,
            ..OPENED
        };
        stream.acknowledge(end);
        assert_eq!(stream.next().kind, Kind::Bye);
        end.bye_received = true;
        stream.acknowledge(end);
        drop(faults);
        stream.rest();
        for (name, recorded) in [("post-copy", of_stream), ("post-copy-faults", of_faults)] {
            let (receiver, sender) = recorded.join().unwrap();
            fs::write(out.join(format!("{name}.receiver")), receiver).unwrap();
            fs::write(out.join(format!("{name}.sender")), sender).unwrap();
        }
    });
    forwarder.finish(GENEROUS).unwrap();
    dump.finish(GENEROUS).unwrap();
}

/// Sends a dump and waits until the server has ended its side.
fn send_dump(server: SocketAddr, runs: &[Run], wire: Wire) {
    let mut stream = TcpStream::connect(server).unwrap();
    stream
        .write_all(&dump(&[(TARGET, runs.to_vec())], wire))
        .unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
}

/// Relays connections and keeps what both ends sent.
struct Recorder {
    listener: TcpListener,
}

impl Recorder {
    fn new() -> Recorder {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Recorder { listener }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Relays the next connection to `server` until both ends have ended it. Returns what who connected sent, and
    /// what the server did.
    fn record(&self, server: SocketAddr) -> (Vec<u8>, Vec<u8>) {
        let (client, _) = self.listener.accept().unwrap();
        let server = TcpStream::connect(server).unwrap();
        thread::scope(|scope| {
            let answers = scope.spawn(|| copy(&server, &client));
            (copy(&client, &server), answers.join().unwrap())
        })
    }
}

/// Copies what comes until its end, or a reset.
fn copy(mut from: &TcpStream, mut to: &TcpStream) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(came @ 1..) = from.read(&mut bytes) {
        sent.extend_from_slice(&bytes[..came]);
        if to.write_all(&bytes[..came]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    sent
}
