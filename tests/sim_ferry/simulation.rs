//! The processes at both ends, round after round, and the rule that every round is held to.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::hash::{HashKey, PageHasher};
use pageferry::ferry::hello::{Features, Hello, Role, SessionId, VERSION, Window};
use pageferry::ferry::link::{RetryPolicy, SessionTable};
use pageferry::ferry::message::StateId;

use crate::hosts::{DialingHost, ListeningHost};
use crate::memory::{self, Memory, PAGE};
use crate::net::{Net, NetworkConditions};
use crate::parts::Part;
use crate::receiving_end::{ReceivingEnd, Store};
use crate::run::{Host, abort, crash, run};
use crate::sending_end::SendingEnd;
use crate::stats::Stats;

pub(crate) const RETRY: RetryPolicy = RetryPolicy {
    pause_first: Duration::from_millis(20),
    pause_max: Duration::from_millis(500),
    give_up_after: Duration::from_secs(8),
};

/// What goes wrong in a round besides the conditions, and at which step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InjectedFailure {
    None,
    SenderCrashes(u64),
    ReceiverCrashes(u64),
    DumpEnds(u64),
    DiskFull(u64),
}

/// What a failure does when its step has come.
#[derive(Clone, Copy)]
enum Disturbance {
    SenderCrashes,
    ReceiverCrashes,
    DumpEnds,
    DiskFull,
}

impl InjectedFailure {
    fn at(self, step: u64) -> Option<Disturbance> {
        let (at, disturbance) = match self {
            InjectedFailure::None => return None,
            InjectedFailure::SenderCrashes(at) => (at, Disturbance::SenderCrashes),
            InjectedFailure::ReceiverCrashes(at) => (at, Disturbance::ReceiverCrashes),
            InjectedFailure::DumpEnds(at) => (at, Disturbance::DumpEnds),
            InjectedFailure::DiskFull(at) => (at, Disturbance::DiskFull),
        };
        (at == step).then_some(disturbance)
    }
}

/// A part of a round that is over.
struct Ended<P> {
    part: P,
    /// Its process did not crash.
    lives: bool,
}

impl<P: Part> Ended<P> {
    fn of<H: Host<Part = P>>(host: Option<H>, crashed: Option<P>) -> Ended<P> {
        let lives = host.is_some();
        let part = host.map(Host::into_part).or(crashed);
        Ended {
            part: part.expect("it took part"),
            lives,
        }
    }
}

/// The processes at both ends, as far as they outlive a round.
pub(crate) struct Simulation {
    rng: Rng,
    conditions: NetworkConditions,
    retry: RetryPolicy,
    streams: u16,
    window: Window,
    receiver_dials: bool,
    cache_bytes: u64,
    pub(crate) source: Memory,
    /// The sender's memory of what the receiver has.
    memory: PageMemory,
    store: Store,
    /// What the receiver's process knows besides its images.
    states: BTreeMap<usize, StateId>,
    hash_key: HashKey,
    /// The last image is not what either end thinks.
    tampered: bool,
    pub(crate) stats: Stats,
}

impl Simulation {
    pub(crate) fn new(mut rng: Rng, conditions: NetworkConditions) -> Simulation {
        let cache_bytes = [0, 30_000, 400_000, 64 << 20][rng.usize(0..4)];
        Simulation {
            conditions,
            retry: RETRY,
            streams: rng.u16(1..5),
            window: Window {
                frames: rng.u32(1..40),
                bytes: rng.u64(1..1 << 20),
            },
            receiver_dials: rng.bool(),
            cache_bytes,
            source: memory::first(&mut rng),
            memory: PageMemory::new(PAGE, cache_bytes),
            store: Store::default(),
            states: BTreeMap::new(),
            hash_key: HashKey(rng.u128(..).to_le_bytes()),
            tampered: false,
            stats: Stats::default(),
            rng,
        }
    }

    /// The same, with ends that go on for longer without a connection that brings the session forward.
    pub(crate) fn giving_up_after(self, give_up_after: Duration) -> Simulation {
        let retry = RetryPolicy {
            give_up_after,
            ..self.retry
        };
        Simulation { retry, ..self }
    }

    fn hello(&mut self, role: Role, session: SessionId) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: PAGE,
            features: Features::ALL,
            session,
            stream: 0,
            streams: self.streams,
            attempt: 0,
            opening: true,
            window: self.window,
            hash_key: self.hash_key,
        }
    }

    fn sender(&mut self, session: SessionId) -> SendingEnd {
        let last = self.store.images.len().checked_sub(1);
        let parent = last.map(|last| self.store.restored(last));
        let memory = std::mem::replace(&mut self.memory, PageMemory::new(PAGE, self.cache_bytes));
        SendingEnd::new(
            &mut self.rng,
            session,
            &self.source,
            parent.as_ref(),
            memory,
        )
    }

    fn receiver(&mut self) -> ReceivingEnd {
        let store = std::mem::take(&mut self.store);
        let states = std::mem::take(&mut self.states);
        let hasher = PageHasher::new(self.hash_key, PAGE);
        ReceivingEnd::new(store, states, self.streams, self.window, hasher)
    }

    /// The receiver's process has ended: what it knew besides its images is gone.
    fn receiver_ended(&mut self, receiver: ReceivingEnd) {
        self.store = receiver.store;
        self.hash_key = HashKey(self.rng.u128(..).to_le_bytes());
        self.memory.forget();
    }

    /// Somebody writes to the receiver's last image between two rounds, and neither end is told.
    pub(crate) fn tamper(&mut self) {
        self.tampered |= self.store.tamper(&mut self.rng);
    }

    /// Carries one round and checks the rule.
    pub(crate) fn round(&mut self, failure: InjectedFailure) {
        let images = self.store.images.len();
        let disagreements = self.stats.disagreements;
        let net = Net::new(self.rng.fork(), self.conditions);
        let session = SessionId(self.rng.u128(1..).to_le_bytes());
        let (succeeded, cuts) = if self.receiver_dials {
            self.round_receiver_dials(net, session, failure)
        } else {
            self.round_sender_dials(net, session, failure)
        };
        self.stats.rounds += 1;
        // After any round the sender knows what the receiver has, or knows that it does not.
        let disagreed = self.stats.disagreements > disagreements;
        assert!(
            self.tampered || !disagreed,
            "the ends disagree about an image that nobody wrote to"
        );
        let published = self.store.images.len() - images;
        // A round that fails early has not looked at the image: the next one may find what was written to it.
        self.tampered &= published == 0 && !disagreed;
        assert!(published <= 1, "one session, one image");
        if published == 1 {
            let restored = self.store.restored(images);
            assert!(
                restored == self.source,
                "the image is the memory of the round"
            );
        }
        if succeeded {
            assert_eq!(
                published, 1,
                "success is reported only for what is published"
            );
            self.stats.successes += 1;
            self.stats.resumed_rounds += u64::from(cuts > 0);
        } else {
            self.stats.failures += 1;
            self.stats.unheard += published as u64;
        }
    }

    fn round_sender_dials(
        &mut self,
        mut net: Net,
        session: SessionId,
        failure: InjectedFailure,
    ) -> (bool, u64) {
        let hello = self.hello(Role::Sender, session);
        let mut dial = Some(DialingHost::new(self.sender(session), hello, self.retry));
        let mut listen = Some(self.listening_receiver());
        let mut crashed = None;
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match failure.at(step) {
                Some(Disturbance::SenderCrashes) => crashed = crash(dial, net),
                Some(Disturbance::ReceiverCrashes) => {
                    if let Some(receiver) = crash(listen, net) {
                        self.stats.add(&receiver.stats);
                        self.receiver_ended(receiver);
                        // Another process listens on the same port.
                        *listen = Some(self.listening_receiver());
                    }
                }
                Some(Disturbance::DumpEnds) => abort(dial),
                Some(Disturbance::DiskFull) => abort(listen),
                None => {}
            },
        );
        let sender = Ended::of(dial, crashed);
        self.settle(&net, sender, Ended::of(listen, None))
    }

    fn listening_receiver(&mut self) -> ListeningHost<ReceivingEnd> {
        let own = self.hello(Role::Receiver, SessionId::default());
        let table = SessionTable::new(own, &[Role::Receiver], self.retry.give_up_after);
        ListeningHost::new(self.receiver(), table)
    }

    fn round_receiver_dials(
        &mut self,
        mut net: Net,
        session: SessionId,
        failure: InjectedFailure,
    ) -> (bool, u64) {
        let own = self.hello(Role::Sender, SessionId::default());
        let table = SessionTable::new(own, &[Role::Sender], self.retry.give_up_after);
        let mut listen = Some(ListeningHost::new(self.sender(session), table));
        let hello = self.hello(Role::Receiver, session);
        let mut dial = Some(DialingHost::new(self.receiver(), hello, self.retry));
        let (mut crashed_sender, mut crashed_receiver) = (None, None);
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match failure.at(step) {
                Some(Disturbance::SenderCrashes) => crashed_sender = crash(listen, net),
                Some(Disturbance::ReceiverCrashes) => crashed_receiver = crash(dial, net),
                Some(Disturbance::DumpEnds) => abort(listen),
                Some(Disturbance::DiskFull) => abort(dial),
                None => {}
            },
        );
        let sender = Ended::of(listen, crashed_sender);
        self.settle(&net, sender, Ended::of(dial, crashed_receiver))
    }

    /// Takes back what outlives the round. Returns whether the dump has succeeded.
    fn settle(
        &mut self,
        net: &Net,
        sender: Ended<SendingEnd>,
        receiver: Ended<ReceivingEnd>,
    ) -> (bool, u64) {
        let succeeded = sender.part.has_succeeded() && sender.lives;
        self.stats.crashes += u64::from(!sender.lives) + u64::from(!receiver.lives);
        self.stats.add(&sender.part.stats);
        self.stats.add(&receiver.part.stats);
        self.stats.cuts += net.cuts;
        self.stats.cuts_in_recovery += net.cuts_in_recovery;
        self.stats.crashes_in_recovery += net.crashes_in_recovery;
        self.stats.flips += net.flips;
        self.stats.trace = self.stats.trace.rotate_left(5) ^ u64::from(net.trace);
        self.memory = sender.part.memory;
        if !sender.lives {
            self.memory.forget();
        }
        if receiver.lives {
            self.store = receiver.part.store;
            self.states = receiver.part.states;
        } else {
            self.receiver_ended(receiver.part);
        }
        (succeeded, net.cuts)
    }
}
