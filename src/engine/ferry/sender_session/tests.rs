use super::*;
use crate::engine::ferry::WINDOW;
use crate::engine::ferry::conn::Frame;
use crate::engine::ferry::connection_loop::ConnectionHandler;
use crate::engine::ferry::wakers::Waker;
use crate::ferry::frame::HEADER_BYTES;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{Hello, Role, VERSION};
use crate::ferry::level_control::Level;
use crate::ferry::message::Ack;

#[test]
fn a_connection_that_was_replaced_takes_nothing_and_tells_nothing() {
    let page = PageSize::KIB_4;
    let history = SenderHistory::new(PageMemory::new(page, 0));
    let session = SenderSession::new(page, SessionId([1; 16]), history, Arc::default());
    let peer = Hello {
        version: VERSION,
        role: Role::Receiver,
        page,
        features: Features::ALL,
        session: SessionId([1; 16]),
        stream: 0,
        streams: 1,
        attempt: 1,
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    };
    let ack = || Frame {
        kind: Kind::Ack,
        number: 0,
        body: {
            let mut words = Vec::new();
            Ack::default().encode(&mut words);
            words.split_off(HEADER_BYTES)
        },
    };
    let [old, new] = [(); 2].map(|()| Waker::new().unwrap());
    session.stream_up(0, &peer, &old);
    session.handle(0, &old, ack());
    let mut words = Vec::new();
    let sealed = OpenFrame::begin(&mut words).seal(&words);
    session.submit(Kind::Open, sealed, words, None).unwrap();
    // Its loop has not looked yet.
    session.stream_up(0, &peer, &new);
    session.handle(0, &old, ack());
    assert!(session.poll(0, &old, 0).is_none());
    assert!(
        session.poll(0, &new, 0).is_none(),
        "it has said nothing yet"
    );
    session.handle(0, &new, ack());
    assert!(session.poll(0, &old, 0).is_none());
    assert!(session.poll(0, &new, 0).is_some());
}

#[test]
fn what_was_measured_of_the_link_goes_into_the_next_session() {
    let page = PageSize::KIB_4;
    let session = |history| SenderSession::new(page, SessionId([1; 16]), history, Arc::default());
    let fresh = || SenderHistory::new(PageMemory::new(page, 0));
    let first = session(fresh());
    // 12 MB/s.
    for _ in 0..100 {
        first.observe_link(1 << 20, Duration::from_millis(84));
    }
    let second = session(first.into_history());
    assert!(matches!(second.level_control().level(), Level::Zstd(6..)));
    assert!(!matches!(
        session(fresh()).level_control().level(),
        Level::Zstd(6..)
    ));
}
