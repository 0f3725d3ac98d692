//! What a dump sends to a page server, kept so that it can be sent again.
//!
//! ```text
//!   a generator, or a real dump  -->  Recorder  -->  headers: as on the wire
//!                                                    file: the pages behind them, nothing else
//!                                                    frames: whose pages are where in the file
//!                                                    answers: what a good server says to it
//! ```
//!
//! Pages lie at page boundaries of the file, as in the memory of a process, so that they can be sent
//! from where they are. The frames tell what must be in the images of whoever received them.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Target, Wire};
use pageferry::criu::receive::{CLOSE_STORED, has_parent_answer, parent_answer};
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::units::{PageCount, PageRange, PageSize, Vaddr};
use testbed::load::content::mix;
use testbed::sys::WORD_BYTES;

/// Bytes written or compared at a time.
const PIECE_BYTES: usize = 1 << 20;

/// The process that generated pages belong to, and where its memory begins.
const GENERATED: Target = Target::Process(4242);
const GENERATED_START: u64 = 0x10_0000_0000;

/// Pages of one frame.
#[derive(Clone, Copy, Debug)]
struct Frame {
    target: Target,
    range: PageRange,
    /// Where their bytes begin in the file.
    offset: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Recording {
    path: PathBuf,
    /// What a server without parents answers when it has stored everything.
    pub(super) answers: Vec<u8>,
    page: PageSize,
    wire: Wire,
    frames: Vec<Frame>,
    /// All headers, one behind the other.
    headers: Vec<u8>,
    /// Bytes of pages behind each header.
    payloads: Vec<u64>,
    /// Length of the file, bytes.
    page_bytes: u64,
}

/// Takes down what a dump sends, header by header.
#[derive(Debug)]
struct Recorder {
    file: BufWriter<File>,
    target: Option<Target>,
    recording: Recording,
}

/// What a header asks of whoever listens.
struct HeaderReply<'a> {
    /// To be answered now.
    answer: &'a [u8],
    /// Bytes of pages that follow.
    payload: u64,
    /// Nothing more will come.
    closes: bool,
}

impl Recorder {
    fn create(path: &Path, wire: Wire, page: PageSize) -> Result<Recorder> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Recorder {
            file: BufWriter::with_capacity(PIECE_BYTES, file),
            target: None,
            recording: Recording {
                path: path.to_owned(),
                answers: Vec::new(),
                page,
                wire,
                frames: Vec::new(),
                headers: Vec::new(),
                payloads: Vec::new(),
                page_bytes: 0,
            },
        })
    }

    fn record(&mut self, header: &Header) -> Result<HeaderReply<'_>> {
        let mut bytes = [0; HEADER_BYTES_MAX];
        let length = header.encode(self.recording.wire, &mut bytes);
        self.recording.headers.extend(&bytes[..length]);
        let mut payload = 0;
        let answered = self.recording.answers.len();
        let answers = &mut self.recording.answers;
        match header.op {
            Op::Open | Op::Open2 => {
                self.target = Some(Target::from_dst_id(header.dst_id)?);
                if header.op == Op::Open2 {
                    answers.extend(has_parent_answer(false));
                }
            }
            Op::Parent => answers.extend(parent_answer(false)),
            Op::Close | Op::ForceClose => answers.extend(CLOSE_STORED),
            Op::AddFlags if !header.flags.has(PageFlags::PRESENT) => {}
            Op::Add | Op::AddFlags => {
                let page = self.recording.page;
                let range = PageRange::checked(header.vaddr, header.pages, page);
                let range = range.context("a frame of pages at no address")?;
                self.recording.frames.push(Frame {
                    target: self.target.context("pages of no process")?,
                    range,
                    offset: self.recording.page_bytes,
                });
                payload = range.bytes();
            }
            Op::Hole => {}
            Op::Get | Op::AddFlagsCompressed => bail!("a dump that says {:?}", header.op),
        }
        self.recording.payloads.push(payload);
        Ok(HeaderReply {
            answer: &self.recording.answers[answered..],
            payload,
            closes: matches!(header.op, Op::Close | Op::ForceClose),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.recording.page_bytes += bytes.len() as u64;
        Ok(self.file.write_all(bytes)?)
    }

    fn finish(mut self) -> Result<Recording> {
        self.file.flush()?;
        Ok(self.recording)
    }
}

/// Makes up a dump of `mib` MiB in frames of `frame_pages` pages, no two of which are alike.
pub(super) fn generate(
    path: &Path,
    mib: u32,
    frame_pages: u32,
    page: PageSize,
) -> Result<Recording> {
    let mut recorder = Recorder::create(path, Wire::V2, page)?;
    let header = |op, flags, pages, vaddr| Header {
        op,
        flags,
        pages: PageCount(pages),
        vaddr: Vaddr(vaddr),
        dst_id: GENERATED.dst_id(),
    };
    let nothing = PageFlags::default();
    recorder.record(&header(Op::Open2, nothing, 0, 0))?;
    let pages = u64::from(mib) << (20 - page.shift());
    let flags = PageFlags::PRESENT.with(PageFlags::LAZY);
    let mut words = 0..;
    let mut content = vec![0; page.as_usize()];
    for first in (0..pages).step_by(frame_pages as usize) {
        let count = u64::from(frame_pages).min(pages - first);
        let vaddr = GENERATED_START + (first << page.shift());
        recorder.record(&header(Op::AddFlags, flags, count, vaddr))?;
        for _ in 0..count {
            for (word, number) in content.chunks_exact_mut(WORD_BYTES).zip(words.by_ref()) {
                word.copy_from_slice(&mix(number).to_le_bytes());
            }
            recorder.write(&content)?;
        }
    }
    recorder.record(&header(Op::Close, nothing, 0, 0))?;
    recorder.finish()
}

/// Takes down what a dump sends over `connection`, and answers it as a page server would.
pub(super) fn capture(
    mut connection: impl Read + Write,
    path: &Path,
    wire: Wire,
    page: PageSize,
) -> Result<Recording> {
    let mut recorder = Recorder::create(path, wire, page)?;
    let mut bytes = [0; HEADER_BYTES_MAX];
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let header = &mut bytes[..wire.header_bytes()];
        connection.read_exact(header)?;
        let reply = recorder.record(&Header::decode(wire, header)?)?;
        connection.write_all(reply.answer)?;
        let (mut left, closes) = (reply.payload, reply.closes);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let piece = &mut piece[..most.min(PIECE_BYTES)];
            connection.read_exact(piece)?;
            recorder.write(piece)?;
            left -= piece.len() as u64;
        }
        if closes {
            return recorder.finish();
        }
    }
}

impl Recording {
    /// Opens the file of pages.
    pub(super) fn pages_file(&self) -> Result<File> {
        File::open(&self.path).with_context(|| self.path.display().to_string())
    }

    /// What is sent: headers, and how many bytes of the file's pages follow each.
    pub(super) fn frames(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let headers = self.headers.chunks_exact(self.wire.header_bytes());
        headers.zip(self.payloads.iter().copied())
    }

    /// Length of all that is sent, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.headers.len() as u64 + self.page_bytes
    }

    /// Length of the file of pages, bytes.
    pub(super) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages of all frames.
    pub(super) fn pages(&self) -> u64 {
        let pages = |frame: &Frame| frame.range.pages(self.page).get();
        self.frames.iter().map(pages).sum()
    }

    /// Checks that every page of the recording is in `images`, with its content.
    pub(super) fn check(&self, images: &Path) -> Result<()> {
        let dir = ImageDir::open_any(images, self.page)?;
        let file = self.pages_file()?;
        let mut opened: Option<(Target, Chain)> = None;
        for frame in &self.frames {
            let chain = match &opened {
                Some((target, chain)) if *target == frame.target => chain,
                _ => {
                    let chain = Chain::open(&dir, frame.target, Missing::Refuse)?;
                    &opened.insert((frame.target, chain)).1
                }
            };
            self.check_frame(&file, chain, frame)?;
        }
        Ok(())
    }

    fn check_frame(&self, file: &File, chain: &Chain, frame: &Frame) -> Result<()> {
        let mut at = frame.range.start();
        let (mut sent, mut stored) = (Vec::new(), Vec::new());
        while at < frame.range.end() {
            let place = format!("{} at {at}", frame.target);
            let found = chain.find(at).with_context(|| format!("{place} is lost"))?;
            let range = found.range.intersect(frame.range);
            let range = range.with_context(|| format!("{place} is lost"))?;
            let length = range.bytes().min(PIECE_BYTES as u64);
            let size = usize::try_from(length)?;
            sent.resize(size, 0);
            stored.resize(size, 0);
            let offset = frame.offset + at.get() - frame.range.start().get();
            file.read_exact_at(&mut sent, offset)?;
            chain.read(found.place, &mut stored)?;
            ensure!(sent == stored, "{place} was stored wrong");
            at = Vaddr(at.get() + length);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    #[test]
    fn what_is_generated_is_heard_again() {
        struct ScriptedPeer {
            sent: std::io::Cursor<Vec<u8>>,
            answered: Vec<u8>,
        }
        impl Read for ScriptedPeer {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.sent.read(buffer)
            }
        }
        impl Write for ScriptedPeer {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.answered.write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let dir = testbed::test_dir::TestDir::new().unwrap();
        let generated = generate(&dir.path("generated"), 1, 100, PAGE).unwrap();
        assert_eq!((generated.pages(), generated.frames.len()), (256, 3));
        assert_eq!(generated.answers, [0; 5]);
        let payloads: Vec<u64> = generated.frames().map(|(_, payload)| payload).collect();
        let runs = [100, 100, 56].map(|pages| pages * PAGE.bytes());
        assert_eq!(payloads, [0, runs[0], runs[1], runs[2], 0]);
        let pages = std::fs::read(&generated.path).unwrap();
        let (mut sent, mut left) = (Vec::new(), pages.as_slice());
        for (header, payload) in generated.frames() {
            let (payload, behind) = left.split_at(usize::try_from(payload).unwrap());
            sent.extend([header, payload].concat());
            left = behind;
        }
        assert_eq!(generated.bytes(), sent.len() as u64);
        let mut connection = ScriptedPeer {
            sent: std::io::Cursor::new(sent),
            answered: Vec::new(),
        };
        let path = dir.path("captured");
        let captured = capture(&mut connection, &path, Wire::V2, PAGE).unwrap();
        assert!(std::fs::read(&captured.path).unwrap() == pages);
        assert!(captured.frames().eq(generated.frames()));
        assert_eq!(connection.answered, generated.answers);
        assert_eq!(captured.frames.len(), generated.frames.len());
        // Nothing was stored anywhere.
        assert!(captured.check(dir.dir()).is_err());
    }
}
