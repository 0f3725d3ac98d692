//! One impairment anywhere in a post-copy over ferry: at every border of a batch, inside of it, among the
//! acknowledgements. Each time all memory is right, and everybody ends well.

use anyhow::{Context, Result};
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Link};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

const BATCHES: u64 = 8;
const PAGES_OF_BATCH: u64 = 16;
const HEADER_BYTES: u64 = 28;
/// WELCOME and OPEN come before the first batch.
const BEFORE_BYTES: u64 = (HEADER_BYTES + 72) + (HEADER_BYTES + 16);
/// A batch of one run of pages that cannot be compressed.
const BATCH_BYTES: u64 = HEADER_BYTES + 40 + 16 + PAGES_OF_BATCH + (PAGES_OF_BATCH << 12);
const CLOSE_BYTES: u64 = HEADER_BYTES + 8;
const BYE_BYTES: u64 = HEADER_BYTES;
const ACK_BYTES: u64 = HEADER_BYTES + 48;

const HARMS: [ImpairmentKind; 3] = [
    ImpairmentKind::Reset,
    ImpairmentKind::End,
    ImpairmentKind::FlipBit,
];

/// Moves a process with an impairment to the first connection, the one that its memory is pushed over.
fn with_impairment(test_dir: &TestDir, criu: &Criu, impairment: Impairment) -> Result<()> {
    let pages = u32::try_from(BATCHES * PAGES_OF_BATCH)?;
    let area = AreaSpec::new(Mapping::Private, pages, Content::Random);
    let spec = LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::new(test_dir.path("load"), vec![area])
    };
    let plan = Plan::new(criu, Source::Forwarder, Make::Ours);
    let plan = Plan {
        client_options: vec!["--ferry".to_owned()],
        impaired_connections: 1,
        ..plan.with_impairment(Link::default(), impairment)
    };
    let mut moved = PostCopy::start(test_dir, &plan, spec, &[])?;
    moved.finish()?;
    moved.expect_all_right()
}

/// One post-copy for each of `places`, in bytes, with one kind after the other.
fn with_impairments(direction: Direction, places: impl Iterator<Item = u64>) {
    for (after_bytes, kind) in places.zip(HARMS.into_iter().cycle()) {
        let impairment = Impairment {
            direction,
            after_bytes,
            kind,
        };
        with_criu(Suite::Sid, |test_dir, criu| {
            with_impairment(test_dir, criu, impairment).with_context(|| format!("{impairment:?}"))
        });
    }
}

#[test]
fn one_impairment_anywhere_among_the_batches_is_survived() {
    let borders = (0..BATCHES).map(|batch| BEFORE_BYTES + batch * BATCH_BYTES);
    let inside = [0, 9, HEADER_BYTES, BATCH_BYTES / 2, BATCH_BYTES - 1];
    let end = BEFORE_BYTES + BATCHES * BATCH_BYTES;
    let close = [end, end + 9, end + CLOSE_BYTES - 1];
    let places = borders.flat_map(|border| inside.map(|offset| border + offset));
    with_impairments(Direction::ToClient, places.chain(close));
}

#[test]
fn one_impairment_to_the_last_word_is_survived() {
    let bye = BEFORE_BYTES + BATCHES * BATCH_BYTES + CLOSE_BYTES;
    let inside = [0, 9, BYE_BYTES - 1];
    // Each kind at each place.
    let places = inside
        .into_iter()
        .cycle()
        .take(HARMS.len() * inside.len() - 1);
    let shifted = std::iter::once(bye).chain(places.map(|offset| bye + offset));
    with_impairments(Direction::ToClient, shifted);
}

#[test]
fn one_impairment_anywhere_among_the_acknowledgements_is_survived() {
    // HELLO, then one ACK at the beginning, for OPEN, for each batch, for CLOSE, that everything is here, and
    // that BYE was heard.
    let hello = HEADER_BYTES + 72;
    let end = hello + (BATCHES + 5) * ACK_BYTES;
    let places = (hello..end).step_by(61);
    with_impairments(Direction::ToServer, places);
}
