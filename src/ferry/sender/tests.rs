//! The sender's rules one by one; tests/sim_ferry plays them all together.

use super::*;
use crate::ferry::hello::FailCode;
use crate::ferry::message::StateId;
use crate::units::PageRange;

fn sender(frames: u32) -> Sender {
    let bytes = 1000;
    Sender::new(PageSize::KIB_4, 2, Window { frames, bytes })
}

fn ack(sender: &mut Sender, stream: u16, safe: u64, to: u64) -> SenderEvent<'static> {
    let answer = Answer {
        to,
        value: 1,
        state: StateId::NONE,
    };
    let ack = Ack {
        safe,
        answer,
        complete: false,
        bye_received: false,
        arrived: 0,
    };
    sender.handle_ack(stream, ack).expect("a fitting ACK")
}

fn bring_up(sender: &mut Sender, stream: u16) {
    sender.stream_up(stream);
    let safe = sender.safe;
    ack(sender, stream, safe, 0);
}

#[test]
fn nothing_is_sent_before_the_first_acknowledgement() {
    let mut sender = sender(10);
    assert_eq!(sender.submit(Kind::Pages, 1), 1);
    assert_eq!(sender.poll(0), None);
    sender.stream_up(0);
    assert_eq!(sender.poll(0), None);
    ack(&mut sender, 0, 0, 0);
    assert_eq!(sender.poll(0), Some(Transmit::Numbered(1)));
    assert_eq!(sender.poll(0), None);
}

#[test]
fn what_a_lost_connection_carried_goes_to_another_and_nothing_else_does() {
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    bring_up(&mut sender, 1);
    for _ in 0..5 {
        sender.submit(Kind::Pages, 1);
    }
    for (stream, number) in [(0, 1), (1, 2), (0, 3), (1, 4)] {
        assert_eq!(sender.poll(stream), Some(Transmit::Numbered(number)));
    }
    ack(&mut sender, 1, 1, 0);
    sender.stream_down(0);
    let mut again = Vec::new();
    while let Some(Transmit::Numbered(number)) = sender.poll(1) {
        again.push(number);
    }
    assert_eq!(again, [3, 5]);
}

#[test]
fn the_window_holds_by_frames_and_by_bytes() {
    let mut by_frames = sender(2);
    by_frames.submit(Kind::Pages, 1);
    by_frames.submit(Kind::Pages, 1);
    assert!(!by_frames.has_room_for(1));
    by_frames.stream_up(0);
    ack(&mut by_frames, 0, 1, 0);
    assert!(by_frames.has_room_for(1));

    let mut by_bytes = sender(100);
    assert!(by_bytes.has_room_for(5000), "a single frame always fits");
    by_bytes.submit(Kind::Pages, 999);
    assert!(by_bytes.has_room_for(1));
    assert!(!by_bytes.has_room_for(2));
}

#[test]
fn an_answer_counts_once_however_often_it_is_repeated() {
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    let question = sender.submit(Kind::Open, 1);
    let answered = |event| {
        matches!(
            event,
            SenderEvent::Acked {
                answer: Some(_),
                ..
            }
        )
    };
    assert!(!answered(ack(&mut sender, 0, question, 0)));
    assert!(sender.has_question() && !sender.is_settled());
    assert!(answered(ack(&mut sender, 0, question, question)));
    assert!(!answered(ack(&mut sender, 0, question, question)));
    assert!(sender.is_settled());
}

#[test]
fn acknowledgements_of_what_was_never_sent_are_refused() {
    let mut sender = sender(10);
    sender.stream_up(0);
    sender.submit(Kind::Pages, 1);
    for (safe, to) in [(2, 0), (1, 2)] {
        let answer = Answer {
            to,
            ..Answer::default()
        };
        let ack = Ack {
            safe,
            answer,
            complete: false,
            bye_received: false,
            arrived: 0,
        };
        let error = sender.handle_ack(0, ack);
        assert_eq!(error, Err(SessionError::NeverSent { safe: 2, last: 1 }));
    }
}

#[test]
fn a_question_for_hashes_goes_on_where_it_broke_off() {
    let target = Target::Process(1);
    let page = PageSize::KIB_4;
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    sender.ask_hashes(target);
    let asked = |from| {
        Some(Transmit::WantHashes(WantHashes {
            target,
            from: Vaddr(from),
        }))
    };
    assert_eq!(sender.poll(0), asked(0));
    let run = PageRange::new(0x1000, 0x3000);
    let mut frame = Vec::new();
    let hashes = [Default::default(); 2];
    Hashes::encode(target, page, &[run], &hashes, false, &mut frame);
    let body = &frame[crate::ferry::frame::HEADER_BYTES..];
    assert!(matches!(
        sender.handle(0, Kind::Hashes, body),
        Ok(SenderEvent::Hashes(_))
    ));
    assert_eq!(sender.hashes_known_below(target), Some(Vaddr(0x3000)));
    assert_eq!(
        sender.handle(0, Kind::Hashes, body),
        Err(SessionError::UnaskedHashes(target)),
        "the same again"
    );
    sender.stream_down(0);
    bring_up(&mut sender, 1);
    assert_eq!(sender.poll(1), asked(0x3000));
}

#[test]
fn hashes_of_several_targets_are_told_apart() {
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    let (first, second) = (Target::Process(1), Target::Process(2));
    for target in [first, second] {
        sender.ask_hashes(target);
        assert!(matches!(sender.poll(0), Some(Transmit::WantHashes(_))));
    }
    let mut frame = Vec::new();
    Hashes::encode(first, PageSize::KIB_4, &[], &[], true, &mut frame);
    let body = &frame[crate::ferry::frame::HEADER_BYTES..];
    assert!(sender.handle(0, Kind::Hashes, body).is_ok());
    assert_eq!(sender.hashes_known_below(first), None);
    assert_eq!(sender.hashes_known_below(second), Some(Vaddr(0)));
}

#[test]
fn the_end_is_told_once_on_every_connection() {
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    sender.stream_up(1);
    sender.submit(Kind::Pages, 1);
    sender.leave();
    assert!(!sender.has_sent_end());
    for stream in [0, 1] {
        assert_eq!(sender.poll(stream), Some(Transmit::Bye));
        assert_eq!(sender.poll(stream), None);
    }
    assert!(sender.has_sent_end());
}

#[test]
fn an_end_that_was_lost_with_its_connection_is_told_on_the_next() {
    let mut sender = sender(10);
    bring_up(&mut sender, 0);
    sender.fail(Fail::new(FailCode::Sender, "over"));
    sender.handle_end(0);
    assert!(!sender.is_end_confirmed(), "nothing was said");
    for heard in [false, true] {
        assert!(matches!(sender.poll(0), Some(Transmit::Fail(_))));
        if heard {
            sender.handle_end(0);
        }
        sender.stream_down(0);
        assert_eq!(sender.is_end_confirmed(), heard);
        sender.stream_up(0);
    }
}
