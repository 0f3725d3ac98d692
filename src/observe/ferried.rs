//! What a session over ferry carried.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use crate::criu::header::Wire;
use crate::error::Error;
use crate::ferry::encode::EncodeCounters;
use crate::units::PageSize;

/// What a sender has sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sent {
    /// Pages by the way they were sent, and what they cost.
    pub pages: EncodeCounters,
    /// Bytes of frames, without what was sent again.
    pub frame_bytes: u64,
    /// Bytes of frames that were repeated because a connection broke.
    pub repeated_bytes: u64,
    /// Hashes learned from the receiver.
    pub hashes_learned: u64,
}

/// Pages that went one way, and the bytes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, JsonSchema)]
pub struct Carried {
    /// How many pages.
    pub pages: u64,
    /// Their bytes on the wire.
    pub bytes: u64,
}

/// A shared page on the wire: its kind, and whose it is.
const SHARED_BYTES: u64 = 3;

/// Pages by the way they were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, JsonSchema)]
pub struct ByKind {
    /// As zero pages, without contents.
    pub zero: Carried,
    /// As pages that the receiver has, without contents.
    pub same: Carried,
    /// As pages that the receiver has from another process, without contents.
    pub shared: Carried,
    /// As differences.
    pub delta: Carried,
    /// In zstd frames.
    pub zstd: Carried,
    /// Uncompressed.
    pub raw: Carried,
}

impl ByKind {
    /// What `counters` says. The byte that tells the kind of a page is counted with zero, same and shared
    /// pages alone: they have little else.
    pub fn of(counters: &EncodeCounters, page: PageSize) -> ByKind {
        let carried = |pages, bytes| Carried { pages, bytes };
        ByKind {
            zero: carried(counters.zero, counters.zero),
            same: carried(counters.same, counters.same),
            shared: carried(counters.shared, SHARED_BYTES * counters.shared),
            delta: carried(counters.delta, counters.delta_bytes),
            zstd: carried(counters.packed, counters.packed_bytes),
            raw: carried(counters.raw, counters.raw << page.shift()),
        }
    }

    /// Each kind with its name.
    pub fn named(&self) -> [(&'static str, Carried); ByKind::COUNT] {
        [
            ("zero", self.zero),
            ("same", self.same),
            ("shared", self.shared),
            ("delta", self.delta),
            ("zstd", self.zstd),
            ("raw", self.raw),
        ]
    }

    /// How many kinds there are.
    pub const COUNT: usize = 6;
}

impl Sent {
    /// Adds a batch.
    pub fn add(&mut self, counters: &EncodeCounters) {
        let sum = &mut self.pages;
        sum.zero += counters.zero;
        sum.same += counters.same;
        sum.raw += counters.raw;
        sum.packed += counters.packed;
        sum.delta += counters.delta;
        sum.shared += counters.shared;
        sum.packed_bytes += counters.packed_bytes;
        sum.delta_bytes += counters.delta_bytes;
        sum.body_bytes += counters.body_bytes;
        sum.tried_bytes += counters.tried_bytes;
        sum.tried_packed_bytes += counters.tried_packed_bytes;
    }

    /// All pages with contents.
    pub fn page_count(&self) -> u64 {
        let pages = &self.pages;
        pages.zero + pages.same + pages.raw + pages.packed + pages.delta + pages.shared
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = &self.pages;
        write!(
            f,
            "{} pages in {} bytes: {} zero, {} same, {} as in other processes, {} as differences ({} bytes), {} compressed \
             ({} bytes), {} as they are; {} bytes sent again, {} hashes learned",
            self.page_count(),
            self.frame_bytes,
            pages.zero,
            pages.same,
            pages.shared,
            pages.delta,
            pages.delta_bytes,
            pages.packed,
            pages.packed_bytes,
            pages.raw,
            self.repeated_bytes,
            self.hashes_learned,
        )
    }
}

/// A dump that was forwarded, however that ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forwarded {
    /// Address of the dump.
    pub peer: String,
    /// Address of the destination.
    pub far_end: String,
    /// The dump's header layout, if it sent a header.
    pub wire: Option<Wire>,
    /// What went over.
    pub sent: Sent,
    /// Size of a page.
    pub page: PageSize,
    /// From the start of the session to the answer to CLOSE.
    pub elapsed: Duration,
    /// CPU time of the whole process meanwhile.
    pub cpu: Duration,
}

impl Forwarded {
    /// Bytes of the pages that the dump sent.
    pub fn page_bytes(&self) -> u64 {
        self.sent.page_count() << self.page.shift()
    }

    /// The session as it is written, with the `error` that ended it.
    pub fn line(&self, error: Option<&Error>) -> Line<'_> {
        Line {
            role: "forward",
            peer: &self.peer,
            far_end: &self.far_end,
            wire: self.wire.map(Wire::name),
            forwarded: error.is_none(),
            error: error.map(ToString::to_string),
            seconds: self.elapsed.as_secs_f64(),
            cpu_seconds: self.cpu.as_secs_f64(),
            page_bytes: self.page.bytes(),
            received_bytes: self.page_bytes(),
            frame_bytes: self.sent.frame_bytes,
            repeated_bytes: self.sent.repeated_bytes,
            hashes_learned: self.sent.hashes_learned,
            sent: ByKind::of(&self.sent.pages, self.page),
        }
    }
}

/// A session that forwarded a dump over ferry.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Forward")]
pub struct Line<'a> {
    /// Tells the kind of session.
    #[schemars(extend("const" = "forward"))]
    role: &'static str,
    /// Address of the dump.
    peer: &'a str,
    /// Address of the destination.
    far_end: &'a str,
    /// The layout of the dump's frames: `v1`, `v2`; null if it sent none.
    wire: Option<&'static str>,
    /// Whether the destination has stored everything.
    forwarded: bool,
    /// Why not; null if it has.
    error: Option<String>,
    /// From the start of the session to the answer to CLOSE, seconds.
    seconds: f64,
    /// CPU time of the whole process meanwhile, seconds.
    cpu_seconds: f64,
    /// Size of a page, bytes.
    page_bytes: u64,
    /// Bytes of the pages that the dump sent.
    received_bytes: u64,
    /// Bytes of frames to the destination, without repetitions.
    frame_bytes: u64,
    /// Bytes of frames that were repeated because a connection broke.
    repeated_bytes: u64,
    /// How many hashes of pages the destination has sent.
    hashes_learned: u64,
    /// Pages by the way they were sent.
    sent: ByKind,
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "forwarded {} bytes from {} to {} in {:.3} s, {:.3} s of CPU: {}",
            self.page_bytes(),
            self.peer,
            self.far_end,
            self.elapsed.as_secs_f64(),
            self.cpu.as_secs_f64(),
            self.sent
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_forwarded_dump_is_told_in_words_and_in_json() {
        let mut sent = Sent::default();
        sent.add(&EncodeCounters {
            zero: 3,
            raw: 2,
            packed: 5,
            packed_bytes: 777,
            ..EncodeCounters::default()
        });
        let forwarded = Forwarded {
            peer: "a local socket".to_owned(),
            far_end: "host:7".to_owned(),
            wire: Some(Wire::V2),
            sent,
            page: PageSize::KIB_4,
            elapsed: Duration::from_secs(2),
            cpu: Duration::from_secs(1),
        };
        let error = Error::new(Kind::PeerLost, "gone");
        let line = serde_json::to_value(forwarded.line(Some(&error))).unwrap();
        assert_eq!(line["forwarded"], false);
        assert_eq!(line["error"], "gone");
        assert_eq!(line["received_bytes"], 10 * 4096);
        assert_eq!(line["sent"]["zstd"]["bytes"], 777);
        assert_eq!(line["sent"]["raw"]["bytes"], 2 * 4096);
        assert_eq!(line["sent"]["zero"]["bytes"], 3);
        assert!(forwarded.to_string().contains("10 pages"));
    }
}
