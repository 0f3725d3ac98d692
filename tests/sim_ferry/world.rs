//! The processes at both ends, round after round, and the rule that every round is held to.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::hash::{HashKey, PageHasher};
use pageferry::ferry::hello::{Features, Hello, Role, SessionId, VERSION, Window};
use pageferry::ferry::link::{Harbor, Patience};
use pageferry::ferry::message::StateId;

use crate::hosts::{DialingHost, ListeningHost};
use crate::memory::{self, Memory, PAGE};
use crate::net::{Net, Weather};
use crate::parts::Part;
use crate::pusher::Pusher;
use crate::run::{Host, abort, crash, run};
use crate::stats::Stats;
use crate::taker::{Store, Taker};

pub(crate) const PATIENCE: Patience = Patience {
    pause_first: Duration::from_millis(20),
    pause_max: Duration::from_millis(500),
    give_up_after: Duration::from_secs(8),
};

/// What goes wrong in a round besides the weather, and at which step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trouble {
    None,
    PusherCrashes(u64),
    TakerCrashes(u64),
    DumpEnds(u64),
    DiskFull(u64),
}

/// What a trouble does when its step has come.
#[derive(Clone, Copy)]
enum Blow {
    PusherCrashes,
    TakerCrashes,
    DumpEnds,
    DiskFull,
}

impl Trouble {
    fn at(self, step: u64) -> Option<Blow> {
        let (at, blow) = match self {
            Trouble::None => return None,
            Trouble::PusherCrashes(at) => (at, Blow::PusherCrashes),
            Trouble::TakerCrashes(at) => (at, Blow::TakerCrashes),
            Trouble::DumpEnds(at) => (at, Blow::DumpEnds),
            Trouble::DiskFull(at) => (at, Blow::DiskFull),
        };
        (at == step).then_some(blow)
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
pub(crate) struct World {
    rng: Rng,
    weather: Weather,
    streams: u16,
    window: Window,
    taker_dials: bool,
    cache_bytes: u64,
    pub(crate) source: Memory,
    /// The pusher's memory of what the taker has.
    memory: PageMemory,
    store: Store,
    /// What the taker's process knows besides its images.
    states: BTreeMap<usize, StateId>,
    hash_key: HashKey,
    /// The last image is not what either end thinks.
    tampered: bool,
    pub(crate) stats: Stats,
}

impl World {
    pub(crate) fn new(mut rng: Rng, weather: Weather) -> World {
        let cache_bytes = [0, 30_000, 400_000, 64 << 20][rng.usize(0..4)];
        World {
            weather,
            streams: rng.u16(1..5),
            window: Window {
                frames: rng.u32(1..40),
                bytes: rng.u64(1..1 << 20),
            },
            taker_dials: rng.bool(),
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

    fn pusher(&mut self, session: SessionId) -> Pusher {
        let last = self.store.images.len().checked_sub(1);
        let parent = last.map(|last| self.store.restored(last));
        let memory = std::mem::replace(&mut self.memory, PageMemory::new(PAGE, self.cache_bytes));
        Pusher::new(
            &mut self.rng,
            session,
            &self.source,
            parent.as_ref(),
            memory,
        )
    }

    fn taker(&mut self) -> Taker {
        let store = std::mem::take(&mut self.store);
        let states = std::mem::take(&mut self.states);
        let hasher = PageHasher::new(self.hash_key, PAGE);
        Taker::new(store, states, self.streams, self.window, hasher)
    }

    /// The taker's process has ended: what it knew besides its images is gone.
    fn taker_ended(&mut self, taker: Taker) {
        self.store = taker.store;
        self.hash_key = HashKey(self.rng.u128(..).to_le_bytes());
        self.memory.forget();
    }

    /// Somebody writes to the taker's last image between two rounds, and neither end is told.
    pub(crate) fn tamper(&mut self) {
        self.tampered = self.store.tamper(&mut self.rng);
    }

    /// Carries one round and checks the rule.
    pub(crate) fn round(&mut self, trouble: Trouble) {
        let images = self.store.images.len();
        let disagreements = self.stats.disagreements;
        let net = Net::new(self.rng.fork(), self.weather);
        let session = SessionId(self.rng.u128(1..).to_le_bytes());
        let (succeeded, cuts) = if self.taker_dials {
            self.round_taker_dials(net, session, trouble)
        } else {
            self.round_pusher_dials(net, session, trouble)
        };
        self.stats.rounds += 1;
        // After any round the pusher knows what the taker has, or knows that it does not.
        let tampered = std::mem::take(&mut self.tampered);
        assert!(
            tampered || self.stats.disagreements == disagreements,
            "the ends disagree about an image that nobody wrote to"
        );
        let published = self.store.images.len() - images;
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

    fn round_pusher_dials(
        &mut self,
        mut net: Net,
        session: SessionId,
        trouble: Trouble,
    ) -> (bool, u64) {
        let hello = self.hello(Role::Pusher, session);
        let mut dial = Some(DialingHost::new(self.pusher(session), hello, PATIENCE));
        let mut listen = Some(self.listening_taker());
        let mut crashed = None;
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match trouble.at(step) {
                Some(Blow::PusherCrashes) => crashed = crash(dial, net),
                Some(Blow::TakerCrashes) => {
                    if let Some(taker) = crash(listen, net) {
                        self.stats.add(&taker.stats);
                        self.taker_ended(taker);
                        // Another process listens on the same port.
                        *listen = Some(self.listening_taker());
                    }
                }
                Some(Blow::DumpEnds) => abort(dial),
                Some(Blow::DiskFull) => abort(listen),
                None => {}
            },
        );
        let pusher = Ended::of(dial, crashed);
        self.settle(&net, pusher, Ended::of(listen, None))
    }

    fn listening_taker(&mut self) -> ListeningHost<Taker> {
        let own = self.hello(Role::Taker, SessionId::default());
        let harbor = Harbor::new(own, &[Role::Taker], PATIENCE.give_up_after);
        ListeningHost::new(self.taker(), harbor)
    }

    fn round_taker_dials(
        &mut self,
        mut net: Net,
        session: SessionId,
        trouble: Trouble,
    ) -> (bool, u64) {
        let own = self.hello(Role::Pusher, SessionId::default());
        let harbor = Harbor::new(own, &[Role::Pusher], PATIENCE.give_up_after);
        let mut listen = Some(ListeningHost::new(self.pusher(session), harbor));
        let hello = self.hello(Role::Taker, session);
        let mut dial = Some(DialingHost::new(self.taker(), hello, PATIENCE));
        let (mut crashed_pusher, mut crashed_taker) = (None, None);
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match trouble.at(step) {
                Some(Blow::PusherCrashes) => crashed_pusher = crash(listen, net),
                Some(Blow::TakerCrashes) => crashed_taker = crash(dial, net),
                Some(Blow::DumpEnds) => abort(listen),
                Some(Blow::DiskFull) => abort(dial),
                None => {}
            },
        );
        let pusher = Ended::of(listen, crashed_pusher);
        self.settle(&net, pusher, Ended::of(dial, crashed_taker))
    }

    /// Takes back what outlives the round. Returns whether the dump has succeeded.
    fn settle(&mut self, net: &Net, pusher: Ended<Pusher>, taker: Ended<Taker>) -> (bool, u64) {
        let succeeded = pusher.part.has_succeeded() && pusher.lives;
        self.stats.crashes += u64::from(!pusher.lives) + u64::from(!taker.lives);
        self.stats.add(&pusher.part.stats);
        self.stats.add(&taker.part.stats);
        self.stats.cuts += net.cuts;
        self.stats.flips += net.flips;
        self.memory = pusher.part.memory;
        if !pusher.lives {
            self.memory.forget();
        }
        if taker.lives {
            self.store = taker.part.store;
            self.states = taker.part.states;
        } else {
            self.taker_ended(taker.part);
        }
        (succeeded, net.cuts)
    }
}
