//! What a userfaultfd says of its process's memory, as the kernel lays it out (linux/userfaultfd.h).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};

use crate::units::{PageRange, Vaddr};

/// Messages read with one call at most.
pub const MESSAGES_MAX: usize = 16;

/// A thread touched a page that is missing, and waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What it touched.
    pub address: Vaddr,
    /// Whether it writes.
    pub is_write: bool,
    /// Its id in the reader's PID namespace; 0 if the userfaultfd was made without UFFD_FEATURE_THREAD_ID, as CRIU makes
    /// it.
    pub thread: u32,
}

/// The same before anything is owned: what a read has left in a [`MessageBuffer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// See [`super::uffd::Event::Fault`].
    Fault(Fault),
    /// See [`super::uffd::Event::Fork`]. The descriptor's number is of the process that read the message.
    Fork(i32),
    /// See [`super::uffd::Event::Remap`].
    Remap {
        /// Where the memory was.
        from: PageRange,
        /// Where it begins now.
        to: Vaddr,
    },
    /// See [`super::uffd::Event::Remove`].
    Remove(PageRange),
    /// See [`super::uffd::Event::Unmap`].
    Unmap(PageRange),
}

/// A message's 32 bytes.
const MESSAGE_WORDS: usize = 4;

/// Where the kernel puts the messages of one read. It may be memory that another process sees as well: what
/// a read has taken from the kernel is there then, even if the reader is killed before it returns.
#[derive(Zeroable, Debug)]
pub struct MessageBuffer([[AtomicU64; MESSAGE_WORDS]; MESSAGES_MAX]);

impl MessageBuffer {
    /// Forgets all messages.
    pub fn clear(&self) {
        for message in &self.0 {
            message[0].store(0, Ordering::SeqCst);
        }
    }

    /// Puts in what a read could have left there.
    #[cfg(test)]
    pub(crate) fn put(&self, at: usize, message: Message) {
        let range = |range: PageRange| [range.start().get(), range.end().get(), 0];
        let (event, [first, second, third]): (u64, _) = match message {
            Message::Fault(fault) => {
                let arguments = [
                    u64::from(fault.is_write),
                    fault.address.get(),
                    u64::from(fault.thread),
                ];
                (0x12, arguments)
            }
            Message::Fork(number) => (0x13, [u64::from(number.cast_unsigned()), 0, 0]),
            Message::Remap { from, to } => (0x14, [from.start().get(), to.get(), from.bytes()]),
            Message::Remove(gone) => (0x15, range(gone)),
            Message::Unmap(gone) => (0x16, range(gone)),
        };
        for (word, value) in self.0[at].iter().zip([event, first, second, third]) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Where the kernel puts them. Whoever has it may let the kernel alone write there.
    pub(super) fn start(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut().cast()
    }

    /// The messages that there are, in order.
    pub fn messages(&self) -> impl Iterator<Item = io::Result<Message>> {
        let all = self.0.iter().map(|words| {
            let words = words.each_ref().map(|word| word.load(Ordering::SeqCst));
            bytemuck::cast::<_, RawMessage>(words)
        });
        all.filter(|raw| raw.event != 0).map(RawMessage::message)
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RawMessage {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

impl RawMessage {
    fn message(self) -> io::Result<Message> {
        let [first, second, third] = self.arguments;
        let range = |start: u64, end: u64| {
            (start <= end)
                .then(|| PageRange::new(start, end))
                .ok_or_else(|| {
                    io::Error::other("the kernel says a range that ends below its start")
                })
        };
        match self.event {
            0x12 => Ok(Message::Fault(Fault {
                address: Vaddr(second),
                is_write: first & PAGEFAULT_FLAG_WRITE != 0,
                thread: (third & 0xffff_ffff) as u32,
            })),
            0x13 => Ok(Message::Fork((first & 0xffff_ffff) as i32)),
            0x14 => Ok(Message::Remap {
                from: range(first, first.saturating_add(third))?,
                to: Vaddr(second),
            }),
            0x15 => Ok(Message::Remove(range(first, second)?)),
            0x16 => Ok(Message::Unmap(range(first, second)?)),
            other => Err(io::Error::other(format!(
                "unknown userfaultfd event {other:#x}"
            ))),
        }
    }
}

/// UFFD_PAGEFAULT_FLAG_WRITE.
const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;

const _: () = assert!(size_of::<RawMessage>() == 8 * MESSAGE_WORDS);
const _: () = assert!(size_of::<MessageBuffer>() == size_of::<RawMessage>() * MESSAGES_MAX);
