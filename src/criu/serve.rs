//! What a client that restores lazily asks of a page server, and the headers of the answers.
//!
//! ```text
//! client   GET  GET  GET ...                              CLOSE
//! server        header pages...  header pages...                 i32 0
//! ```
//!
//! Requests may be pipelined without limit and are answered in their order. An answer repeats the
//! request's address and id; its page count may be smaller (never 0), and the client asks again for
//! the rest. There is no answer that says "I have no such page": the connection is reset.
//!
//! Pure. The caller keeps the bytes: [`Requests`] reads one request at their front and says how
//! long it was.

use thiserror::Error;

use super::header::{
    DETECT_BYTES, HEADER_BYTES_MAX, Header, HeaderError, Op, PageFlags, Target, Wire,
};
use crate::limits::FRAME_PAGES_MAX;
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

/// The status that answers CLOSE: all is well.
pub const CLOSE_STATUS: [u8; 4] = 0i32.to_ne_bytes();

/// One request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Pages are wanted.
    Get(Get),
    /// The client has all it needs and awaits [`CLOSE_STATUS`].
    Close {
        /// Whether the server then waits until the client closes the connection (CLOSE) or leaves
        /// at once (FORCE_CLOSE, over a socket that somebody else owns).
        wait_for_end: bool,
    },
}

/// A request for pages, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Get {
    /// Pid in the images. CRIU asks for private memory alone: shared memory is never lazy.
    pub pid: u32,
    /// The pages.
    pub range: PageRange,
}

impl Get {
    /// Whose memory is wanted.
    pub fn target(&self) -> Target {
        Target::Process(self.pid)
    }

    /// Writes the header of the answer that gives the first `pages` of the wanted pages, and
    /// returns how many bytes of `out` it takes. Their bytes follow it on the wire.
    pub fn answer(&self, wire: Wire, pages: PageCount, out: &mut [u8; HEADER_BYTES_MAX]) -> usize {
        let header = Header {
            op: Op::AddFlags,
            flags: PageFlags::PRESENT,
            pages,
            vaddr: self.range.start(),
            dst_id: u64::from(self.pid),
        };
        header.encode(wire, out)
    }
}

/// A request that a page server with `--lazy-pages` cannot understand or serve.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RequestError {
    /// The header is none.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// An operation of a sender.
    #[error(
        "it sends {0}, as criu dump does: a page server that is to receive pages must be \
         started without --lazy-pages"
    )]
    Sender(Op),
    /// An id that is no pid.
    #[error("it asks for pages of {0:#x}, which is not a pid")]
    Pid(u64),
    /// Pages that no process can have.
    #[error(
        "it asks for {pages} pages of pid {pid} from {vaddr} on, which is not a valid range of pages"
    )]
    Range {
        /// The pid.
        pid: u32,
        /// Address of the first page.
        vaddr: Vaddr,
        /// Number of pages.
        pages: PageCount,
    },
}

/// Reads a client's requests. See the module's text.
#[derive(Debug)]
pub struct Requests {
    page: PageSize,
    /// The layout that the client must speak, if it is not free to choose.
    given: Option<Wire>,
    wire: Option<Wire>,
    /// See [`Requests::header_bytes_open`].
    rest: usize,
}

impl Requests {
    /// A reader at the start of a connection, which shows by its first request what it speaks. If
    /// `given` is given that must be it.
    pub fn new(page: PageSize, given: Option<Wire>) -> Requests {
        Requests {
            page,
            given,
            wire: None,
            rest: 0,
        }
    }

    /// How many bytes may still come that belong to the last request: more than none if it is a CLOSE and
    /// the first request, for it begins alike in both layouts. Whether they come the client decides, so
    /// they are not waited for before it has its answer.
    pub fn header_bytes_open(&self) -> usize {
        self.rest
    }

    /// The layout that the client speaks, known from the first request on.
    pub fn wire(&self) -> Option<Wire> {
        self.wire
    }

    /// The request at the front of `bytes` and its length there, or `None` if it is not whole yet.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<(Request, usize)>, RequestError> {
        let (wire, len) = match self.wire {
            Some(wire) if bytes.len() < wire.header_bytes() => return Ok(None),
            Some(wire) => (wire, wire.header_bytes()),
            None => match self.first(bytes)? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        let header = Header::decode(wire, bytes)?;
        let request = match header.op {
            Op::Get => Request::Get(self.check(&header)?),
            Op::Close => Request::Close { wait_for_end: true },
            Op::ForceClose => Request::Close {
                wait_for_end: false,
            },
            op => return Err(RequestError::Sender(op)),
        };
        Ok(Some((request, len)))
    }

    /// The layout and the length of the first header, if it is there. An unknown operation is an error as
    /// soon as it is there: nobody knows how long such a header is.
    fn first(&mut self, bytes: &[u8]) -> Result<Option<(Wire, usize)>, HeaderError> {
        let Some(word) = bytes.first_chunk() else {
            return Ok(None);
        };
        let op = Op::of_command(u32::from_le_bytes(*word))?;
        let Some(first) = bytes.first_chunk::<DETECT_BYTES>() else {
            return Ok(None);
        };
        let found = match Wire::detect_serve(first) {
            Some(found) => found,
            None if op.is_close() => {
                let len = bytes.len().min(HEADER_BYTES_MAX);
                self.rest = HEADER_BYTES_MAX - len;
                return Ok(Some((Wire::V1, len)));
            }
            None => Wire::unconfirmed(self.given),
        };
        if let Some(given) = self.given.filter(|given| *given != found) {
            return Err(HeaderError::OtherWire { given, found });
        }
        if bytes.len() < found.header_bytes() {
            return Ok(None);
        }
        self.wire = Some(found);
        Ok(Some((found, found.header_bytes())))
    }

    fn check(&self, header: &Header) -> Result<Get, RequestError> {
        let pid = u32::try_from(header.dst_id)
            .ok()
            .filter(|pid| *pid > 0)
            .ok_or(RequestError::Pid(header.dst_id))?;
        let (vaddr, pages) = (header.vaddr, header.pages);
        PageRange::checked(vaddr, pages, self.page)
            .filter(|_| pages.get() <= FRAME_PAGES_MAX)
            .map(|range| Get { pid, range })
            .ok_or(RequestError::Range { pid, vaddr, pages })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn header(op: Op, pages: u64, vaddr: u64, dst_id: u64) -> Header {
        Header {
            op,
            flags: PageFlags::default(),
            pages: PageCount(pages),
            vaddr: Vaddr(vaddr),
            dst_id,
        }
    }

    fn encoded(header: &Header, wire: Wire) -> Vec<u8> {
        let mut out = [0; HEADER_BYTES_MAX];
        let len = header.encode(wire, &mut out);
        out[..len].to_vec()
    }

    fn read_one(header: &Header, wire: Wire) -> Result<Option<(Request, usize)>, RequestError> {
        Requests::new(PAGE, Some(wire)).read(&encoded(header, wire))
    }

    proptest! {
        /// However the bytes of pipelined requests arrive, the same requests come out, and the
        /// layout is found by itself.
        #[test]
        fn requests_survive_every_split(
            gets in prop::collection::vec((1..1u32 << 22, 0x400..1u64 << 40, 1..2000u64), 1..30),
            cuts in prop::collection::vec(1..70usize, 1..20), v1: bool,
        ) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (pid, page, pages) in gets {
                let start = page << PAGE.shift();
                stream.extend(encoded(&header(Op::Get, pages, start, u64::from(pid)), wire));
                let range = PageRange::new(start, start + (pages << PAGE.shift()));
                expected.push(Request::Get(Get { pid, range }));
            }
            stream.extend(encoded(&header(Op::Close, 0, 0, 0), wire));
            expected.push(Request::Close { wait_for_end: true });

            let mut requests = Requests::new(PAGE, None);
            let (mut arrived, mut got) = (Vec::new(), Vec::new());
            let mut cuts = cuts.iter().cycle();
            let mut rest = stream.as_slice();
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                arrived.extend(piece);
                rest = later;
                while let Some((request, len)) = requests.read(&arrived).unwrap() {
                    got.push(request);
                    arrived.drain(..len);
                }
            }
            prop_assert!(arrived.is_empty());
            prop_assert_eq!(got, expected);
            prop_assert_eq!(requests.wire(), Some(wire));
        }
    }

    proptest! {
        /// A first request is read when its last byte is there, in either layout and however it is cut.
        #[test]
        fn a_first_request_is_read_with_its_last_byte(
            pid in 1u32..1 << 22, page in prop_oneof![0x10..0x400u64, 0x400..1u64 << 36],
            pages in 1..4096u64, close: Option<bool>, v1: bool, is_given: bool,
        ) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let request = match close {
                None => header(Op::Get, pages, page << PAGE.shift(), pid.into()),
                Some(true) => header(Op::ForceClose, 0, 0, page),
                Some(false) => header(Op::Close, 0, 0, 0),
            };
            let bytes = encoded(&request, wire);
            for cut in 0..bytes.len() {
                let mut requests = Requests::new(PAGE, is_given.then_some(wire));
                let first = requests.read(&bytes[..cut]).unwrap();
                let (read, len) = match first {
                    Some(first) => first,
                    None => requests.read(&bytes).unwrap().unwrap(),
                };
                let left = wire.header_bytes() - len;
                prop_assert!(left <= requests.header_bytes_open());
                match close {
                    Some(force) => prop_assert_eq!(read, Request::Close { wait_for_end: !force }),
                    None => {
                        let start = page << PAGE.shift();
                        let range = PageRange::new(start, start + (pages << PAGE.shift()));
                        prop_assert_eq!(read, Request::Get(Get { pid, range }));
                    }
                }
            }
        }
    }

    #[test]
    fn answers_repeat_the_request_with_the_pages_that_follow() {
        for wire in [Wire::V1, Wire::V2] {
            let range = PageRange::new(0x7000, 0x9000);
            let get = Get { pid: 12, range };
            let mut out = [0; HEADER_BYTES_MAX];
            let len = get.answer(wire, PageCount(1), &mut out);
            assert_eq!(len, wire.header_bytes());
            assert_eq!(out[..4], [6, 0, 4, 0]);
            let answer = Header::decode(wire, &out).unwrap();
            assert_eq!((answer.vaddr, answer.dst_id), (Vaddr(0x7000), 12));
            assert_eq!(answer.pages, PageCount(1));
        }
    }

    #[test]
    fn what_no_client_asks_is_refused() {
        let refused = |op, pages, vaddr, dst_id| {
            read_one(&header(op, pages, vaddr, dst_id), Wire::V2).unwrap_err()
        };
        for dst_id in [0, 1 << 32, u64::MAX] {
            let error = refused(Op::Get, 1, 0x1000, dst_id);
            assert_eq!(error, RequestError::Pid(dst_id));
        }
        for (pages, vaddr) in [
            (0, 0x1000),
            (1, 0x1001),
            (FRAME_PAGES_MAX + 1, 0),
            (9, !0xfff),
        ] {
            let error = refused(Op::Get, pages, vaddr, 7);
            assert!(
                matches!(error, RequestError::Range { pid: 7, .. }),
                "{error}"
            );
        }
        for op in [Op::Open2, Op::AddFlags, Op::Parent] {
            assert_eq!(refused(op, 0, 0, 7 << 8 | 1), RequestError::Sender(op));
        }
        let mut bytes = encoded(&header(Op::Get, 1, 0x1000, 7), Wire::V1);
        bytes[0] = 99;
        let error = Requests::new(PAGE, None).read(&bytes).unwrap_err();
        assert_eq!(error, RequestError::Header(HeaderError::UnknownOp(99)));
    }

    #[test]
    fn both_ways_to_close_are_told_apart() {
        for (op, wait_for_end) in [(Op::Close, true), (Op::ForceClose, false)] {
            let (request, _) = read_one(&header(op, 0, 0, 0), Wire::V1).unwrap().unwrap();
            assert_eq!(request, Request::Close { wait_for_end });
        }
    }
}
