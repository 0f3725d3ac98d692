//! pageferry carries the memory of CRIU dumps between hosts.
//!
//! Bytes come in at one end of a line of modules and leave at the other, and no module reaches back:
//!
//! ```text
//! receive       socket -> criu::deframer -> criu::receive -> image::writer -> pages-*.img, pagemap-*.img
//!               socket -> pipe -> pages-*.img   (large frames)
//! serve         images -> image::chain -> criu::serve -> socket
//! forward       socket -> criu::receive -> ferry::{gather, delta, encode, sender} -> socket
//!               socket -> ferry::{receiver, batch, unpack} -> image::writer
//! forward_lazy  socket (lazy dump) -> criu::fetch -> lazy::drain -> memfd or spill file
//!               memfd or spill file -> criu::serve -> socket   (clients that speak CRIU's protocol)
//!               memfd or spill file -> ferry::{push_planner, encode, sender} -> socket   (lazy-client --ferry)
//! restore       uffd -> lazy::planner -> criu::fetch or ferry::postcopy_receiver -> socket   (faults)
//!               socket -> criu::fetch or ferry::postcopy_receiver -> lazy::planner -> uffd   (UFFDIO_COPY)
//! ```
//!
//! `units`, `limits`, `criu`, `lazy`, `ferry`, `migration`, `replay`, `watch` and the pagemap codec of `image` are
//! pure: they own no descriptor, read no clock and make no system call. Time and bytes are arguments. They build
//! alone, without the default feature `engine`. The loops in `engine` move the bytes and ask the pure modules what to do.
//! What a fault brings, and in what order the rest follows, is decided in [`lazy::policy`]. `sys` holds the
//! only `unsafe` code.
//!
//! # As a library
//!
//! What a `pagemap-PID.img` says:
//!
//! ```
//! use pageferry::criu::header::PageFlags;
//! use pageferry::image::file::{Magic, MessageReader, MessageWriter};
//! use pageferry::image::pagemap::{PagemapDecoder, Payload};
//! use pageferry::image::proto::{PagemapEntry, PagemapHead};
//! use pageferry::units::PageSize;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut image = MessageWriter::new(Vec::new(), Magic::Pagemap)?;
//! image.write(&PagemapHead::default())?;
//! image.write(&PagemapEntry {
//!     vaddr: 0x7000,
//!     nr_pages: Some(3),
//!     flags: Some(PageFlags::PRESENT.with(PageFlags::LAZY).bits()),
//!     ..PagemapEntry::default()
//! })?;
//! let bytes = image.into_inner();
//!
//! let mut image = MessageReader::new(bytes.as_slice(), Magic::Pagemap)?;
//! image.read::<PagemapHead>()?;
//! let mut decoder = PagemapDecoder::new(PageSize::KIB_4);
//! while let Some(entry) = image.read::<PagemapEntry>()? {
//!     let extent = decoder.decode(&entry)?;
//!     assert_eq!(extent.range.to_string(), "0x7000-0xa000");
//!     assert_eq!(extent.payload, Payload::Raw { offset: 0 });
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The answer to a lazy restore that asks for pages:
//!
//! ```
//! use pageferry::criu::fetch::{Fetcher, Step};
//! use pageferry::criu::header::{HEADER_BYTES_MAX, Wire};
//! use pageferry::criu::serve::{Request, Requests};
//! use pageferry::units::{PageCount, PageRange, PageSize};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let page = PageSize::KIB_4;
//! let mut client = Fetcher::new(Wire::V2, page);
//! let mut asked = Vec::new();
//! client.get(7, PageRange::new(0x7000, 0x9000), "a fault", &mut asked);
//!
//! let mut server = Requests::new(page, None);
//! let Some((Request::Get(get), _)) = server.read(&asked)? else {
//!     panic!("it asks for pages");
//! };
//! // One of the two pages: the client asks for the other one again.
//! let mut header = [0; HEADER_BYTES_MAX];
//! let length = get.answer(Wire::V2, PageCount(1), &mut header);
//! let answer = [&header[..length], &[42u8; 4096][..]].concat();
//!
//! let (used, step) = client.next(&answer)?;
//! assert!(matches!(step, Step::Answer { .. }));
//! let (_, step) = client.next(&answer[used..])?;
//! assert!(matches!(step, Step::Pages { image, .. } if image.bytes() == 4096));
//! # Ok(())
//! # }
//! ```
//!
//! The post-copy planner against touches of memory: [`lazy::simulation`]. `examples/` has policies of their own, each of
//! which is a lazy-client as well, and `replay`, which feeds a recorded trace to a policy.

pub mod criu;
#[cfg(feature = "engine")]
pub mod daemon;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
pub mod error;
pub mod ferry;
pub mod image;
pub mod lazy;
pub mod limits;
pub mod migration;
#[cfg(feature = "engine")]
pub mod observe;
pub mod replay;
#[cfg(feature = "engine")]
pub mod stream;
#[cfg(feature = "engine")]
mod sync;
#[cfg(feature = "engine")]
pub mod sys;
#[cfg(feature = "engine")]
pub mod tls;
pub mod units;
pub mod watch;
