use proptest::prelude::*;

use super::*;
use crate::ferry::encode::{Encoder, PlainBatch, Verdict, Verdicts};
use crate::ferry::hash::HashKey;
use crate::ferry::level_control::Level;
use crate::ferry::unpack::Unpacker;

const PAGE: PageSize = PageSize::KIB_4;

fn run(first: u64, pages: u64, flags: PageFlags) -> Run {
    let range = PageRange::new(first * PAGE.bytes(), (first + pages) * PAGE.bytes());
    Run { range, flags }
}

fn hasher() -> PageHasher {
    PageHasher::new(HashKey([1; 16]), PAGE)
}

/// Pages 1 to 5: zero, same, random, text, text that differs from the base in one byte; then a
/// hole. Returns the body and the base of the delta page.
fn body() -> (Vec<u8>, Vec<u8>) {
    let size = PAGE.as_usize();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut plain = vec![0; size];
    plain.extend(vec![1; size]);
    plain.extend(std::iter::repeat_with(|| rng.u8(..)).take(size));
    plain.extend(vec![b'a'; size]);
    plain.extend(vec![b'b'; size]);
    let mut base = vec![b'b'; size];
    base[77] = 0;
    let mut xor = vec![0; size];
    xor[77] = b'b';
    let verdicts = Verdicts {
        pages: vec![
            Verdict::Zero,
            Verdict::Same(hasher().hash(&plain[size..2 * size])),
            Verdict::Fresh,
            Verdict::Fresh,
            Verdict::Delta(hasher().hash(&base)),
        ],
        xor,
    };
    let batch = PlainBatch {
        target: Target::Shmem(3),
        runs: &[
            run(1, 5, PageFlags::PRESENT),
            run(9, 1 << 20, PageFlags::PARENT),
        ],
        plain: &plain,
    };
    let mut out = Vec::new();
    Encoder::new(PAGE)
        .and_then(|mut encoder| {
            encoder.encode(batch, &verdicts, &hasher(), Level::Zstd(3), &mut out)
        })
        .expect("zstd works");
    (out, base)
}

#[test]
fn every_kind_of_page_comes_out_where_it_should() {
    use PageKind::{Delta, Packed, Raw, Same, Zero};
    let (body, base) = body();
    let size = PAGE.as_usize();
    let batch = Batch::parse(&body, PAGE).expect("well-formed");
    let kinds: Vec<_> = batch.pages().map(|(_, kind)| kind).collect();
    assert_eq!(kinds, [Zero, Same, Raw, Packed, Delta]);
    assert_eq!(batch.runs().len(), 2);
    let hashes = [hasher().hash(&vec![1; size]), hasher().hash(&base)];
    batch.agree(&hasher(), hashes).expect("the same bases");
    let mut out = Vec::new();
    let mut unpacker = Unpacker::default();
    unpacker.unpack(&batch, &base, &mut out).expect("undamaged");
    let places: Vec<_> = batch.places().map(|(_, place)| place).collect();
    assert_eq!(places[0], Place::Zero);
    assert_eq!(places[1], Place::Same);
    assert!(matches!(&places[2], Place::Body(range) if range.len() == size));
    assert_eq!(places[3], Place::Unpacked(0..size));
    assert_eq!(places[4], Place::Unpacked(size..2 * size));
    assert_eq!(out, [vec![b'a'; size], vec![b'b'; size]].concat());
}

#[test]
fn other_bases_are_a_disagreement() {
    let (body, mut base) = body();
    let batch = Batch::parse(&body, PAGE).expect("well-formed");
    let hashes = [PageHash::default(), hasher().hash(&base)];
    let error = batch.agree(&hasher(), hashes).expect_err("other hashes");
    assert!(matches!(
        error,
        BatchError::Disagreement {
            vaddr: Vaddr(0x2000),
            ..
        }
    ));
    base[5] ^= 1;
    let error = Unpacker::default()
        .unpack(&batch, &base, &mut Vec::new())
        .expect_err("another base");
    assert!(matches!(error, BatchError::Contents { .. }));
}

#[test]
fn a_changed_bit_in_the_contents_is_found_without_the_frame_checksum_too() {
    let (body, base) = body();
    let batch = Batch::parse(&body, PAGE).expect("well-formed");
    let (raw, end) = (batch.raw.start, body.len());
    for at in raw..end {
        let mut changed = body.clone();
        changed[at] ^= 0x10;
        let batch = Batch::parse(&changed, PAGE).expect("only contents changed");
        let result = Unpacker::default().unpack(&batch, &base, &mut Vec::new());
        // A zstd frame has bits that mean nothing; then the contents are what they were.
        if result.is_ok() {
            assert!(at >= batch.packed.start, "byte {at}");
        }
    }
}

#[test]
fn every_other_length_is_refused() {
    let (mut body, _) = body();
    for cut in 0..body.len() {
        assert!(Batch::parse(&body[..cut], PAGE).is_err(), "cut at {cut}");
    }
    body.push(0);
    assert!(matches!(
        Batch::parse(&body, PAGE),
        Err(BatchError::Length { .. })
    ));
}

#[test]
fn impossible_runs_are_refused() {
    for (at, value) in [
        (40, 1_u64.to_le_bytes()),                   // not a page's address
        (40, u64::MAX.to_le_bytes()),                // neither, and overflows
        (48, (4_u64 << 32).to_le_bytes()),           // no pages
        (48, (4_u64 << 32 | 1 << 20).to_le_bytes()), // far more than a batch holds
        (48, 5_u64.to_le_bytes()),                   // no flags
        (48, (8_u64 << 32 | 5).to_le_bytes()),       // unknown flags
        (48, (5_u64 << 32 | 5).to_le_bytes()),       // PRESENT and PARENT
        (56, 0x1000_u64.to_le_bytes()),              // before the run before it
    ] {
        let (mut body, _) = body();
        body[at..at + 8].copy_from_slice(&value);
        let error = Batch::parse(&body, PAGE).expect_err("impossible");
        assert!(matches!(error, BatchError::Run { .. }), "{at}: {error}");
    }
}

proptest! {
    #[test]
    fn noise_is_refused_or_has_consistent_tables(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        keep in 0_usize..60,
    ) {
        let (mut body, base) = body();
        let keep = keep.min(body.len());
        body.truncate(keep);
        body.extend(noise);
        if let Ok(batch) = Batch::parse(&body, PAGE) {
            prop_assert_eq!(batch.places().count() as u64, batch.present().get());
            if batch.bytes_of(PageKind::Delta) == base.len() {
                let mut out = Vec::new();
                let _ = Unpacker::default().unpack(&batch, &base, &mut out);
            }
        }
    }
}

/// Pages 1 to 3: one of target 1, one of text, one of target 0.
fn body_with_shared() -> Vec<u8> {
    let size = PAGE.as_usize();
    let plain = [vec![1; size], vec![b'a'; size], vec![3; size]].concat();
    let shared = |page: usize, of| Verdict::Shared {
        hash: hasher().hash(&plain[page * size..(page + 1) * size]),
        of,
    };
    let verdicts = Verdicts {
        pages: vec![shared(0, 1), Verdict::Fresh, shared(2, 0)],
        xor: Vec::new(),
    };
    let batch = PlainBatch {
        target: Target::Process(3),
        runs: &[run(1, 3, PageFlags::PRESENT)],
        plain: &plain,
    };
    let mut out = Vec::new();
    Encoder::new(PAGE)
        .and_then(|mut encoder| encoder.encode(batch, &verdicts, &hasher(), Level::None, &mut out))
        .expect("zstd works");
    out
}

#[test]
fn shared_pages_name_their_targets_and_are_compared() {
    let (body, size) = (body_with_shared(), PAGE.as_usize());
    let batch = Batch::parse_behind(&body, PAGE, 2).expect("well-formed");
    let at = |number: u64| Vaddr(number * PAGE.bytes());
    let named: Vec<_> = batch.shared().collect();
    assert_eq!(named, [(at(1), 1), (at(3), 0)]);
    assert_eq!(batch.bases().count(), 2);
    let hash = |byte: u8| hasher().hash(&vec![byte; size]);
    batch
        .agree(&hasher(), [hash(1), hash(3)])
        .expect("the same pages");
    batch
        .agree(&hasher(), [hash(1), hash(4)])
        .expect_err("another page");
    let mut out = Vec::new();
    let mut unpacker = Unpacker::default();
    unpacker.unpack(&batch, &[], &mut out).expect("undamaged");
    let places: Vec<_> = batch.places().map(|(_, place)| place).collect();
    assert_eq!(places[0], Place::Shared(0..size));
    assert!(matches!(&places[1], Place::Body(range) if body[range.clone()] == vec![b'a'; size]));
    assert_eq!(places[2], Place::Shared(size..2 * size));
}

#[test]
fn shared_pages_of_targets_that_are_not_there_are_refused() {
    let body = body_with_shared();
    for others in [0, 1] {
        let error = Batch::parse_behind(&body, PAGE, others).expect_err("one target too few");
        assert!(error.to_string().contains("shared"), "{error}");
    }
    // Where nothing of the kind was agreed on.
    Batch::parse(&body, PAGE).expect_err("not agreed on");
}
