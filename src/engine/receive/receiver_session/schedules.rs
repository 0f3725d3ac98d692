//! Whoever runs first: the applier gets each frame once, in the order of the numbers, whichever connection brings it, and
//! hears of the end.

use shuttle::thread::spawn;

use super::*;
use crate::engine::ferry::WINDOW;
use crate::engine::schedules::each;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Features, Role, SessionId, VERSION};

const PAGE: PageSize = PageSize::KIB_4;

fn session() -> Arc<ReceiverSession> {
    let (bases, pool) = (Arc::default(), Arc::default());
    Arc::new(ReceiverSession::new(PAGE, 2, WINDOW, bases, pool, false))
}

/// Brings these frames on a connection.
fn bring(session: &ReceiverSession, stream: u16, numbers: &[u64]) {
    let waker = Waker::new().unwrap();
    let peer = Hello {
        version: VERSION,
        role: Role::Sender,
        page: PAGE,
        features: Features::ALL,
        session: SessionId([1; 16]),
        stream,
        streams: 2,
        attempt: 1,
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    };
    session.stream_up(stream, &peer, &waker);
    for number in numbers {
        let frame = Frame {
            kind: Kind::Pages,
            number: *number,
            body: number.to_le_bytes().to_vec(),
        };
        session.handle(stream, &waker, frame);
        while session.poll(stream, &waker, 0).is_some() {}
    }
}

#[test]
fn frames_are_applied_in_their_order() {
    each(|| {
        let session = session();
        // Some come on both, as they do when a connection was made again.
        let connections = [(0, [2, 3, 6, 5]), (1, [4, 1, 2, 6])].map(|(stream, numbers)| {
            let session = Arc::clone(&session);
            spawn(move || bring(&session, stream, &numbers))
        });
        for number in 1..=6_u64 {
            let frame = session.next_frame().unwrap();
            assert_eq!(frame.number, number);
            assert_eq!(frame.body, number.to_le_bytes());
            session.applied(number, None);
        }
        for connection in connections {
            connection.join().unwrap();
        }
    });
}

#[test]
fn the_applier_sees_the_end() {
    each(|| {
        let session = session();
        let [brings, stops] = [(); 2].map(|()| Arc::clone(&session));
        let connection = spawn(move || bring(&brings, 0, &[1, 3]));
        let stopping = spawn(move || stops.stop());
        let mut applied = 0;
        while let Ok(frame) = session.next_frame() {
            applied += 1;
            assert_eq!(frame.number, applied);
            session.applied(applied, None);
        }
        assert!(applied <= 1);
        session.wait_for_sender_to_end();
        connection.join().unwrap();
        stopping.join().unwrap();
    });
}
