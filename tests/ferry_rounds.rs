//! Any sequence of rounds, through judge, encoder, frame, decoder, equals the memory.

use std::collections::BTreeMap;

use pageferry::criu::header::{PageFlags, Target};
use pageferry::ferry::batch::{Batch, PageKind, Place};
use pageferry::ferry::delta::PageMemory;
use pageferry::ferry::encode::{EncodeCounters, Encoder, PlainBatch, Verdicts};
use pageferry::ferry::frame::{Kind, OpenFrame, Split, split};
use pageferry::ferry::gather::{Gathered, Run};
use pageferry::ferry::hash::{Fingerprint, HashKey, PageHasher};
use pageferry::ferry::level_control::Level;
use pageferry::ferry::message::StateId;
use pageferry::ferry::unpack::Unpacker;
use pageferry::units::{PageRange, PageSize};
use proptest::prelude::*;

const TARGET: Target = Target::Process(1);

type Pages = BTreeMap<u64, Vec<u8>>;

/// What a process does to a page between two rounds.
#[derive(Clone, Debug)]
enum Change {
    Zero,
    Fill(u8),
    Random(u64),
    Poke(usize, u8),
    Unmap,
}

fn changes() -> impl Strategy<Value = Vec<(u64, Change)>> {
    let change = prop_oneof![
        1 => Just(Change::Zero),
        1 => any::<u8>().prop_map(Change::Fill),
        1 => any::<u64>().prop_map(Change::Random),
        3 => (0_usize..4096, any::<u8>()).prop_map(|(at, byte)| Change::Poke(at, byte)),
        1 => Just(Change::Unmap),
    ];
    // Dense at the front, so that batches fill up, and thin behind.
    let number = prop_oneof![3 => 0_u64..150, 1 => 0_u64..100_000];
    prop::collection::vec((number, change), 0..200)
}

fn apply(memory: &mut Pages, number: u64, change: &Change, page: PageSize) {
    let fresh = || vec![0; page.as_usize()];
    match change {
        Change::Zero => drop(memory.insert(number, fresh())),
        Change::Fill(byte) => drop(memory.insert(number, vec![*byte; page.as_usize()])),
        Change::Random(seed) => {
            let mut rng = fastrand::Rng::with_seed(*seed);
            rng.fill(memory.entry(number).or_insert_with(fresh));
        }
        Change::Poke(at, byte) => memory.entry(number).or_insert_with(fresh)[*at] = *byte,
        Change::Unmap => drop(memory.remove(&number)),
    }
}

/// The sending end.
struct SendingSide {
    page: PageSize,
    hasher: PageHasher,
    memory: PageMemory,
    encoder: Encoder,
}

impl SendingSide {
    /// The frames of a round, and what they hold.
    fn round(&mut self, pages: &Pages, level: Level) -> (Vec<u8>, Vec<EncodeCounters>) {
        let mut stream = Vec::new();
        let mut counters = Vec::new();
        let mut gathered = Gathered::new(self.page);
        let mut plain = Vec::new();
        for (number, contents) in pages {
            let start = number * self.page.bytes();
            let run = Run {
                range: PageRange::new(start, start + self.page.bytes()),
                flags: PageFlags::PRESENT,
            };
            if gathered.push(run).is_some() {
                counters.push(self.batch(gathered.runs(), &plain, level, &mut stream));
                gathered.clear();
                plain.clear();
                assert_eq!(gathered.push(run), None);
            }
            plain.extend_from_slice(contents);
        }
        counters.push(self.batch(gathered.runs(), &plain, level, &mut stream));
        (stream, counters)
    }

    fn batch(
        &mut self,
        runs: &[Run],
        plain: &[u8],
        level: Level,
        stream: &mut Vec<u8>,
    ) -> EncodeCounters {
        let pages = plain.chunks_exact(self.page.as_usize());
        let prints: Vec<Fingerprint> = pages.map(|page| self.hasher.fingerprint(page)).collect();
        let mut verdicts = Verdicts::default();
        let batch = PlainBatch {
            target: TARGET,
            runs,
            plain,
        };
        self.memory
            .judge(batch, &prints, &self.hasher, &mut verdicts);
        let frame = OpenFrame::begin(stream);
        let counters = self
            .encoder
            .encode(batch, &verdicts, &self.hasher, level, stream)
            .expect("zstd works");
        frame.finish(stream, Kind::Pages, 1);
        counters
    }
}

/// The receiving end: turns the frames of a round into pages, with those of the round before.
fn receive(mut stream: &[u8], base: &Pages, page: PageSize, hasher: &PageHasher) -> Pages {
    let mut pages = Pages::new();
    let mut unpacker = Unpacker::default();
    while let Split::Frame(frame) = split(stream).expect("undamaged") {
        let body = &stream[frame.body.clone()];
        let batch = Batch::parse(body, page).expect("well-formed");
        let old = |vaddr: pageferry::units::Vaddr| &base[&(vaddr.get() / page.bytes())];
        let hashes = batch.bases().map(|(vaddr, _)| hasher.hash(old(vaddr)));
        batch.agree(hasher, hashes).expect("the same bases");
        let deltas = batch.bases().filter(|(_, kind)| *kind == PageKind::Delta);
        let bases: Vec<u8> = deltas.flat_map(|(vaddr, _)| old(vaddr).clone()).collect();
        let mut out = Vec::new();
        unpacker
            .unpack(&batch, &bases, &mut out)
            .expect("undamaged");
        for (vaddr, place) in batch.places() {
            let contents = match place {
                Place::Zero => vec![0; page.as_usize()],
                Place::Same => old(vaddr).clone(),
                Place::Body(range) => body[range].to_vec(),
                Place::Unpacked(range) => out[range].to_vec(),
                Place::Shared(_) => panic!("there is one target alone"),
            };
            assert_eq!(pages.insert(vaddr.get() / page.bytes(), contents), None);
        }
        stream = &stream[frame.end()..];
    }
    assert!(stream.is_empty());
    pages
}

fn level() -> impl Strategy<Value = Level> {
    prop_oneof![
        Just(Level::None),
        Just(Level::Zstd(-5)),
        Just(Level::Zstd(1)),
        Just(Level::Zstd(6)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_sequence_of_rounds_equals_the_memory(
        rounds in prop::collection::vec((changes(), level(), any::<bool>()), 1..5),
        page_bytes in prop::sample::select(vec![1_u64 << 12, 1 << 14, 1 << 16]),
        cache_bytes in prop::sample::select(vec![0_u64, 50_000, 1 << 20, 1 << 30]),
    ) {
        let page = PageSize::new(page_bytes).expect("a page size");
        let hasher = PageHasher::new(HashKey([7; 16]), page);
        let mut sender = SendingSide {
            page,
            hasher: hasher.clone(),
            memory: PageMemory::new(page, cache_bytes),
            encoder: Encoder::new(page).expect("zstd works"),
        };
        let (mut memory, mut taken) = (Pages::new(), Pages::new());
        for (round, (changes, level, arrives)) in (1_u8..).zip(rounds) {
            for (number, change) in &changes {
                apply(&mut memory, *number, change, page);
            }
            let (stream, counters) = sender.round(&memory, level);
            let pages: u64 = counters
                .iter()
                .map(|counters| counters.zero + counters.same + counters.raw + counters.packed + counters.delta)
                .sum();
            prop_assert_eq!(pages, memory.len() as u64);
            if !arrives {
                sender.memory.forget();
                // The receiver still has what it had, and says so when it is asked.
                let state = StateId([100 + round; 16]);
                prop_assert!(sender.memory.adopt(TARGET, state));
                for (number, contents) in &taken {
                    let start = number * page.bytes();
                    let run = PageRange::new(start, start + page.bytes());
                    sender.memory.learn(TARGET, run, &[hasher.hash(contents).0]);
                }
                continue;
            }
            let received = receive(&stream, &taken, page, &hasher);
            prop_assert!(received == memory, "round {} differs", round);
            sender.memory.commit(StateId([round; 16]));
            taken = received;
        }
    }
}

#[test]
fn a_round_in_which_nothing_changed_is_hardly_any_bytes() {
    let page = PageSize::KIB_4;
    let hasher = PageHasher::new(HashKey([7; 16]), page);
    let mut rng = fastrand::Rng::with_seed(1);
    let memory: Pages = (0..2048)
        .map(|number| {
            let mut contents = vec![0; page.as_usize()];
            rng.fill(&mut contents);
            (number, contents)
        })
        .collect();
    let mut sender = SendingSide {
        page,
        hasher,
        memory: PageMemory::new(page, 1 << 20),
        encoder: Encoder::new(page).expect("zstd works"),
    };
    let bytes = 2048 * page.as_usize();
    let (first, _) = sender.round(&memory, Level::Zstd(1));
    assert!(
        first.len() < bytes + bytes / 100,
        "raw pages cost a percent"
    );
    sender.memory.commit(StateId([1; 16]));
    let (second, _) = sender.round(&memory, Level::Zstd(1));
    assert!(second.len() < bytes / 1000, "{} bytes", second.len());
}
