//! Connections that break and come back.
//!
//! ```text
//! Dialer (connecting side), per stream          SessionTable (listening side)
//!
//!   down ── poll_dial ──> dialing                 HELLO ── admit ──> new session | joined | refused
//!    ^                       │ connected            │
//!    │ lost                  v HELLO                └ the newest connection of a stream wins
//!    ├────────────────── greeting
//!    │                       │ WELCOME            no connection for too long: the session has failed
//!    └────────────────────── up
//! ```
//!
//! Neither knows what the connections carry. Times are durations on any clock of the caller's that
//! never goes back.
//!
//! Invariants: one stream alone dials until the session is established, so it is opened once; a
//! session is continued only where it is known; a link that comes and goes without progress is
//! given up like one that stays away.

mod dialer;
mod pair;
mod session_table;

use std::time::Duration;

use super::hello::{Fail, FailCode, Greeting, Hello, Role, VERSION};

pub use dialer::Dialer;
pub use pair::{PairDialer, Refusal};
pub use session_table::{Admission, ConnectionId, SessionTable};

/// When to dial again and when to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicy {
    /// First pause before a connection is dialled again; it doubles from then on.
    pub pause_first: Duration,
    /// Longest pause.
    pub pause_max: Duration,
    /// After so long without progress the session has failed.
    pub give_up_after: Duration,
}

impl RetryPolicy {
    /// A connection that lasted for this long shows that the link is good, whatever it carried.
    fn steady_after(self) -> Duration {
        self.give_up_after / 4
    }
}

/// Whether `greeting` comes from a peer that can be talked to, as one of `roles`.
fn check(greeting: Greeting, own: &Hello, roles: &[Role]) -> Result<Hello, Fail> {
    let peer = match greeting {
        Greeting::Hello(hello) => hello,
        Greeting::OtherVersion(version) => {
            return Err(Fail::new(
                FailCode::Version,
                format!("one end speaks version {version} of ferry, the other version {VERSION}"),
            ));
        }
    };
    if peer.page != own.page {
        return Err(Fail::new(
            FailCode::PageSize,
            format!(
                "one end has pages of {} bytes, the other of {}",
                peer.page.bytes(),
                own.page.bytes()
            ),
        ));
    }
    if !roles.contains(&peer.role.opposite()) {
        return Err(Fail::new(FailCode::Role, both_are(peer.role)));
    }
    let features = peer.features.common(own.features);
    Ok(Hello { features, ..peer })
}

/// Why two ends do not fit together when both are of `role`, for the logs of both.
fn both_are(role: Role) -> &'static str {
    match role {
        Role::Receiver | Role::Requester => {
            "the server receives dumps and has no lazy pages to send: lazy-client --ferry needs a page-server \
             that was started with --forward-lazy"
        }
        Role::Sender | Role::Responder => {
            "the server sends the pages of a lazy dump and receives no dumps: page-server --forward needs a \
             page-server that was started without --forward-lazy, --forward and --lazy-pages"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ferry::hash::HashKey;
    use crate::ferry::hello::{Features, SessionId, VERSION};
    use crate::ferry::hello::{LOOK_ATTEMPT, Window};
    use crate::limits::FERRY_ENDED_SESSIONS_MAX;
    use crate::units::PageSize;

    const RETRY: RetryPolicy = RetryPolicy {
        pause_first: Duration::from_millis(100),
        pause_max: Duration::from_secs(1),
        give_up_after: Duration::from_secs(10),
    };

    fn hello(role: Role) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: PageSize::KIB_4,
            features: Features::ALL,
            session: SessionId([1; 16]),
            stream: 0,
            streams: 3,
            attempt: 0,
            opening: true,
            window: Window {
                frames: 10,
                bytes: 1 << 20,
            },
            hash_key: HashKey::default(),
        }
    }

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn dialer() -> Dialer {
        Dialer::new(hello(Role::Sender), RETRY, at(0))
    }

    fn table() -> SessionTable {
        SessionTable::new(
            hello(Role::Receiver),
            &[Role::Receiver],
            RETRY.give_up_after,
        )
    }

    /// Dials one stream through and returns the dialer's hello.
    fn welcome(dialer: &mut Dialer, table: &mut SessionTable, stream: u16, now: Duration) -> Hello {
        let hello = dialer.handle_connected(stream);
        match table.admit(Greeting::Hello(hello), true) {
            Admission::Opened { welcome, .. } | Admission::Joined { welcome, .. } => dialer
                .handle_welcome(stream, Greeting::Hello(welcome), now)
                .expect("they fit"),
            Admission::Refused(fail) => panic!("{fail}"),
        };
        hello
    }

    #[test]
    fn one_stream_opens_the_session_and_the_others_join_it() {
        let (mut dialer, mut table) = (dialer(), table());
        assert_eq!(dialer.poll_dial(at(0)), Some(0));
        assert_eq!(dialer.poll_dial(at(0)), None);
        assert!(welcome(&mut dialer, &mut table, 0, at(0)).opening);
        assert_eq!(dialer.poll_dial(at(0)), Some(1));
        assert_eq!(dialer.poll_dial(at(0)), Some(2));
        assert_eq!(dialer.poll_dial(at(0)), None);
        assert!(!welcome(&mut dialer, &mut table, 1, at(0)).opening);
    }

    #[test]
    fn pauses_grow_until_something_is_acknowledged() {
        let mut dialer = dialer();
        let mut now = at(0);
        for pause in [100, 200, 400, 800, 1000, 1000] {
            assert_eq!(dialer.poll_dial(now), Some(0));
            dialer.handle_lost(0, now);
            assert_eq!(dialer.poll_dial(now + at(pause - 1)), None);
            assert_eq!(dialer.deadline(), Some(now + at(pause)));
            now += at(pause);
        }
        dialer.handle_progress();
        assert_eq!(dialer.poll_dial(now), Some(0));
        dialer.handle_lost(0, now);
        assert_eq!(dialer.poll_dial(now + at(100)), Some(0));
    }

    #[test]
    fn it_gives_up_when_nothing_comes_back() {
        let mut dialer = dialer();
        assert!(!dialer.has_given_up(at(9_999)));
        assert!(dialer.has_given_up(at(10_000)));
        dialer.handle_progress();
        assert!(!dialer.has_given_up(at(100_000)));
        dialer.handle_lost(0, at(200_000));
        assert!(!dialer.has_given_up(at(209_999)));
        assert!(dialer.has_given_up(at(210_000)));
    }

    #[test]
    fn it_gives_up_on_a_link_that_comes_and_goes_without_progress() {
        let (mut dialer, mut table) = (dialer(), table());
        let mut now = at(0);
        while !dialer.has_given_up(now) {
            if dialer.poll_dial(now) == Some(0) {
                welcome(&mut dialer, &mut table, 0, now);
                assert!(
                    !dialer.has_given_up(now),
                    "a living connection is not given up"
                );
                dialer.handle_lost(0, now + at(10));
            }
            now += at(50);
            assert!(now < at(20_000), "it never gave up");
        }
        assert!(now >= at(10_000));
    }

    #[test]
    fn a_connection_that_lasted_counts_as_progress() {
        let (mut dialer, mut table) = (dialer(), table());
        assert_eq!(dialer.poll_dial(at(0)), Some(0));
        welcome(&mut dialer, &mut table, 0, at(0));
        dialer.handle_lost(0, at(30_000));
        assert!(!dialer.has_given_up(at(30_001)));
        assert!(dialer.has_given_up(at(40_000)));
    }

    #[test]
    fn the_newest_connection_of_a_stream_wins() {
        let mut table = table();
        let mut first = hello(Role::Sender);
        first.attempt = 1;
        let newer = Hello {
            attempt: 2,
            opening: false,
            ..first
        };
        assert!(matches!(
            table.admit(Greeting::Hello(first), true),
            Admission::Opened { .. }
        ));
        assert!(matches!(
            table.admit(Greeting::Hello(newer), true),
            Admission::Joined { .. }
        ));
        assert!(matches!(
            table.admit(Greeting::Hello(first), true),
            Admission::Refused(Fail {
                code: FailCode::Superseded,
                ..
            })
        ));
        // The end of the older connection is no end of the newer one.
        let connection = ConnectionId {
            session: first.session,
            for_faults: false,
            stream: 0,
        };
        table.handle_lost(connection, 1, at(0));
        assert_eq!(table.deadline(), None);
        table.handle_lost(connection, 2, at(5));
        assert_eq!(table.deadline(), Some(at(10_005)));
        assert!(!table.has_expired(first.session, at(10_004)));
        assert!(table.has_expired(first.session, at(10_005)));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_reason() {
        let mut table = table();
        let good = Hello {
            attempt: 1,
            ..hello(Role::Sender)
        };
        let code = |table: &mut SessionTable, greeting, open| match table.admit(greeting, open) {
            Admission::Refused(fail) => fail.code,
            other => panic!("{other:?}"),
        };
        let of = Greeting::Hello;
        let other_page = PageSize::new(1 << 16).expect("64 KiB");
        for (greeting, open, expected) in [
            (Greeting::OtherVersion(2), true, FailCode::Version),
            (
                of(Hello {
                    page: other_page,
                    ..good
                }),
                true,
                FailCode::PageSize,
            ),
            (
                of(Hello {
                    role: Role::Receiver,
                    ..good
                }),
                true,
                FailCode::Role,
            ),
            (
                of(Hello {
                    role: Role::Requester,
                    ..good
                }),
                true,
                FailCode::Role,
            ),
            (
                of(Hello {
                    opening: false,
                    ..good
                }),
                true,
                FailCode::UnknownSession,
            ),
            (of(good), false, FailCode::Busy),
            // As older builds refuse it, but it leaves nothing behind.
            (
                of(Hello {
                    attempt: LOOK_ATTEMPT,
                    ..good
                }),
                true,
                FailCode::UnknownSession,
            ),
        ] {
            assert_eq!(code(&mut table, greeting, open), expected);
        }
        assert!(matches!(
            table.admit(of(good), true),
            Admission::Opened { .. }
        ));
        let why = Fail::new(FailCode::Receiver, "disk full");
        table.fail(good.session, why.clone());
        let again = Hello { attempt: 2, ..good };
        assert_eq!(table.admit(of(again), true), Admission::Refused(why));
    }

    #[test]
    fn who_comes_back_to_a_session_that_went_well_is_let_in_while_it_is_remembered() {
        let mut table = SessionTable::new(hello(Role::Receiver), &[Role::Receiver], Duration::ZERO);
        let session = |number: usize| SessionId((number as u128 + 1).to_be_bytes());
        let of = |number: usize, attempt, opening| {
            Greeting::Hello(Hello {
                session: session(number),
                attempt,
                opening,
                ..hello(Role::Sender)
            })
        };
        for number in 0..=FERRY_ENDED_SESSIONS_MAX {
            let opened = table.admit(of(number, 1, true), true);
            assert!(matches!(opened, Admission::Opened { .. }), "{opened:?}");
            let forgotten = (number == FERRY_ENDED_SESSIONS_MAX).then(|| session(0));
            assert_eq!(table.finish(session(number)), forgotten);
        }
        let back = table.admit(of(1, 2, false), false);
        assert!(matches!(back, Admission::Joined { .. }), "{back:?}");
        let with_others = Greeting::Hello(Hello {
            session: session(1),
            streams: 9,
            ..hello(Role::Sender)
        });
        let refused = table.admit(with_others, false);
        assert!(matches!(refused, Admission::Refused(_)), "{refused:?}");
        let unknown = table.admit(of(0, 2, false), true);
        assert!(
            matches!(&unknown, Admission::Refused(fail) if fail.code == FailCode::UnknownSession),
            "{unknown:?}"
        );
    }

    #[test]
    fn faults_come_only_into_a_session_that_exists() {
        let roles = [Role::Sender, Role::Responder];
        let mut table = SessionTable::new(hello(Role::Sender), &roles, RETRY.give_up_after);
        let stream = Hello {
            attempt: 1,
            ..hello(Role::Receiver)
        };
        let faults = Hello {
            role: Role::Requester,
            ..stream
        };
        assert!(matches!(
            table.admit(Greeting::Hello(faults), true),
            Admission::Refused(Fail {
                code: FailCode::UnknownSession,
                ..
            })
        ));
        table.admit(Greeting::Hello(stream), true);
        let Admission::Joined { welcome, .. } = table.admit(Greeting::Hello(faults), true) else {
            panic!("refused");
        };
        assert_eq!(welcome.role, Role::Responder);
    }
}
