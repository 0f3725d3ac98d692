//! Pages that a dump does not send because their hashes are those that the far end has: they go by name, and both ends
//! agree on what the name stands for.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;
#[path = "common/ends.rs"]
mod ends;

use std::fs::File;
use std::path::Path;

use common::{FIRST_PAGE, PAGE, Run, check_images};
use dump_bytes::dump;
use ends::{LONG, context, expected, far_end, far_end_at, forward};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::engine::forward::{ForwardContext, KEPT};
use pageferry::error::Result;
use pageferry::observe::ferried::Forwarded;

const PID: Target = Target::Process(7);

/// Pages in a first dump.
const PAGES: u64 = 200;

fn first() -> Vec<Run> {
    vec![Run::present(FIRST_PAGE, PAGES, PageFlags::LAZY, 100)]
}

/// A second one: pages that were kept around some that have changed, and more pages than a batch has at that.
fn second() -> Vec<Run> {
    vec![
        Run::absent(FIRST_PAGE, 90, KEPT),
        Run::present(FIRST_PAGE + 90, 3, PageFlags::LAZY, 700),
        Run::absent(FIRST_PAGE + 93, 1, KEPT),
        Run::present(FIRST_PAGE + 94, 70, PageFlags::LAZY, 800),
        Run::absent(FIRST_PAGE + 164, 36, KEPT),
    ]
}

/// Sends both dumps through one forwarder; `between` may change what the far end has of the first.
fn both(dir: &Path, between: impl FnOnce(&Path)) -> (Result<Forwarded>, Result<u64>) {
    let dirs = ["old", "new"].map(|name| dir.join(name));
    let far = far_end(&dirs[0], None, LONG);
    let address = far.address;
    let sender = context(address, 1, 1 << 24, LONG).sender;
    let hashes = File::create(dir.join("hashes")).unwrap();
    let context = ForwardContext::new(sender, None, PAGE, true).saving_hashes(Some(hashes));
    let (forwarded, _) = forward(&context, &dump(&[(PID, first())], Wire::V2), 1 << 20);
    forwarded.unwrap();
    far.finish().unwrap();
    between(&dirs[0]);
    let far = far_end_at(address, &dirs[1], Some("../old"), LONG);
    let (forwarded, _) = forward(&context, &dump(&[(PID, second())], Wire::V2), 1000);
    let received = far.finish().map(|received| received.pages.in_parent);
    (forwarded, received)
}

#[test]
fn kept_pages_go_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    let (forwarded, in_parent) = both(tmp.path(), |_| {});
    let sent = forwarded.unwrap().sent;
    assert_eq!(sent.pages.same, 127);
    // The far end is not asked: it takes the key of what is known.
    assert_eq!(sent.hashes_learned, 0);
    assert_eq!(in_parent.unwrap(), 127);
    let levels = [second(), first()];
    check_images(&tmp.path().join("new"), PID, &expected(&levels));
}

#[test]
fn a_far_end_that_has_lost_a_kept_page_says_so() {
    let tmp = tempfile::tempdir().unwrap();
    let (forwarded, received) = both(tmp.path(), |old| {
        let pages = common::files(old);
        let (name, mut bytes) = pages
            .into_iter()
            .find(|(name, _)| name.starts_with("pages-"))
            .unwrap();
        bytes[5 << 12] ^= 1;
        std::fs::write(old.join(name), bytes).unwrap();
    });
    let error = forwarded.unwrap_err().to_string();
    assert!(error.contains("disagree"), "{error}");
    received.unwrap_err();
    assert!(!tmp.path().join("new").join(PID.pagemap_name()).exists());
}

#[test]
fn pages_of_which_nothing_is_known_are_looked_for_in_the_parent() {
    let tmp = tempfile::tempdir().unwrap();
    let far = far_end(tmp.path(), None, LONG);
    let context = context(far.address, 1, 1 << 24, LONG);
    let (forwarded, _) = forward(&context, &dump(&[(PID, second())], Wire::V2), 1 << 20);
    forwarded.unwrap_err();
    far.finish().unwrap_err();
}
