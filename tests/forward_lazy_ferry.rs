//! A forwarder between a dump and clients that speak ferry.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/ferry_client.rs"]
mod ferry_client;
#[path = "common/forwarding.rs"]
mod forwarding;

use std::time::Duration;

use common::{FIRST_PAGE, PAGE, page_content};
use ferry_client::{Connection, OPENED, ReceivedFrame, hello};
use forwarding::{PAGES, TIMEOUT, dump, forwarder};
use pageferry::ferry::batch::{Batch, Place};
use pageferry::ferry::frame;
use pageferry::ferry::hello::{Features, Role};
use pageferry::ferry::message::Ack;
use pageferry::ferry::unpack::Unpacker;

const FEATURES: Features = Features::FAULTS.with(Features::HASHES);

/// Compares the pages of a batch; says how many there are.
fn expect_right(batch: &ReceivedFrame) -> u64 {
    let parsed = Batch::parse(&batch.body, PAGE).unwrap();
    let mut unpacked = Vec::new();
    let unpacker = &mut Unpacker::default();
    unpacker.unpack(&parsed, &[], &mut unpacked).unwrap();
    for (vaddr, place) in parsed.places() {
        let seed = (1 + (vaddr.get() >> PAGE.shift()) - FIRST_PAGE) as u32;
        let contents = match place {
            Place::Body(range) => &batch.body[range],
            Place::Unpacked(range) => &unpacked[range],
            Place::Shared(_) => panic!("not in a post-copy"),
            Place::Zero | Place::Same => panic!("{vaddr}: {place:?}"),
        };
        assert!(contents == page_content(seed), "{vaddr} is wrong");
    }
    parsed.present().get()
}

#[test]
fn a_client_on_demand_gets_its_faults_and_nothing_else() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, TIMEOUT);
    let features = FEATURES.with(Features::ON_DEMAND);
    let mut stream = Connection::dial(address, &hello(Role::Receiver, features, 1));
    assert!(stream.welcome.features.has(Features::ON_DEMAND));
    stream.open();
    let mut faults = Connection::dial(address, &hello(Role::Requester, features, 1));
    for (number, first, pages) in [(1, 17, 1), (2, PAGES - 1, 1), (3, 1000, 16)] {
        faults.ask(number, FIRST_PAGE + first, pages);
        let answer = faults.next();
        assert_eq!(
            (answer.kind, answer.number),
            (frame::Kind::FaultPages, number)
        );
        assert_eq!(expect_right(&answer), pages);
    }
    stream.acknowledge(Ack {
        complete: true,
        ..OPENED
    });
    // Whatever was pushed would come before it.
    assert_eq!(stream.next().kind, frame::Kind::Bye);
    forwarder.join().unwrap().unwrap();
    dump.join().unwrap().unwrap();
}

#[test]
fn a_client_that_acknowledges_nothing_gets_a_window_and_its_faults() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, TIMEOUT);
    let mut greeting = hello(Role::Receiver, FEATURES, 1);
    // A batch and no more, as a client with a low rate says.
    greeting.window.bytes = 1;
    let mut stream = Connection::dial(address, &greeting);
    stream.open();
    let pushed = stream.next();
    assert_eq!((pushed.kind, pushed.number), (frame::Kind::Pages, 2));
    assert!(expect_right(&pushed) <= 16);
    let mut faults = Connection::dial(address, &hello(Role::Requester, FEATURES, 1));
    for (number, first) in (1..).zip((0..PAGES).step_by(50)) {
        faults.ask(number, FIRST_PAGE + first, 50);
        let answer = faults.next();
        let pages = expect_right(&answer);
        assert_eq!(answer.number, number);
        // Of what is in the push a client that does not wait for it gets the page itself. So much is in it at
        // most: the batch that was sent, and 64 pages that are taken ahead.
        let whole = first >= 16 + 64;
        assert!(
            pages == 50 || !whole && pages >= 1,
            "{pages} pages from {first} on"
        );
        // Nothing new, but somebody is there.
        stream.acknowledge(OPENED);
    }
    // What was packed already is still to come, one by one.
    let mut safe = 2;
    loop {
        stream.acknowledge(Ack {
            safe,
            complete: true,
            ..OPENED
        });
        let next = stream.next();
        if next.kind == frame::Kind::Bye {
            break;
        }
        safe += 1;
        assert_eq!((next.kind, next.number), (frame::Kind::Pages, safe));
        assert!(expect_right(&next) <= 16);
    }
    assert!(safe < 20, "{safe} frames");
    forwarder.join().unwrap().unwrap();
    dump.join().unwrap().unwrap();
}

/// What a client says that has everything.
const TAKEN: Ack = Ack {
    complete: true,
    ..OPENED
};

#[test]
fn the_end_is_told_again_until_the_client_has_heard_it() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, TIMEOUT);
    let features = FEATURES
        .with(Features::ON_DEMAND)
        .with(Features::CONFIRMS_BYE);
    let mut first = Connection::dial(address, &hello(Role::Receiver, features, 1));
    assert!(first.welcome.features.has(Features::CONFIRMS_BYE));
    first.open();
    first.acknowledge(TAKEN);
    assert_eq!(first.next().kind, frame::Kind::Bye);
    // The source hears of it whether the client does or not.
    dump.join().unwrap().unwrap();
    // Each of them breaks before BYE has come, as far as the forwarder can tell.
    drop(first);
    for attempt in 2..5 {
        let mut again = Connection::dial(address, &hello(Role::Receiver, features, attempt));
        assert_eq!(again.next().kind, frame::Kind::Bye);
    }
    let mut last = Connection::dial(address, &hello(Role::Receiver, features, 5));
    assert_eq!(last.next().kind, frame::Kind::Bye);
    assert!(!forwarder.is_finished());
    last.acknowledge(Ack {
        bye_received: true,
        ..TAKEN
    });
    forwarder.join().unwrap().unwrap();
}

#[test]
fn a_client_that_does_not_come_back_for_the_end_is_waited_for_no_longer_than_others() {
    let (images, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (port, dump) = dump(images.path());
    let (address, forwarder) = forwarder(here.path(), port, Duration::ZERO);
    let features = FEATURES
        .with(Features::ON_DEMAND)
        .with(Features::CONFIRMS_BYE);
    let mut client = Connection::dial(address, &hello(Role::Receiver, features, 1));
    client.open();
    client.acknowledge(TAKEN);
    assert_eq!(client.next().kind, frame::Kind::Bye);
    drop(client);
    dump.join().unwrap().unwrap();
    forwarder.join().unwrap().unwrap();
}
