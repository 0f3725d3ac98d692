//! Seeded simulation of a post-copy over ferry: a forwarder that drains a dump, a lazy-client whose
//! processes run, fork and unmap meanwhile, and the same network as in pre-copy; either end may crash or
//! fail at any step, and somebody may write to the client's images of an earlier round.
//!
//! Rule: no page is installed that is not the source's; the dump is let go only when everything is at the
//! client; the client reports success only when the dump was let go; and when nobody crashes or fails and
//! the network is good in the end, both come to that.

mod client;
mod forwarder;
mod pair;

use std::collections::BTreeMap;

use fastrand::Rng;
use pageferry::criu::header::Target;
use pageferry::ferry::hash::HashKey;
use pageferry::ferry::hello::{Features, Hello, Role, SessionId, VERSION, Window};
use pageferry::ferry::link::SessionTable;

use crate::conditions;
use crate::hosts::ListeningHost;
use crate::memory::{self, Memory, PAGE};
use crate::net::{Net, NetworkConditions};
use crate::parts::Part;
use crate::run::{Host, abort, crash, run};
use crate::seeds::{Seed, are_usual, seeds};
use crate::simulation::RETRY;
use client::{Client, End};
use forwarder::{Dump, Forwarder};
use pair::PairHost;

/// What has been met with, and how often.
#[derive(Clone, Default, Debug)]
struct Observed(BTreeMap<&'static str, u64>);

impl Observed {
    fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    fn add_all(&mut self, others: &Observed) {
        for (what, count) in &others.0 {
            self.add(what, *count);
        }
    }

    fn count(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

/// What goes wrong besides the conditions, and at which step.
#[derive(Clone, Copy, Debug)]
enum InjectedFailure {
    None,
    ForwarderCrashes(u64),
    ClientCrashes(u64),
    ForwarderStopped(u64),
    RestoreFails(u64),
}

fn failure(rng: &mut Rng) -> InjectedFailure {
    let latest = [10, 100, 1000][rng.usize(0..3)];
    let at = rng.u64(0..latest);
    match rng.u8(0..12) {
        0 => InjectedFailure::ForwarderCrashes(at),
        1 => InjectedFailure::ClientCrashes(at),
        2 => InjectedFailure::ForwarderStopped(at),
        3 => InjectedFailure::RestoreFails(at),
        _ => InjectedFailure::None,
    }
}

/// A dump, and what is left at the other host of an earlier round.
struct Simulation {
    rng: Rng,
    conditions: NetworkConditions,
    source: Memory,
    earlier: Memory,
    /// Every so many steps somebody writes to the earlier round.
    tampered_every: Option<u64>,
    seen: Observed,
    /// That of the network.
    trace: u64,
}

fn private(memory: &Memory) -> Memory {
    let private = memory.iter();
    let private = private.filter(|(target, _)| matches!(target, Target::Process(_)));
    private
        .map(|(target, pages)| (*target, pages.clone()))
        .collect()
}

impl Simulation {
    fn new(mut rng: Rng, conditions: NetworkConditions) -> Simulation {
        let mut source = memory::first(&mut rng);
        let earlier = match rng.u8(0..3) {
            0 => Memory::new(),
            _ => private(&source),
        };
        memory::run_on(&mut rng, &mut source);
        let tampered = !earlier.is_empty() && rng.u8(0..3) == 0;
        Simulation {
            conditions,
            source: private(&source),
            earlier,
            tampered_every: tampered.then(|| rng.u64(10..100)),
            seen: Observed::default(),
            trace: 0,
            rng,
        }
    }

    fn hello(&mut self, role: Role, session: SessionId, hash_key: HashKey) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: PAGE,
            features: Features::FAULTS.with(Features::HASHES),
            session,
            stream: 0,
            streams: 1,
            attempt: 0,
            opening: true,
            window: Window {
                frames: self.rng.u32(1..40),
                bytes: self.rng.u64(1..1 << 20),
            },
            hash_key,
        }
    }

    /// Carries one dump over and checks the rule. Returns how it ended for the client, if that did not
    /// crash, and for the dump.
    fn migrate(&mut self, failure: InjectedFailure) -> (Option<End>, Dump) {
        let mut net = Net::new(self.rng.fork(), self.conditions);
        let session = SessionId(self.rng.u128(1..).to_le_bytes());
        let key = HashKey(self.rng.u128(..).to_le_bytes());
        let hello = self.hello(Role::Receiver, session, key);
        let own = self.hello(Role::Sender, SessionId::default(), HashKey::default());
        let roles = [Role::Sender, Role::Responder];
        let table = SessionTable::new(own, &roles, RETRY.give_up_after);
        let forwarder = Forwarder::new(self.rng.fork(), &self.source);
        let (earlier, window) = (self.earlier.clone(), hello.window);
        let rng = self.rng.fork();
        let client = Client::new(rng, &self.source, earlier, session, key, window);
        let mut dial = Some(PairHost::new(client, hello, RETRY.give_up_after));
        let mut listen = Some(ListeningHost::new(forwarder, table));
        let (mut crashed_client, mut crashed_forwarder) = (None, None);
        let tampered_every = self.tampered_every;
        run(
            &mut net,
            &mut dial,
            &mut listen,
            |step, net, dial, listen| {
                if tampered_every.is_some_and(|every| step % every == every - 1) {
                    dial.iter_mut().for_each(|host| host.part().tamper());
                }
                match failure {
                    InjectedFailure::ForwarderCrashes(at) if at == step => {
                        crashed_forwarder = crash(listen, net);
                    }
                    InjectedFailure::ClientCrashes(at) if at == step => {
                        crashed_client = crash(dial, net);
                    }
                    InjectedFailure::ForwarderStopped(at) if at == step => abort(listen),
                    InjectedFailure::RestoreFails(at) if at == step => abort(dial),
                    _ => {}
                }
            },
        );
        let forwarder_crashed = crashed_forwarder.is_some();
        let forwarder = listen.map(Host::into_part).or(crashed_forwarder);
        let client_crashed = crashed_client.is_some();
        let client = dial.map(Host::into_part).or(crashed_client);
        let (mut forwarder, client) = (forwarder.expect("it was"), client.expect("it was"));
        if !forwarder.was_visited() {
            // It waits for a first client until somebody stops it.
            forwarder.abort();
        }
        let crashes = u64::from(forwarder_crashed) + u64::from(client_crashed);
        self.seen.add("crash", crashes);
        self.seen.add("cut", net.cuts);
        self.seen.add("flipped bit", net.flips);
        self.seen
            .add("cut in the recovery from a loss", net.cuts_in_recovery);
        self.seen
            .add("crash in the recovery from a loss", net.crashes_in_recovery);
        self.trace = self.trace.rotate_left(5) ^ u64::from(net.trace);
        self.seen.add_all(&forwarder.seen);
        self.seen.add_all(&client.seen);
        let dump = forwarder.dump(forwarder_crashed);
        let end = client.end().filter(|_| !client_crashed).cloned();
        self.judge(&client, end.as_ref(), dump);
        if end == Some(End::Success) && net.cuts > 0 {
            self.seen.add("success after a cut", 1);
        }
        (end, dump)
    }

    fn judge(&mut self, client: &Client, end: Option<&End>, dump: Dump) {
        match dump {
            Dump::Frozen => panic!("the dump waits for ever"),
            Dump::Killed => assert!(client.is_complete(), "memory is nowhere"),
            Dump::Resumed => assert_ne!(end, Some(&End::Success), "the processes run twice"),
        }
        self.seen.add(
            match (end, dump) {
                (Some(End::Success), _) => "success",
                (Some(End::Unconfirmed), Dump::Killed) => "last word that was lost",
                (Some(End::Unconfirmed), _) => "client that had everything unheard",
                (_, Dump::Killed) => "crash of a client that had everything",
                _ => "source that goes on",
            },
            1,
        );
    }
}

/// A post-copy with failures of all kinds.
fn migration(seed: u64) -> Simulation {
    let _named = Seed(seed);
    let mut rng = Rng::with_seed(seed);
    let conditions = conditions(&mut rng);
    let mut simulation = Simulation::new(rng.fork(), conditions);
    simulation.migrate(failure(&mut rng));
    simulation
}

#[test]
fn a_seed_gives_the_same_migration_again() {
    for seed in seeds(60) {
        let _named = Seed(seed);
        let (first, second) = (migration(seed), migration(seed));
        assert!(first.trace != 0, "something was sent");
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first.seen.0, second.seen.0, "seed {seed}");
    }
}

#[test]
fn whatever_happens_memory_is_exact_and_at_one_place() {
    let mut total = Observed::default();
    let seeds = seeds(400);
    let all = are_usual(&seeds, 400);
    for seed in seeds {
        total.add_all(&migration(seed).seen);
    }
    println!("{total:#?}");
    if !all {
        return;
    }
    // Nothing that this test is about may be missing from it.
    for what in [
        "success",
        "success after a cut",
        "source that goes on",
        "crash",
        "cut",
        "flipped bit",
        "cut in the recovery from a loss",
        "crash in the recovery from a loss",
        "fork",
        "unmapped range",
        "question",
        "question that the push answers",
        "fault before its page was drained",
        "page for a fault",
        "page from the stream",
        "page from the earlier round",
        "page pushed as the same",
        "page answered as the same",
        "page lost with its connection",
        "learned hash",
        "delivery with local pages that had changed",
        "answer in full",
        "step under a rate limit",
    ] {
        assert!(
            total.count(what) > 0,
            "the simulation never met with a {what}"
        );
    }
}

/// Nobody crashes, and the network is never bad for long.
fn comes_to_an_end(seeds: std::ops::Range<u64>, conditions: NetworkConditions) {
    for seed in seeds {
        let _named = Seed(seed);
        let mut rng = Rng::with_seed(seed);
        let mut simulation = Simulation::new(rng.fork(), conditions);
        let (end, dump) = simulation.migrate(InjectedFailure::None);
        assert_eq!((end, dump), (Some(End::Success), Dump::Killed));
    }
}

#[test]
fn without_trouble_everything_arrives() {
    let steady = NetworkConditions {
        delay_millis: 20,
        ..NetworkConditions::default()
    };
    comes_to_an_end(seeds(60), steady);
}

#[test]
fn a_short_outage_in_every_phase_of_a_post_copy_is_survived() {
    let variable = NetworkConditions {
        cut_one_in: 400,
        outage_one_in: 1000,
        flip_one_in: 600,
        outage_millis: 1500,
        delay_millis: 10,
    };
    for seed in seeds(120) {
        let _named = Seed(seed);
        let mut rng = Rng::with_seed(seed);
        let mut simulation = Simulation::new(rng.fork(), variable);
        let (end, dump) = simulation.migrate(InjectedFailure::None);
        // The link may break behind the source's last word.
        assert!(
            matches!(end, Some(End::Success | End::Unconfirmed)),
            "{end:?}"
        );
        assert_eq!(dump, Dump::Killed);
    }
}
