//! A lazy client that speaks ferry, frame by frame.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use pageferry::ferry::frame::{self, Split, split};
use pageferry::ferry::hash::HashKey;
use pageferry::ferry::hello::{Features, Greeting, Hello, Role, SessionId, VERSION, Window};
use pageferry::ferry::message::{Ack, Answer, Fault, StateId};
use pageferry::units::{PageRange, Vaddr};

use crate::common::{PAGE, TARGET};
use crate::forwarding::TIMEOUT;

/// A frame that has come.
#[derive(Debug)]
pub(crate) struct ReceivedFrame {
    pub(crate) kind: frame::Kind,
    pub(crate) number: u64,
    pub(crate) body: Vec<u8>,
}

/// What a client says of itself.
pub(crate) fn hello(role: Role, features: Features, attempt: u32) -> Hello {
    Hello {
        version: VERSION,
        role,
        page: PAGE,
        features,
        session: SessionId([3; 16]),
        stream: 0,
        streams: 1,
        attempt,
        opening: attempt == 1 && role == Role::Receiver,
        window: Window {
            frames: 64,
            bytes: 1 << 20,
        },
        hash_key: HashKey::default(),
    }
}

/// A welcomed connection of a client.
pub(crate) struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
    /// What the forwarder said of itself.
    pub(crate) welcome: Hello,
}

impl Connection {
    pub(crate) fn dial(address: SocketAddr, hello: &Hello) -> Connection {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut connection = Connection {
            stream,
            received: Vec::new(),
            welcome: *hello,
        };
        connection.say(|out| hello.encode(frame::Kind::Hello, out));
        let welcome = connection.next();
        match Hello::decode(welcome.kind, &welcome.body) {
            Ok(Greeting::Hello(welcome)) => connection.welcome = welcome,
            other => panic!("no welcome: {other:?}"),
        }
        connection
    }

    pub(crate) fn say(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut words = Vec::new();
        write(&mut words);
        self.stream.write_all(&words).unwrap();
    }

    /// The next frame.
    pub(crate) fn next(&mut self) -> ReceivedFrame {
        loop {
            if let Split::Frame(found) = split(&self.received).unwrap() {
                let came = ReceivedFrame {
                    kind: found.kind,
                    number: found.number,
                    body: self.received[found.body.clone()].to_vec(),
                };
                self.received.drain(..found.end());
                return came;
            }
            let mut bytes = [0; 16 << 10];
            let came = self.stream.read(&mut bytes).unwrap();
            assert!(came > 0, "the forwarder hung up");
            self.received.extend_from_slice(&bytes[..came]);
        }
    }

    /// Waits until the forwarder hangs up in order, and gives what it says before.
    pub(crate) fn rest(mut self) -> Vec<u8> {
        self.stream.read_to_end(&mut self.received).unwrap();
        self.received
    }

    pub(crate) fn acknowledge(&mut self, ack: Ack) {
        self.say(|out| ack.encode(out));
    }

    /// Takes the OPEN of the only process and says that there is nothing to build on.
    pub(crate) fn open(&mut self) {
        self.acknowledge(Ack::default());
        let open = self.next();
        assert_eq!((open.kind, open.number), (frame::Kind::Open, 1));
        self.acknowledge(OPENED);
    }

    /// Asks for `pages` pages from `first` on, of which a thread waits for the first.
    pub(crate) fn ask(&mut self, number: u64, first: u64, pages: u64) {
        let start = first << PAGE.shift();
        let fault = Fault {
            target: TARGET,
            vaddr: Vaddr(start),
            around: PageRange::new(start, start + (pages << PAGE.shift())),
            in_full: false,
            once_more: false,
        };
        self.say(|out| fault.encode(number, PAGE, out));
    }
}

/// The answer to OPEN.
pub(crate) const OPENED: Ack = Ack {
    safe: 1,
    answer: Answer {
        to: 1,
        value: 0,
        state: StateId::NONE,
    },
    complete: false,
    bye_received: false,
    arrived: 0,
};
