//! A sender's hashes of what a receiver has, as a file: another sender may go on from them.
//!
//! ```text
//! 0  [8]  "PFHASHES"
//! 8  u32  version, 1
//! 12 u32  page size, bytes
//! 16 [16] key of the hashes
//! 32      frames: HASHES by target and address, then CLOSE with how many pages they had
//! ```
//!
//! `page-server --forward` learns them in pre-copy, `page-server --forward-lazy` uses them in the post-copy that follows
//! (docs/ferry.md, section 5). Who can read the file can make pages of the same hash: it belongs to the sender alone.
//!
//! Invariant: a file without its last frame is refused, so one that is being written is never taken for whole.

use std::cmp::Ordering;
use std::io;

use thiserror::Error;

use super::delta::PageMemory;
use super::frame::{FrameError, Kind, OpenFrame, Split, split};
use super::hash::{HashKey, PageHash};
use super::message::{Hashes, decode_close, encode_close};
use crate::criu::header::Target;
use crate::limits::DUMP_PAGES_MAX;
use crate::units::{PageCount, PageRange, PageSize};

const MAGIC: [u8; 8] = *b"PFHASHES";

const VERSION: u32 = 1;

/// What stands before the frames, bytes.
const HEAD_BYTES: usize = 32;

/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum KnownHashesError {
    /// It begins with something else.
    #[error("it is not a file of page hashes")]
    Foreign,
    /// Another version of the format.
    #[error("its version is {0}, and {VERSION} is understood")]
    Version(u32),
    /// Of a host with other pages.
    #[error("its pages have {0} bytes, those of this host {1}")]
    PageSize(u32, u64),
    /// It ends too early.
    #[error("it is cut off at byte {0}")]
    Cut(usize),
    /// A frame is damaged, or says what cannot be.
    #[error("the frame at byte {at}")]
    Frame {
        /// Where it begins, bytes.
        at: usize,
        /// What is wrong with it.
        #[source]
        error: FrameError,
    },
    /// A frame of another kind.
    #[error("a {0} frame does not belong there")]
    Unexpected(Kind),
    /// It does not have as many pages as it says.
    #[error("it has hashes of {0} pages and says {1}")]
    Pages(u64, u64),
    /// A frame does not follow the one before.
    #[error("the frame at byte {0} is out of order: targets and addresses only rise")]
    Order(usize),
    /// More pages than a dump can have.
    #[error("it has hashes of more than {DUMP_PAGES_MAX} pages")]
    TooMany,
}

/// Hashes that were read from a file. See the module's text.
#[derive(Debug)]
pub struct KnownHashes {
    key: HashKey,
    runs: Vec<(Target, PageRange)>,
    /// Of the pages of all runs, in their order.
    hashes: Vec<PageHash>,
}

impl KnownHashes {
    /// Writes what `memory` knows of the receiver's version to `out`, a piece at a time.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write(
        memory: &PageMemory,
        mut out: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let page = memory.page();
        let bytes = u32::try_from(page.bytes()).map_err(io::Error::other)?;
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend(bytes.to_le_bytes());
        head.extend(memory.key().0);
        out(&head)?;
        let mut pages = 0;
        let mut failed = Ok(());
        let mut frame = Vec::new();
        memory.each_known(|target, runs, hashes| {
            if failed.is_ok() {
                frame.clear();
                Hashes::encode(target, page, runs, hashes, false, &mut frame);
                pages += hashes.len() as u64;
                failed = out(&frame);
            }
        });
        failed?;
        frame.clear();
        let close = OpenFrame::begin(&mut frame);
        encode_close(PageCount(pages), &mut frame);
        close.finish(&mut frame, Kind::Close, 0);
        out(&frame)
    }

    /// Reads `file`, of a sender whose pages are of size `page`.
    ///
    /// # Errors
    ///
    /// It is damaged, cut off or of another kind.
    pub fn read(file: &[u8], page: PageSize) -> Result<KnownHashes, KnownHashesError> {
        let mut known = KnownHashes {
            key: head(file, page)?,
            runs: Vec::new(),
            hashes: Vec::new(),
        };
        let mut at = HEAD_BYTES;
        loop {
            let broken = |error| KnownHashesError::Frame { at, error };
            let Split::Frame(frame) = split(&file[at..]).map_err(broken)? else {
                return Err(KnownHashesError::Cut(file.len()));
            };
            let body = &file[at..][frame.body.clone()];
            match frame.kind {
                Kind::Hashes => {
                    let hashes = Hashes::decode(body, page).map_err(broken)?;
                    if !known.goes_on_with(&hashes) {
                        return Err(KnownHashesError::Order(at));
                    }
                    known.add(&hashes, page)?;
                }
                Kind::Close => {
                    let pages = decode_close(body).map_err(broken)?.get();
                    let found = known.hashes.len() as u64;
                    return match pages == found {
                        true => Ok(known),
                        false => Err(KnownHashesError::Pages(found, pages)),
                    };
                }
                other => return Err(KnownHashesError::Unexpected(other)),
            }
            at += frame.end();
        }
    }

    /// Whether these are of pages behind all that were read. In another order not all of them would find room
    /// ([`PageMemory::for_hashes_of`]).
    fn goes_on_with(&self, hashes: &Hashes<'_>) -> bool {
        let Some((target, run)) = self.runs.last() else {
            return true;
        };
        match hashes.target.cmp(target) {
            Ordering::Less => false,
            Ordering::Equal => hashes.start().is_none_or(|start| run.end() <= start),
            Ordering::Greater => true,
        }
    }

    fn add(&mut self, hashes: &Hashes<'_>, page: PageSize) -> Result<(), KnownHashesError> {
        for (run, of_run) in hashes.runs(page) {
            if (self.hashes.len() + of_run.len()) as u64 > DUMP_PAGES_MAX {
                return Err(KnownHashesError::TooMany);
            }
            self.runs.push((hashes.target, run));
            self.hashes
                .extend(of_run.iter().map(|hash| PageHash(*hash)));
        }
        Ok(())
    }

    /// The key of the hashes.
    pub fn key(&self) -> HashKey {
        self.key
    }

    /// Of which pages there are hashes.
    pub fn ranges(&self) -> impl Iterator<Item = (Target, PageRange)> + '_ {
        self.runs.iter().copied()
    }

    /// The runs, each with the hashes of its pages.
    pub fn runs(&self, page: PageSize) -> impl Iterator<Item = (Target, PageRange, &[PageHash])> {
        let mut rest = &self.hashes[..];
        self.runs.iter().map(move |(target, run)| {
            let pages = usize::try_from(run.pages(page).get()).expect("as many as were read");
            let (front, behind) = rest.split_at(pages);
            rest = behind;
            (*target, *run, front)
        })
    }
}

fn head(file: &[u8], page: PageSize) -> Result<HashKey, KnownHashesError> {
    let field = |at: usize| {
        let bytes = file.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if file.get(..8) != Some(&MAGIC[..]) {
        return Err(KnownHashesError::Foreign);
    }
    let cut = || KnownHashesError::Cut(file.len());
    let (version, bytes) = (field(8).ok_or_else(cut)?, field(12).ok_or_else(cut)?);
    if version != VERSION {
        return Err(KnownHashesError::Version(version));
    }
    if u64::from(bytes) != page.bytes() {
        return Err(KnownHashesError::PageSize(bytes, page.bytes()));
    }
    let key = file.get(16..HEAD_BYTES).ok_or_else(cut)?;
    Ok(HashKey(key.try_into().map_err(|_| cut())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::header::PageFlags;
    use crate::ferry::encode::{PlainBatch, Verdict, Verdicts};
    use crate::ferry::frame::HEADER_BYTES;
    use crate::ferry::gather::Run;
    use crate::ferry::hash::PageHasher;
    use crate::ferry::message::StateId;

    const PAGE: PageSize = PageSize::KIB_4;
    const KEY: HashKey = HashKey([3; 16]);

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(first << 12, (first + pages) << 12)
    }

    /// Judges `pages` pages of `target` from page `first` on, each full of its number.
    fn judge(memory: &mut PageMemory, target: Target, first: u64, pages: u64) -> Vec<Verdict> {
        let hasher = PageHasher::new(KEY, PAGE);
        let mut verdicts = Verdicts::default();
        for number in first..first + pages {
            let contents = vec![u8::try_from(number % 200).unwrap() + 1; 4096];
            let prints = [hasher.fingerprint(&contents)];
            let runs = [Run {
                range: range(number, 1),
                flags: PageFlags::PRESENT,
            }];
            let batch = PlainBatch {
                target,
                runs: &runs,
                plain: &contents,
            };
            let mut one = Verdicts::default();
            memory.judge(batch, &prints, &hasher, &mut one);
            verdicts.pages.extend(one.pages);
        }
        verdicts.pages
    }

    fn written(memory: &PageMemory) -> Vec<u8> {
        let mut file = Vec::new();
        KnownHashes::write(memory, |bytes| {
            file.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        file
    }

    /// A memory after one round of two processes.
    fn after_a_round() -> PageMemory {
        let mut memory = PageMemory::new(PAGE, 64 << 20);
        memory.use_key(KEY);
        judge(&mut memory, Target::Process(7), 500, 5000);
        judge(&mut memory, Target::Process(8), 1 << 30, 3);
        memory.commit(StateId([1; 16]));
        memory
    }

    #[test]
    fn another_sender_goes_on_where_the_first_has_stopped() {
        let file = written(&after_a_round());
        let known = KnownHashes::read(&file, PAGE).unwrap();
        assert_eq!(known.key(), KEY);
        let pages: u64 = known.ranges().map(|(_, run)| run.pages(PAGE).get()).sum();
        assert_eq!(pages, 5003);

        let runs = [(Target::Process(7), range(0, 6000))];
        let mut memory = PageMemory::for_hashes_of(PAGE, known.ranges().chain(runs));
        let state = StateId([9; 16]);
        memory.begin_with(state, known.key(), known.runs(PAGE));
        assert!(!memory.adopt(Target::Process(7), state), "nothing is asked");
        let verdicts = judge(&mut memory, Target::Process(7), 499, 5002);
        let same = verdicts
            .iter()
            .filter(|one| matches!(one, Verdict::Same(_)));
        assert_eq!(same.count(), 5000);
        assert!(matches!(verdicts[0], Verdict::Fresh));
        assert!(!memory.adopt(Target::Process(8), state));
        assert!(matches!(
            judge(&mut memory, Target::Process(8), 1 << 30, 1)[..],
            [Verdict::Same(_)]
        ));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_refused() {
        let mut memory = PageMemory::new(PAGE, 64 << 20);
        memory.use_key(KEY);
        judge(&mut memory, Target::Process(7), 500, 9);
        memory.commit(StateId([1; 16]));
        let file = written(&memory);
        KnownHashes::read(&file, PAGE).unwrap();
        for cut in 0..file.len() {
            assert!(
                KnownHashes::read(&file[..cut], PAGE).is_err(),
                "cut at {cut}"
            );
        }
        for at in (0..file.len() * 8).filter(|at| !(16 * 8..32 * 8).contains(at)) {
            let mut changed = file.clone();
            changed[at / 8] ^= 1 << (at % 8);
            assert!(KnownHashes::read(&changed, PAGE).is_err(), "bit {at}");
        }
        // Another round's frames in between, or the same ones again.
        let frames = &file[HEAD_BYTES..file.len() - HEADER_BYTES - 8];
        let twice = [&file[..HEAD_BYTES], frames, &file[HEAD_BYTES..]].concat();
        let error = KnownHashes::read(&twice, PAGE).unwrap_err();
        assert!(error.to_string().contains("out of order"), "{error}");
        let error = KnownHashes::read(&file, PageSize::new(65536).unwrap()).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }
}
