//! Ferry: the sessions of both halves.

use std::time::Duration;

use pageferry::ferry::frame::Kind;
use pageferry::ferry::hello::{Greeting, Hello, Role, SessionId};
use pageferry::ferry::link::{Admission, Dialer, RetryPolicy, SessionTable};
use pageferry::ferry::message::StateId;
use pageferry::ferry::postcopy_receiver::{Event, Part, PostcopyReceiver};
use pageferry::ferry::receiver::{Arrival, Message, Receiver};
use pageferry::ferry::sender::Sender;
use pageferry::units::PageRange;

use crate::ferry::{PAGE, PID, WINDOW, body_of, frames_of, hasher, hello};
use crate::{byte, canary, take};

/// A receiver holds no more than its window and hands frames out in their order, whatever a sender sends.
pub(crate) fn receiver(data: &[u8]) {
    let takes_shared = data.len().is_multiple_of(2);
    let mut receiver = Receiver::new(PAGE, 2, WINDOW).taking_shared(takes_shared);
    receiver.stream_up(0);
    let frames = frames_of(data);
    let mut ready: Vec<(u64, Kind, &[u8])> = Vec::new();
    let mut applied = 0;
    let mut pages = 0;
    let mut here = 0;
    for frame in &frames {
        if !frame.kind.is_numbered() {
            let _ = receiver.handle(frame.kind, frame.body);
            let _ = receiver.poll(0, here);
            continue;
        }
        here += frame.body.len() as u64;
        match receiver.handle_numbered(frame.number, frame.body.len() as u64) {
            Ok(Arrival::Next) => ready.push((frame.number, frame.kind, frame.body)),
            Ok(Arrival::Held | Arrival::Again) => {}
            Err(_) => break,
        }
        while let Some(number) = receiver.next_held() {
            ready.push((number, Kind::Pages, frame.body));
        }
        assert!(
            ready.len() <= WINDOW.frames as usize,
            "no more than the window"
        );
        if frame.body.len() % 2 == 0 {
            for (number, kind, body) in ready.drain(..) {
                let Ok(message) = receiver.read(kind, body) else {
                    return;
                };
                pages += u32::from(matches!(message, Message::Pages(_)));
                applied += 1;
                assert_eq!(number, applied, "frames are handed out in order");
                receiver.applied(number);
            }
        }
        let _ = receiver.poll(0, here);
    }
    canary(pages > 1);
}

/// A sender believes no acknowledgement of what it has not sent, and no hashes unasked.
pub(crate) fn sender(mut data: &[u8]) {
    let sent = u64::from(byte(&mut data) % 8);
    let mut sender = Sender::new(PAGE, 2, WINDOW);
    sender.stream_up(0);
    for _ in 0..sent {
        sender.submit(Kind::Pages, 1000);
    }
    sender.ask_hashes(PID);
    let mut answered = false;
    for frame in frames_of(data) {
        let stream = u16::from(frame.number == 1);
        match frame.number {
            2 => sender.stream_down(0),
            3 => sender.stream_up(0),
            4 => sender.stream_up(1),
            _ => {
                let handled = sender.handle(stream, frame.kind, frame.body);
                answered |= handled.is_ok() && frame.kind == Kind::Hashes;
            }
        }
        for stream in [0, 1] {
            let mut polled = 0;
            while sender.poll(stream).is_some() {
                polled += 1;
                assert!(polled < 1000, "it comes to an end");
            }
        }
    }
    assert_eq!(sender.last(), sent);
    canary(answered && sender.is_settled());
}

/// The receiving half of a post-copy: what is pushed, and answers to what it asks.
pub(crate) fn postcopy(data: &[u8]) {
    let state = StateId::NONE;
    let mut receiver: PostcopyReceiver<u32> = PostcopyReceiver::new(PAGE, WINDOW, hasher(), state);
    receiver.build_on(7);
    receiver.attach();
    let (mut tag, mut pushed) = (0, 0);
    for frame in frames_of(data) {
        let event = match frame.kind {
            // Orders to this end, which the wire does not have here.
            Kind::Hello => {
                let start = 0x10_000 + (frame.number.min(200) << 12);
                tag += 1;
                if receiver.questions() < 64 && !receiver.is_through() {
                    let range = PageRange::new(start, start + 0x5000);
                    receiver.ask(7, range, tag, Duration::ZERO);
                }
                continue;
            }
            Kind::Welcome => {
                receiver.may_install();
                continue;
            }
            Kind::Hashes => {
                receiver.detach();
                receiver.attach();
                continue;
            }
            Kind::FaultPages | Kind::FaultInPush => {
                receiver.handle_answer(frame.kind, frame.number, frame.body)
            }
            _ => receiver.handle_pushed(frame.kind, frame.number, frame.body),
        };
        match event {
            Ok(Event::Pushed(unverified)) => {
                let (delivery, _) = receiver.complete(unverified, false);
                check(&delivery.parts);
                pushed += 1;
                receiver.settle(Vec::new());
            }
            Ok(Event::Answer(_, unverified)) => {
                let (delivery, _) = receiver.complete(unverified, true);
                check(&delivery.parts);
            }
            Ok(Event::InPush(_) | Event::Bye) => canary(pushed > 0),
            Ok(_) => {}
            Err(_) => return,
        }
        while receiver.poll(0).is_some() {}
    }
}

fn check(parts: &[Part]) {
    let apart = parts
        .windows(2)
        .all(|two| two[0].image.end() <= two[1].image.start());
    assert!(apart, "what is delivered is in order");
}

/// Greetings of all sorts, one after another, in both directions.
pub(crate) fn link(mut data: &[u8]) {
    let timeout = Duration::from_secs(1);
    let mut table = SessionTable::new(hello(Role::Receiver), &[Role::Receiver], timeout);
    let times = RetryPolicy {
        pause_first: timeout,
        pause_max: timeout,
        give_up_after: timeout,
    };
    let mut dialer = Dialer::new(hello(Role::Sender), times, Duration::ZERO);
    let _ = dialer.poll_dial(Duration::ZERO);
    let mut joined = 0;
    while !data.is_empty() {
        let [session, stream, streams, attempt, flags] = take(&mut data);
        let sent = Hello {
            session: SessionId([session % 3; 16]),
            role: [
                Role::Sender,
                Role::Receiver,
                Role::Requester,
                Role::Responder,
            ][usize::from(flags % 4)],
            stream: u16::from(stream),
            streams: u16::from(streams),
            attempt: u32::from(attempt),
            opening: flags & 4 != 0,
            ..hello(Role::Sender)
        };
        let mut words = Vec::new();
        sent.encode(Kind::Hello, &mut words);
        let Ok(Greeting::Hello(read)) = Hello::decode(Kind::Hello, body_of(&words)) else {
            continue;
        };
        let _ = dialer.handle_welcome(0, Greeting::Hello(read), Duration::ZERO);
        match table.admit(Greeting::Hello(read), flags & 8 == 0) {
            Admission::Refused(_) => {}
            Admission::Opened { peer, .. } => assert!(peer.stream < peer.streams),
            Admission::Joined { peer, .. } => {
                assert!(peer.stream < peer.streams);
                joined += 1;
            }
        }
    }
    canary(joined > 1);
}

/// Greetings of a session with two streams, and others.
pub(crate) fn link_seeds() -> Vec<Vec<u8>> {
    let honest = vec![1, 0, 2, 1, 4, 1, 1, 2, 1, 4, 1, 0, 2, 2, 0];
    let more = (0..60).map(|byte: u8| byte.wrapping_mul(37)).collect();
    vec![honest, more]
}
