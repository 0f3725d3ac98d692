//! Tests of an intake, with restores that this process plays.

use std::io::Write;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

/// Nobody keeps copies.
fn ignored(_: SocketChange, _: Option<BorrowedFd<'_>>) {}

fn listen(dir: &Path) -> Intake {
    Intake::listen(dir, &mut ignored).unwrap()
}

fn events(intake: &mut Intake) -> Vec<IntakeEvent> {
    let mut events = Vec::new();
    while let Some(event) = intake.next(&mut ignored).unwrap() {
        let ended = matches!(event, IntakeEvent::End);
        events.push(event);
        intake.handled(&mut ignored).unwrap();
        if ended {
            break;
        }
    }
    events
}

#[test]
fn the_message_that_all_is_restored_is_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut intake = listen(dir.path());
    assert!(events(&mut intake).is_empty());
    let mut restore = UnixStream::connect(intake.path()).unwrap();
    restore.write_all(&(-7i32).to_le_bytes()).unwrap();
    assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
    restore.write_all(b"FTSR").unwrap();
    // The restore does not hang up.
    let last = events(&mut intake);
    assert!(
        matches!(last[..], [IntakeEvent::Finished, IntakeEvent::End]),
        "{last:?}"
    );
    assert!(intake.socket().is_none());
}

#[test]
fn other_connections_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut intake = listen(dir.path());
    let connect = || UnixStream::connect(dir.path().join(SOCKET_NAME)).unwrap();
    // This process is no restore, by its command line.
    drop(connect());
    let _silent = connect();
    for bytes in [&b"\x07"[..], b"GET / HTTP/1.1\r\n"] {
        connect().write_all(bytes).unwrap();
        assert!(events(&mut intake).is_empty());
        assert!(intake.is_listening());
    }
    let many: Vec<UnixStream> = (0..2 * UNDECIDED_MAX).map(|_| connect()).collect();
    assert!(events(&mut intake).is_empty());
    let mut restore = connect();
    restore.write_all(&(-7i32).to_le_bytes()).unwrap();
    assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
    assert!(!intake.is_listening());
    drop(many);
    drop(restore);
    assert!(matches!(events(&mut intake)[..], [IntakeEvent::End]));
}

#[test]
fn a_restore_that_hangs_up_has_ended_without_that_message() {
    let dir = tempfile::tempdir().unwrap();
    let mut intake = listen(dir.path());
    let mut restore = UnixStream::connect(intake.path()).unwrap();
    restore.write_all(&(-7i32).to_le_bytes()).unwrap();
    drop(restore);
    let all = events(&mut intake);
    assert!(
        matches!(all[..], [IntakeEvent::Zombie(7), IntakeEvent::End]),
        "{all:?}"
    );
}

fn wakes(intake: &Intake) -> bool {
    let polled = PollFd::new(intake.socket().unwrap(), PollFlags::POLLIN);
    poll(&mut [polled], PollTimeout::ZERO).unwrap() > 0
}

#[test]
fn what_is_incomplete_wakes_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut intake = listen(dir.path());
    let mut restore = UnixStream::connect(intake.path()).unwrap();
    assert!(wakes(&intake));
    assert!(events(&mut intake).is_empty());
    restore.write_all(&7i32.to_le_bytes()).unwrap();
    assert!(wakes(&intake));
    assert!(events(&mut intake).is_empty());
    // The byte with the descriptor has not come.
    assert!(!wakes(&intake));
    let (_read, write) = nix::unistd::pipe().unwrap();
    fdpass::send(restore.as_fd(), b"x", Some(write.as_fd())).unwrap();
    assert!(wakes(&intake));
    let own = std::process::id().cast_signed();
    let came = events(&mut intake);
    assert!(
        matches!(came[..], [IntakeEvent::Process(7, _, host)] if host == own),
        "{came:?}"
    );
    assert!(!wakes(&intake));
}

/// An intake whose process can be killed, and what is kept of it then.
fn kept(dir: &Path) -> (Intake, IntakeCopies) {
    let mut copies = IntakeCopies::default();
    let intake = Intake::listen(dir, &mut keeping(&mut copies)).unwrap();
    (intake, copies)
}

fn keeping(copies: &mut IntakeCopies) -> impl FnMut(SocketChange, Option<BorrowedFd<'_>>) {
    move |change, fd| copies.apply(change, fd.map(|fd| fd.try_clone_to_owned().unwrap()))
}

/// As if its process were killed.
fn kill(mut intake: Intake) {
    intake.path = None;
    drop(intake);
}

fn process(restore: &UnixStream, pid: i32) {
    let (_read, write) = nix::unistd::pipe().unwrap();
    fdpass::send(restore.as_fd(), &pid.to_le_bytes(), None).unwrap();
    fdpass::send(restore.as_fd(), b"x", Some(write.as_fd())).unwrap();
}

#[test]
fn what_was_not_handled_is_there_for_who_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    // How many messages are handled before the kill, which comes when the next one has been looked at.
    for handled in 0..=3 {
        let (mut intake, mut copies) = kept(dir.path());
        let mut restore = UnixStream::connect(intake.path()).unwrap();
        process(&restore, 7);
        process(&restore, 8);
        restore.write_all(b"FTSR").unwrap();
        drop(restore);
        let mut on_change = keeping(&mut copies);
        for _ in 0..handled {
            intake.next(&mut on_change).unwrap().unwrap();
            intake.handled(&mut on_change).unwrap();
        }
        intake.next(&mut on_change).unwrap().unwrap();
        drop(on_change);
        kill(intake);
        assert_eq!(copies.is_over(), handled == 3);
        if copies.is_over() {
            break;
        }
        let mut intake = Intake::go_on(dir.path(), copies).unwrap();
        assert!(wakes(&intake) && intake.has_come(&mut ignored).unwrap());
        let came = events(&mut intake);
        let known = |event: &IntakeEvent| match event {
            IntakeEvent::Process(pid, ..) => *pid,
            event => u32::from(matches!(event, IntakeEvent::Finished)),
        };
        let came: Vec<u32> = came.iter().map(known).collect();
        assert_eq!(came, [7, 8, 1, 0][handled..]);
    }
}

#[test]
fn whoever_goes_on_listens_and_knows_other_connections() {
    let dir = tempfile::tempdir().unwrap();
    let (mut intake, mut copies) = kept(dir.path());
    let connect = || UnixStream::connect(dir.path().join(SOCKET_NAME)).unwrap();
    let other = connect();
    assert!(intake.next(&mut keeping(&mut copies)).unwrap().is_none());
    assert_eq!(copies.connections.len(), 1);
    kill(intake);
    let mut intake = Intake::go_on(dir.path(), copies).unwrap();
    assert!(!intake.has_come(&mut ignored).unwrap() && intake.is_listening());
    // One that is killed before it has accepted anybody.
    let mut restore = connect();
    restore.write_all(&(-7i32).to_le_bytes()).unwrap();
    assert!(intake.has_come(&mut ignored).unwrap());
    assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
    drop(other);
    drop(intake);
    assert!(!dir.path().join(SOCKET_NAME).exists());
}

#[test]
fn who_is_shut_out_has_sent_what_was_sent_before() {
    let dir = tempfile::tempdir().unwrap();
    let (mut intake, copies) = kept(dir.path());
    let mut restore = UnixStream::connect(intake.path()).unwrap();
    restore.write_all(&(-7i32).to_le_bytes()).unwrap();
    intake.shut(&mut ignored);
    assert!(restore.write_all(b"FTSR").is_err());
    assert!(UnixStream::connect(intake.path()).is_err());
    let all = events(&mut intake);
    assert!(
        matches!(all[..], [IntakeEvent::Zombie(7), IntakeEvent::End]),
        "{all:?}"
    );
    drop(copies);
}
