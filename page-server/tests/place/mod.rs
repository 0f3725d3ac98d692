//! One page-server process and its directories, for the tests of the processes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use pageferry::criu::header::{Op, PageFlags, Target, Wire};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use testbed::process::Spawned;
use testbed::sys::Ended;
use testbed::wait::{GENEROUS, until};

use crate::common::{FIRST_PAGE, PAGE, Run, naive_memory, page_content};
use crate::dump_bytes::{bare, bytes_of, dump};

pub(crate) const PID: Target = Target::Process(7);

pub(crate) fn run() -> Run {
    Run::present(FIRST_PAGE, 100, PageFlags::LAZY, 3)
}

pub(crate) fn whole_dump() -> Vec<u8> {
    dump(&[(PID, vec![run()])], Wire::V2)
}

pub(crate) fn open_frame() -> Vec<u8> {
    bytes_of(&bare(Op::Open2, PID), Wire::V2)
}

/// Directories for one server: its images and its work.
pub(crate) struct Place {
    pub(crate) root: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        let place = Place {
            root: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(place.images()).unwrap();
        fs::create_dir(place.work()).unwrap();
        place
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.root.path().join("images")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.root.path().join("work")
    }

    /// A criu command line as a wrapper hands it over: the action among the options.
    pub(crate) fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
        command
            .arg("-D")
            .arg(self.images())
            .args(["-v4", "page-server", "--address", "127.0.0.1", "-W"])
            .arg(self.work())
            .args(["-o", "log", "--port-file", "port"])
            .args(options)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn start(&self, options: &[&str]) -> Spawned {
        // An earlier server's.
        let _ = fs::remove_file(self.work().join("port"));
        let mut command = self.command(options);
        Spawned::start("page-server", &mut command, Some(self.work().join("log"))).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.work().join("log")).unwrap_or_default()
    }

    /// Where `--summary-json sessions` writes.
    pub(crate) fn sessions(&self) -> PathBuf {
        self.work().join("sessions")
    }

    pub(crate) fn wait_for(&self, name: &str) -> String {
        let path = self.work().join(name);
        until(name, GENEROUS, || Ok(fs::read_to_string(&path).ok())).unwrap()
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let port = self.wait_for("port").trim().parse().unwrap();
        TcpStream::connect(("127.0.0.1", port)).unwrap()
    }

    pub(crate) fn image_names(&self) -> Vec<String> {
        let entries = self.images().read_dir().unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn check_images(&self) {
        let dir = ImageDir::open(&self.images(), PAGE).unwrap();
        let chain = Chain::open(&dir, PID, Missing::Refuse).unwrap();
        for (page, seed) in naive_memory(&[vec![run()]]) {
            let place = chain
                .find(pageferry::units::Vaddr(page * 4096))
                .unwrap()
                .place;
            let mut bytes = vec![0; 4096];
            chain.read(place, &mut bytes).unwrap();
            assert_eq!(bytes, page_content(seed.unwrap()));
        }
    }
}

/// Sends a whole dump and checks the answers: has_parent 0, status 0.
pub(crate) fn send_dump(stream: &mut (impl Read + Write)) {
    stream.write_all(&whole_dump()).unwrap();
    let mut answers = [9; 5];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, [0; 5]);
}

pub(crate) fn succeed(mut server: Spawned) -> Ended {
    server.succeed(GENEROUS).unwrap()
}

pub(crate) fn fail(mut server: Spawned) -> Ended {
    server.fail(GENEROUS).unwrap()
}
