//! Whoever runs first: batches are numbered in the order of their sequence, a thread that waits for room or an answer gets it,
//! and each sees the end.

use shuttle::thread::{spawn, yield_now};

use super::*;
use crate::engine::ferry::conn::Frame;
use crate::engine::ferry::connection_loop::ConnectionHandler;
use crate::engine::ferry::wakers::Waker;
use crate::engine::schedules::each;
use crate::ferry::frame::{HEADER_BYTES, Split, split};
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Hello, Role, VERSION, Window};
use crate::ferry::message::Ack;

const PAGE: PageSize = PageSize::KIB_4;

/// Room for two frames, so that the third waits.
const WINDOW: Window = Window {
    frames: 2,
    bytes: 1 << 20,
};

fn session() -> Arc<SenderSession> {
    let history = SenderHistory::new(PageMemory::new(PAGE, 0));
    let id = SessionId([1; 16]);
    Arc::new(SenderSession::new(PAGE, id, history, Arc::default()))
}

fn peer() -> Hello {
    Hello {
        version: VERSION,
        role: Role::Receiver,
        page: PAGE,
        features: Features::ALL,
        session: SessionId([1; 16]),
        stream: 0,
        streams: 1,
        attempt: 1,
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    }
}

fn ack(safe: u64, answer: Answer) -> Frame {
    let mut frame = Vec::new();
    let ack = Ack {
        safe,
        answer,
        ..Ack::default()
    };
    ack.encode(&mut frame);
    Frame {
        kind: Kind::Ack,
        number: 0,
        body: frame.split_off(HEADER_BYTES),
    }
}

/// A receiver that acknowledges each frame, and answers each OPEN with its number, until the session is over. Returns what
/// the bodies of the frames say, in the order of their numbers.
fn receive(session: &SenderSession) -> Vec<u8> {
    let waker = Waker::new().unwrap();
    session.stream_up(0, &peer(), &waker);
    session.handle(0, &waker, ack(0, Answer::default()));
    let mut said = Vec::new();
    while !session.is_over() {
        let Some(bytes) = session.poll(0, &waker, 0) else {
            yield_now();
            continue;
        };
        let Ok(Split::Frame(frame)) = split(&bytes) else {
            panic!("no frame");
        };
        if !frame.kind.is_numbered() {
            continue;
        }
        assert_eq!(frame.number, said.len() as u64 + 1);
        said.push(bytes[frame.body.start]);
        let answer = match frame.kind {
            Kind::Open => Answer {
                to: frame.number,
                value: 7,
                ..Answer::default()
            },
            _ => Answer::default(),
        };
        session.handle(0, &waker, ack(frame.number, answer));
    }
    said
}

fn submit(session: &SenderSession, sequence: u64, what: u8) -> Result<()> {
    let mut frame = Vec::new();
    let open = OpenFrame::begin(&mut frame);
    frame.push(what);
    session.submit_batch(sequence, open, frame, &EncodeCounters::default())
}

#[test]
fn batches_are_sent_in_their_order() {
    each(|| {
        let session = session();
        let receives = Arc::clone(&session);
        let receiver = spawn(move || receive(&receives));
        session.agree().unwrap();
        let packers = [[0, 3], [1, 4], [2, 5]].map(|mine| {
            let session = Arc::clone(&session);
            spawn(move || {
                for sequence in mine {
                    submit(&session, sequence, u8::try_from(sequence).unwrap()).unwrap();
                }
            })
        });
        session.wait_for_batches_before(6).unwrap();
        let answer = session.ask(Kind::Open, |body| body.push(99)).unwrap();
        assert_eq!((answer.to, answer.value), (7, 7));
        for packer in packers {
            packer.join().unwrap();
        }
        session.cut();
        assert_eq!(receiver.join().unwrap(), [0, 1, 2, 3, 4, 5, 99]);
    });
}

#[test]
fn each_thread_sees_the_end() {
    each(|| {
        let session = session();
        let receives = Arc::clone(&session);
        let receiver = spawn(move || receive(&receives));
        let waiting: [Box<dyn FnOnce(&SenderSession) -> Result<()> + Send>; 4] = [
            // Its turn never comes.
            Box::new(|session| submit(session, 1, 1)),
            Box::new(|session| session.wait_for_batches_before(5)),
            Box::new(SenderSession::wait_until_complete),
            Box::new(|session| session.ask(Kind::Close, |body| body.push(1)).map(drop)),
        ];
        let waiting = waiting.map(|waits| {
            let session = Arc::clone(&session);
            spawn(move || waits(&session))
        });
        session.abort("it is enough");
        session.cut();
        for thread in waiting {
            assert!(thread.join().unwrap().is_err());
        }
        receiver.join().unwrap();
        assert!(session.agree().is_err());
    });
}
