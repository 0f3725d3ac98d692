//! Asking a source for pages: GETs in order, answers in the same order, each perhaps shorter than
//! asked.
//!
//! Works on bytes that somebody else received: [`Fetcher::next`] looks at what is unread and says
//! which range of it is payload of which request. The payload itself is never touched.

use std::collections::VecDeque;
use std::ops::Range;

use thiserror::Error;

use super::header::{HEADER_BYTES_MAX, Header, HeaderError, Op, PageFlags, Wire};
use crate::units::{PageRange, PageSize, Vaddr};

/// What the unread bytes begin with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step<T> {
    /// Too little to say; receive more.
    Incomplete,
    /// The answer to the request `tag` begins.
    Answer {
        /// The request's tag.
        tag: T,
    },
    /// Whole pages of the answer to the request `tag`.
    Pages {
        /// The request's tag.
        tag: T,
        /// The pages' addresses in the dump.
        image: PageRange,
        /// Where they are in the unread bytes.
        bytes: Range<usize>,
    },
    /// The answer to the request `tag` is complete.
    Complete {
        /// The request's tag.
        tag: T,
        /// What was asked for.
        asked: PageRange,
        /// What was asked for and did not come, if the answer was short.
        rest: Option<PageRange>,
    },
    /// The answer to the request `tag` has no page: the source cannot read the first one, or is not of this
    /// dump.
    Unavailable {
        /// The request's tag.
        tag: T,
        /// What was asked for.
        asked: PageRange,
    },
    /// The source answered CLOSE with this status; 0 is success.
    Closed(i32),
}

/// A source that says something else than pages.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum FetchError {
    /// Something came although nothing was asked for.
    #[error("the source sends data that was not requested")]
    Unasked,
    /// The header is of no known operation.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The answer is to another question.
    #[error(
        "asked for {asked} of pid {pid}, the source answers with {op} of {pages} pages at {vaddr} of id {dst_id}"
    )]
    Mismatch {
        /// What was asked for.
        asked: PageRange,
        /// Whose.
        pid: u32,
        /// The answer's operation.
        op: Op,
        /// The answer's page count.
        pages: u64,
        /// The answer's address.
        vaddr: Vaddr,
        /// The answer's id.
        dst_id: u64,
    },
    /// The source says that it has no page there.
    #[error(
        "the source has no page at {vaddr} of pid {pid}: its images and ours are not of one dump"
    )]
    NoPages {
        /// The address.
        vaddr: Vaddr,
        /// Whose.
        pid: u32,
    },
}

#[derive(Clone, Debug)]
struct Outstanding<T> {
    pid: u32,
    asked: PageRange,
    tag: T,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// At the header of the answer to the first outstanding request.
    Header,
    /// Inside its payload: the pages `next..end` are to come.
    Payload { next: u64, end: u64 },
}

/// One connection's requests. `T` is what the caller wants to know a request by.
#[derive(Debug)]
pub struct Fetcher<T> {
    wire: Wire,
    page: PageSize,
    outstanding: VecDeque<Outstanding<T>>,
    state: State,
    closing: bool,
}

impl<T: Clone> Fetcher<T> {
    /// A fetcher for a new connection.
    pub fn new(wire: Wire, page: PageSize) -> Fetcher<T> {
        Fetcher {
            wire,
            page,
            outstanding: VecDeque::new(),
            state: State::Header,
            closing: false,
        }
    }

    /// Appends to `out` the GET for the pages `image` of the process `pid`.
    pub fn get(&mut self, pid: u32, image: PageRange, tag: T, out: &mut Vec<u8>) {
        self.outstanding.push_back(Outstanding {
            pid,
            asked: image,
            tag,
        });
        self.encode(
            Header {
                op: Op::Get,
                flags: PageFlags::default(),
                pages: image.pages(self.page),
                vaddr: image.start(),
                dst_id: u64::from(pid),
            },
            out,
        );
    }

    /// Appends to `out` the CLOSE that ends the session. Nothing may be asked for behind it.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.closing = true;
        self.encode(
            Header {
                op: Op::Close,
                flags: PageFlags::default(),
                pages: Default::default(),
                vaddr: Vaddr(0),
                dst_id: 0,
            },
            out,
        );
    }

    fn encode(&self, header: Header, out: &mut Vec<u8>) {
        let mut bytes = [0; HEADER_BYTES_MAX];
        let length = header.encode(self.wire, &mut bytes);
        out.extend_from_slice(&bytes[..length]);
    }

    /// Length of a request, bytes.
    pub fn header_bytes(&self) -> usize {
        self.wire.header_bytes()
    }

    /// How many requests have not been answered.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Says what `unread` begins with, and how many of its bytes that takes.
    pub fn next(&mut self, unread: &[u8]) -> Result<(usize, Step<T>), FetchError> {
        match self.state {
            State::Header => self.next_answer(unread),
            State::Payload { next, end } => Ok(self.next_pages(unread, next, end)),
        }
    }

    fn next_answer(&mut self, unread: &[u8]) -> Result<(usize, Step<T>), FetchError> {
        let Some(front) = self.outstanding.front() else {
            return self.next_status(unread);
        };
        let length = self.wire.header_bytes();
        if unread.len() < length {
            return Ok((0, Step::Incomplete));
        }
        let header = Header::decode(self.wire, unread)?;
        let (asked, pid) = (front.asked, front.pid);
        let pages = header.pages.get();
        let answers = header.op == Op::AddFlags
            && header.vaddr == asked.start()
            && header.dst_id == u64::from(pid)
            && pages <= asked.pages(self.page).get();
        if !answers {
            let Header {
                op, vaddr, dst_id, ..
            } = header;
            return Err(FetchError::Mismatch {
                asked,
                pid,
                op,
                pages,
                vaddr,
                dst_id,
            });
        }
        if pages == 0 {
            let tag = front.tag.clone();
            self.outstanding.pop_front();
            return Ok((length, Step::Unavailable { tag, asked }));
        }
        if !header.flags.has(PageFlags::PRESENT) {
            return Err(FetchError::NoPages {
                vaddr: header.vaddr,
                pid,
            });
        }
        let next = asked.start().get();
        self.state = State::Payload {
            next,
            end: next + pages * self.page.bytes(),
        };
        Ok((
            length,
            Step::Answer {
                tag: front.tag.clone(),
            },
        ))
    }

    fn next_status(&self, unread: &[u8]) -> Result<(usize, Step<T>), FetchError> {
        match unread {
            [] => Ok((0, Step::Incomplete)),
            _ if !self.closing => Err(FetchError::Unasked),
            [a, b, c, d, ..] => Ok((4, Step::Closed(i32::from_le_bytes([*a, *b, *c, *d])))),
            _ => Ok((0, Step::Incomplete)),
        }
    }

    fn next_pages(&mut self, unread: &[u8], next: u64, end: u64) -> (usize, Step<T>) {
        if next == end {
            return (0, self.complete(end));
        }
        let whole = self.page.floor(unread.len() as u64).min(end - next);
        let Some(front) = self.outstanding.front().filter(|_| whole > 0) else {
            return (0, Step::Incomplete);
        };
        let tag = front.tag.clone();
        self.state = State::Payload {
            next: next + whole,
            end,
        };
        let image = PageRange::new(next, next + whole);
        // No larger than `unread`, so it fits.
        let length = usize::try_from(whole).unwrap_or(unread.len());
        (
            length,
            Step::Pages {
                tag,
                image,
                bytes: 0..length,
            },
        )
    }

    fn complete(&mut self, end: u64) -> Step<T> {
        self.state = State::Header;
        let Some(done) = self.outstanding.pop_front() else {
            return Step::Incomplete;
        };
        let rest = PageRange::new(end, done.asked.end().get());
        let rest = (!rest.is_empty()).then_some(rest);
        Step::Complete {
            tag: done.tag,
            asked: done.asked,
            rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    /// The byte that fills page `number`.
    fn fill(number: u64) -> u8 {
        number.to_le_bytes()[0]
    }

    fn answer(wire: Wire, pid: u32, vaddr: u64, pages: u64) -> Vec<u8> {
        let mut bytes = [0; HEADER_BYTES_MAX];
        let header = Header {
            op: Op::AddFlags,
            flags: PageFlags::PRESENT,
            pages: crate::units::PageCount(pages),
            vaddr: Vaddr(vaddr),
            dst_id: u64::from(pid),
        };
        let length = header.encode(wire, &mut bytes);
        let mut answer = bytes[..length].to_vec();
        for page in 0..pages {
            answer.extend(std::iter::repeat_n(fill(vaddr / 4096 + page), 4096));
        }
        answer
    }

    proptest! {
        /// However the bytes are cut, each asked page comes once, with its bytes, or is in a rest.
        #[test]
        fn answers_are_read_at_every_cut(
            asks in prop::collection::vec((1..40u64, 1..8u64, 1..8u64), 1..8),
            cuts in prop::collection::vec(1..9000usize, 1..40),
            v1: bool,
        ) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let mut fetcher = Fetcher::new(wire, PAGE);
            let (mut out, mut stream) = (Vec::new(), Vec::new());
            for (index, (at, pages, got)) in asks.iter().enumerate() {
                let image = PageRange::new(at * 4096, (at + pages) * 4096);
                fetcher.get(7, image, index, &mut out);
                stream.extend(answer(wire, 7, at * 4096, *got.min(pages)));
            }
            prop_assert_eq!(out.len(), asks.len() * wire.header_bytes());
            let mut cuts = cuts.iter().cycle();
            let (mut start, mut end) = (0, 0);
            let mut pages = vec![0; asks.len()];
            let mut complete = 0;
            while complete < asks.len() {
                match fetcher.next(&stream[start..end]).unwrap() {
                    (_, Step::Incomplete) => {
                        prop_assert!(end < stream.len());
                        end = stream.len().min(end + cuts.next().unwrap());
                    }
                    (used, step) => {
                        match step {
                            Step::Pages { tag, image, bytes } => {
                                for (index, page) in stream[start..][bytes].chunks(4096).enumerate() {
                                    let number = image.start().get() / 4096 + index as u64;
                                    prop_assert!(page.iter().all(|byte| *byte == fill(number)));
                                    pages[tag] += 1;
                                }
                            }
                            Step::Complete { tag, asked, rest } => {
                                complete += 1;
                                let rest = rest.map_or(0, |rest| rest.pages(PAGE).get());
                                prop_assert_eq!(asked.pages(PAGE).get(), asks[tag].1);
                                prop_assert_eq!(pages[tag] + rest, asks[tag].1);
                            }
                            _ => {}
                        }
                        start += used;
                    }
                }
            }
            prop_assert_eq!(start, stream.len());
        }
    }

    #[test]
    fn answers_to_other_questions_are_refused() {
        let image = PageRange::new(0x5000, 0x7000);
        let next = |bytes: &[u8]| {
            let mut fetcher = Fetcher::new(Wire::V2, PAGE);
            fetcher.get(7, image, (), &mut Vec::new());
            fetcher.next(bytes).map(|_| ())
        };
        assert_eq!(next(&answer(Wire::V2, 7, 0x5000, 2)), Ok(()));
        for wrong in [
            answer(Wire::V2, 8, 0x5000, 2),
            answer(Wire::V2, 7, 0x6000, 1),
            answer(Wire::V2, 7, 0x5000, 3),
        ] {
            assert!(matches!(next(&wrong), Err(FetchError::Mismatch { .. })));
        }
    }

    #[test]
    fn an_answer_without_pages_is_one() {
        let mut fetcher = Fetcher::new(Wire::V2, PAGE);
        for (tag, start) in [('a', 0x5000), ('b', 0x9000)] {
            let image = PageRange::new(start, start + 0x2000);
            fetcher.get(7, image, tag, &mut Vec::new());
        }
        let mut bytes = answer(Wire::V2, 7, 0x5000, 0);
        bytes.extend(answer(Wire::V2, 7, 0x9000, 1));
        let (used, step) = fetcher.next(&bytes).unwrap();
        let asked = PageRange::new(0x5000, 0x7000);
        assert_eq!(step, Step::Unavailable { tag: 'a', asked });
        let (_, step) = fetcher.next(&bytes[used..]).unwrap();
        assert_eq!(step, Step::Answer { tag: 'b' });
    }

    #[test]
    fn the_status_is_read_only_behind_a_close() {
        let mut fetcher = Fetcher::<()>::new(Wire::V1, PAGE);
        assert_eq!(fetcher.next(&[0; 4]), Err(FetchError::Unasked));
        fetcher.close(&mut Vec::new());
        assert_eq!(fetcher.next(&[0; 3]), Ok((0, Step::Incomplete)));
        assert_eq!(fetcher.next(&[0; 4]), Ok((4, Step::Closed(0))));
    }
}
