//! Ferry's codec: hashing, judging, packing and unpacking of 4 MiB.

use pageferry::ferry::batch::Batch;
use pageferry::ferry::level_control::Level;
use pageferry::ferry::unpack::Unpacker;

use crate::Run;
use crate::codec::{Codec, PAGE, dirtied, hasher, heap};

const BYTES: usize = 4 << 20;

const LEVEL: Level = Level::Zstd(1);

pub(crate) fn hash() -> Run {
    let (memory, hasher) = (heap(BYTES), hasher());
    Box::new(move || {
        let pages = memory.chunks_exact(PAGE.as_usize());
        pages.map(|page| u64::from(hasher.hash(page).0[0])).sum()
    })
}

pub(crate) fn encode() -> Run {
    let memory = heap(BYTES);
    Box::new(move || {
        let mut bytes = 0;
        Codec::default().round(&memory, LEVEL, |body| bytes += body.len() as u64);
        bytes
    })
}

pub(crate) fn later_round() -> Run {
    let mut versions = [heap(BYTES), Vec::new()];
    versions[1] = dirtied(&versions[0]);
    let mut codec = Codec::default();
    codec.round(&versions[0], LEVEL, |_| {});
    codec.commit();
    let mut number = 0;
    Box::new(move || {
        number += 1;
        let mut bytes = 0;
        codec.round(&versions[number % 2], LEVEL, |body| {
            bytes += body.len() as u64;
        });
        codec.commit();
        bytes
    })
}

pub(crate) fn decode() -> Run {
    let mut bodies = Vec::new();
    Codec::default().round(&heap(BYTES), LEVEL, |body| bodies.push(body.to_vec()));
    let (mut unpacker, mut out) = (Unpacker::default(), Vec::new());
    Box::new(move || {
        let mut pages = 0;
        for body in &bodies {
            let batch = Batch::parse(body, PAGE).expect("well-formed");
            unpacker.unpack(&batch, &[], &mut out).expect("undamaged");
            pages += batch.places().count() as u64;
        }
        pages
    })
}
