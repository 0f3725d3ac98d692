//! What a receiving session brought.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use crate::criu::header::Wire;
use crate::error::Error;
use crate::image::tree::TreeCounts;
use crate::units::PageSize;

/// Pages of a session, by what was said about them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, JsonSchema)]
pub struct PageCounts {
    /// Pages whose bytes were received.
    pub received: u64,
    /// Of these, pages that came compressed (zero pages of compressed frames among them).
    pub compressed: u64,
    /// Pages that were said to be in the parent.
    pub in_parent: u64,
    /// Pages that were only named: they stayed with the source.
    pub with_source: u64,
}

/// How received pages were stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, JsonSchema)]
pub struct StoredPages {
    /// Pages that are in the parent with the same bytes.
    pub same_as_parent: u64,
    /// Pages that another process of the tree has at the same address, stored once (`--dedup-tree`).
    pub same_in_tree: u64,
    /// Zero pages that take no room.
    pub zero: u64,
    /// Bytes in the pages files.
    pub stored_bytes: u64,
}

impl StoredPages {
    /// With the pages that processes of a tree may share, `page` long each.
    #[must_use]
    pub fn with_tree(self, tree: TreeCounts, page: PageSize) -> StoredPages {
        StoredPages {
            same_in_tree: self.same_in_tree + tree.same,
            zero: self.zero + tree.zero,
            stored_bytes: self.stored_bytes + (tree.stored << page.shift()),
            ..self
        }
    }
}

/// A session that is over, however it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// Address of the sender.
    pub peer: String,
    /// The sender's header layout, if it sent a header.
    pub wire: Option<Wire>,
    /// Processes and shared memory segments.
    pub targets: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// How they were stored.
    pub kept: StoredPages,
    /// Size of a page.
    pub page: PageSize,
    /// Bytes of frames that were received, with headers and without what TLS adds.
    pub wire_bytes: u64,
    /// From the start of the session to the answer to CLOSE.
    pub elapsed: Duration,
    /// CPU time of the whole process meanwhile.
    pub cpu: Duration,
}

impl Received {
    /// A session with `peer` that brought nothing.
    pub fn nothing(peer: &str, page: PageSize) -> Received {
        Received {
            peer: peer.to_owned(),
            wire: None,
            targets: 0,
            pages: PageCounts::default(),
            kept: StoredPages::default(),
            page,
            wire_bytes: 0,
            elapsed: Duration::ZERO,
            cpu: Duration::ZERO,
        }
    }

    /// Bytes of the pages received.
    pub fn received_bytes(&self) -> u64 {
        self.pages.received << self.page.shift()
    }

    fn bytes_per_second(&self) -> f64 {
        self.received_bytes() as f64 / self.elapsed.as_secs_f64().max(1e-6)
    }

    /// The session as it is written, with the `error` that ended it.
    pub fn line(&self, error: Option<&Error>) -> Line<'_> {
        Line {
            role: "receive",
            peer: &self.peer,
            wire: self.wire.map(Wire::name),
            stored: error.is_none(),
            error: error.map(ToString::to_string),
            seconds: self.elapsed.as_secs_f64(),
            cpu_seconds: self.cpu.as_secs_f64(),
            bytes_per_second: self.bytes_per_second(),
            targets: self.targets,
            page_bytes: self.page.bytes(),
            wire_bytes: self.wire_bytes,
            received_bytes: self.received_bytes(),
            pages: self.pages,
            kept: self.kept,
        }
    }
}

/// A session that received a dump.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Receive")]
pub struct Line<'a> {
    /// Tells the kind of session.
    #[schemars(extend("const" = "receive"))]
    role: &'static str,
    /// Address of the sender.
    peer: &'a str,
    /// The layout of the sender's frames: `v1`, `v2`; null if it sent none.
    wire: Option<&'static str>,
    /// Whether everything was stored.
    stored: bool,
    /// Why not; null if it was.
    error: Option<String>,
    /// From the start of the session to the answer to CLOSE, seconds.
    seconds: f64,
    /// CPU time of the whole process meanwhile, seconds.
    cpu_seconds: f64,
    /// Bytes of received pages divided by the time of the session, bytes a second.
    bytes_per_second: f64,
    /// How many processes and shared memory segments sent pages.
    targets: u64,
    /// Size of a page, bytes.
    page_bytes: u64,
    /// Bytes of frames that were received, with headers and without what TLS adds.
    wire_bytes: u64,
    /// Bytes of the pages received.
    received_bytes: u64,
    /// Pages by what the sender said about them.
    pages: PageCounts,
    /// How received pages were stored.
    kept: StoredPages,
}

impl fmt::Display for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pages, kept) = (&self.pages, &self.kept);
        let mib = f64::from(1 << 20);
        write!(
            f,
            "{} pages ({:.1} MiB) of {} processes and segments received from {} in {:.3} s, {:.1} MiB/s, \
             {:.3} s of CPU: {} stored in {} bytes, {} same as parent, {} same in the tree, {} zero; {} came compressed; {} \
             said to be in the parent, {} left with the source",
            pages.received,
            self.received_bytes() as f64 / mib,
            self.targets,
            self.peer,
            self.elapsed.as_secs_f64(),
            self.bytes_per_second() / mib,
            self.cpu.as_secs_f64(),
            pages.received - kept.same_as_parent - kept.same_in_tree - kept.zero,
            kept.stored_bytes,
            kept.same_as_parent,
            kept.same_in_tree,
            kept.zero,
            pages.compressed,
            pages.in_parent,
            pages.with_source,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_session_is_told_in_words_and_in_json() {
        let mut received = Received {
            elapsed: Duration::from_secs(2),
            ..Received::nothing("10.0.0.1:5", PageSize::KIB_4)
        };
        let error = Error::new(Kind::PeerLost, "it said \"bye\"");
        let parse = |line: Line| serde_json::to_value(line).unwrap();
        let failed = parse(received.line(Some(&error)));
        assert_eq!(failed["stored"], false);
        assert_eq!(failed["error"], "it said \"bye\"");
        assert!(failed["wire"].is_null());

        received.wire = Some(Wire::V1);
        received.pages.received = 512;
        received.kept.zero = 12;
        let stored = parse(received.line(None));
        assert_eq!(
            (&stored["wire"], &stored["pages"]["received"]),
            (&"v1".into(), &512.into())
        );
        assert_eq!(stored["bytes_per_second"], 1024.0 * 1024.0);
        assert!(received.to_string().contains("512 pages (2.0 MiB)"));
        assert!(received.to_string().contains("500 stored"));
    }
}
