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
use crate::net::{Event, Net, Side, Weather};
use crate::parts::Part;
use crate::pusher::Pusher;
use crate::stats::Stats;
use crate::taker::{Store, Taker};

const PATIENCE: Patience = Patience {
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
        let pusher = self.pusher(session);
        let taker = self.taker();
        let own = self.hello(Role::Taker, SessionId::default());
        let harbor = |own| Harbor::new(own, &[Role::Taker], PATIENCE.give_up_after);
        let mut dial = Some(DialingHost::new(pusher, hello, PATIENCE));
        let mut listen = Some(ListeningHost::new(taker, harbor(own)));
        let mut crashed = None;
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match trouble {
                Trouble::PusherCrashes(at) if at == step => {
                    if let Some(mut host) = dial.take() {
                        host.hang_up(net);
                        crashed = Some(host.part);
                    }
                }
                Trouble::TakerCrashes(at) if at == step => {
                    if let Some(mut host) = listen.take() {
                        host.hang_up(net);
                        self.stats.add(&host.part.stats);
                        self.taker_ended(host.part);
                        // Another process listens on the same port.
                        let own = self.hello(Role::Taker, SessionId::default());
                        *listen = Some(ListeningHost::new(self.taker(), harbor(own)));
                    }
                }
                Trouble::DumpEnds(at) if at == step => {
                    dial.iter_mut().for_each(|host| host.part.abort());
                }
                Trouble::DiskFull(at) if at == step => {
                    listen.iter_mut().for_each(|host| host.part.abort());
                }
                _ => {}
            },
        );
        let pusher_lives = dial.is_some();
        let pusher = dial.map(|host| host.part).or(crashed);
        let taker = listen.map(|host| host.part);
        self.settle(&net, pusher, pusher_lives, taker, true)
    }

    fn round_taker_dials(
        &mut self,
        mut net: Net,
        session: SessionId,
        trouble: Trouble,
    ) -> (bool, u64) {
        let pusher = self.pusher(session);
        let hello = self.hello(Role::Taker, session);
        let taker = self.taker();
        let own = self.hello(Role::Pusher, SessionId::default());
        let harbor = Harbor::new(own, &[Role::Pusher], PATIENCE.give_up_after);
        let mut dial = Some(DialingHost::new(taker, hello, PATIENCE));
        let mut listen = Some(ListeningHost::new(pusher, harbor));
        let (mut crashed_pusher, mut crashed_taker) = (None, None);
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| match trouble {
                Trouble::PusherCrashes(at) if at == step => {
                    if let Some(mut host) = listen.take() {
                        host.hang_up(net);
                        crashed_pusher = Some(host.part);
                    }
                }
                Trouble::TakerCrashes(at) if at == step => {
                    if let Some(mut host) = dial.take() {
                        host.hang_up(net);
                        crashed_taker = Some(host.part);
                    }
                }
                Trouble::DumpEnds(at) if at == step => {
                    listen.iter_mut().for_each(|host| host.part.abort());
                }
                Trouble::DiskFull(at) if at == step => {
                    dial.iter_mut().for_each(|host| host.part.abort());
                }
                _ => {}
            },
        );
        let pusher_lives = listen.is_some();
        let taker_lives = dial.is_some();
        let pusher = listen.map(|host| host.part).or(crashed_pusher);
        let taker = dial.map(|host| host.part).or(crashed_taker);
        self.settle(&net, pusher, pusher_lives, taker, taker_lives)
    }

    /// Takes back what outlives the round. Returns whether the dump has succeeded.
    fn settle(
        &mut self,
        net: &Net,
        pusher: Option<Pusher>,
        pusher_lives: bool,
        taker: Option<Taker>,
        taker_lives: bool,
    ) -> (bool, u64) {
        let pusher = pusher.expect("a pusher took part");
        let taker = taker.expect("a taker took part");
        let succeeded = pusher.has_succeeded() && pusher_lives;
        self.stats.crashes += u64::from(!pusher_lives) + u64::from(!taker_lives);
        self.stats.add(&pusher.stats);
        self.stats.add(&taker.stats);
        self.stats.cuts += net.cuts;
        self.stats.flips += net.flips;
        self.memory = pusher.memory;
        if !pusher_lives {
            self.memory.forget();
        }
        if taker_lives {
            self.store = taker.store;
            self.states = taker.states;
        } else {
            self.taker_ended(taker);
        }
        (succeeded, net.cuts)
    }
}

type Dial<D> = Option<DialingHost<D>>;
type Listen<L> = Option<ListeningHost<L>>;

/// Runs both hosts until each has come to an end. `disturb` is called before every step.
fn run<D: Part, L: Part>(
    net: &mut Net,
    dial: &mut Dial<D>,
    listen: &mut Listen<L>,
    mut disturb: impl FnMut(u64, &mut Net, &mut Dial<D>, &mut Listen<L>),
) {
    for step in 0.. {
        assert!(step < 1_000_000, "the session never ends");
        disturb(step, net, dial, listen);
        if let Some(host) = dial {
            host.pump(net);
            if host.is_over() {
                host.hang_up(net);
            }
        }
        if let Some(host) = listen {
            host.pump(net);
            if host.is_over() {
                host.hang_up(net);
            }
        }
        let dial_over = dial.as_ref().is_none_or(DialingHost::is_over);
        let listen_over = listen.as_ref().is_none_or(ListeningHost::is_over);
        if dial_over && listen_over {
            return;
        }
        let deadlines = [
            dial.as_ref().and_then(DialingHost::deadline),
            listen.as_ref().and_then(ListeningHost::deadline),
        ];
        let deadline = deadlines.into_iter().flatten().min();
        match (net.next_at(), deadline) {
            (Some(event), deadline) if deadline.is_none_or(|at| event <= at) => {
                if let Some(event) = net.pop() {
                    dispatch(net, dial, listen, event);
                }
            }
            (_, Some(deadline)) => net.now = net.now.max(deadline),
            (_, None) => {
                // A listening side that has never heard of a session waits for one.
                let waits = listen.as_ref().is_some_and(|host| !host.has_session());
                assert!(dial_over && waits, "both ends wait for each other");
                return;
            }
        }
    }
}

fn dispatch<D: Part, L: Part>(
    net: &mut Net,
    dial: &mut Dial<D>,
    listen: &mut Listen<L>,
    event: Event,
) {
    match event {
        Event::Connected(conn) => {
            match listen {
                Some(host) => host.connected(net, conn),
                None => net.close(conn, Side::Listening),
            }
            if let Some(host) = dial {
                host.connected(net, conn);
            }
        }
        Event::Refused(conn) | Event::Lost(conn, Side::Dialing) => {
            if let Some(host) = dial {
                host.lost(net, conn);
            }
        }
        Event::Lost(conn, Side::Listening) => {
            if let Some(host) = listen {
                host.lost(net, conn);
            }
        }
        Event::Bytes(conn, Side::Dialing, bytes) => {
            if let Some(host) = dial {
                host.received(net, conn, &bytes);
            }
        }
        Event::Bytes(conn, Side::Listening, bytes) => {
            if let Some(host) = listen {
                host.received(net, conn, &bytes);
            }
        }
    }
}
