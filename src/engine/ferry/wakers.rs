//! Wakes the loops of a session's connections, of which each stream has one at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Kind, Result};

/// Wakes a connection's loop from its sleep.
#[derive(Debug)]
pub(in crate::engine) struct Waker(EventFd);

impl Waker {
    pub(in crate::engine) fn new() -> Result<Arc<Waker>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_flags(flags);
        let event =
            event.map_err(|errno| Error::wrap(Kind::Io, "cannot make an eventfd", errno))?;
        Ok(Arc::new(Waker(event)))
    }

    /// The loop looks up, now or as soon as it would sleep.
    pub(in crate::engine) fn wake(&self) {
        // Full means that it will wake anyway.
        let _ = self.0.write(1);
    }

    pub(in crate::engine) fn clear(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The wakers of a session's connections, by stream. The newest connection of a stream counts.
#[derive(Debug, Default)]
pub(in crate::engine) struct Wakers(BTreeMap<u16, Arc<Waker>>);

impl Wakers {
    /// A connection takes the place of an older one of `stream`, which is returned.
    pub(in crate::engine) fn replace(
        &mut self,
        stream: u16,
        waker: &Arc<Waker>,
    ) -> Option<Arc<Waker>> {
        self.0.insert(stream, Arc::clone(waker))
    }

    /// The connection that `waker` belongs to is gone. Returns whether it was the one that counts.
    pub(in crate::engine) fn remove(&mut self, stream: u16, waker: &Arc<Waker>) -> bool {
        let current = self.0.get(&stream);
        let counts = current.is_some_and(|current| Arc::ptr_eq(current, waker));
        if counts {
            self.0.remove(&stream);
        }
        counts
    }

    /// Whether `stream` has another waker than `waker` by now: a newer connection's.
    pub(in crate::engine) fn is_replaced(&self, stream: u16, waker: &Arc<Waker>) -> bool {
        let current = self.0.get(&stream);
        current.is_some_and(|current| !Arc::ptr_eq(current, waker))
    }

    /// How many connections there are.
    pub(in crate::engine) fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them look for what is to be sent.
    pub(in crate::engine) fn wake_all(&self) {
        self.0.values().for_each(|waker| waker.wake());
    }
}
