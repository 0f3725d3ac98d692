//! What goes over the socket between who serves and who stands by.

use std::io;

use bytemuck::{Pod, Zeroable};

use crate::engine::restore::intake::SocketChange;
use crate::lazy::planner::SpaceId;
use crate::units::{PageRange, Vaddr};

/// What the one that serves tells. Its [`SpaceId`]s are its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine::restore) enum StandbyMessage {
    /// The process that the images call `pid` is restored, and `host` (0: nobody knows) on
    /// this host, where it has `started` (clock ticks since the host's start); its userfaultfd comes along.
    Process {
        id: SpaceId,
        pid: u32,
        host: i32,
        started: u64,
    },
    /// `parent` has forked; the child's userfaultfd comes along.
    Fork { id: SpaceId, parent: SpaceId },
    /// Memory has moved.
    Remap {
        id: SpaceId,
        from: PageRange,
        to: Vaddr,
    },
    /// Memory was unmapped or given back.
    Gone { id: SpaceId, range: PageRange },
    /// The process has ended.
    Exited { id: SpaceId },
    /// There is a new connection to the source, for the stream or for `faults`; its socket comes along.
    Source { faults: bool },
    /// What happens to the sockets that the restore speaks to; a new one comes along.
    Socket(SocketChange),
}

/// [`StandbyMessage`] as it goes over the socket, between two processes of one program, and as it is written down for
/// one that is started later. So many bytes never cross a page's border there.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable, Debug)]
pub(super) struct MessageBytes {
    /// How many events have been sent with this message.
    pub(super) events: u64,
    kind: u32,
    id: u32,
    /// A pid, or another process's id.
    other: u32,
    /// A pid on this host.
    host: i32,
    start: u64,
    end: u64,
    to: u64,
    started: u64,
    reserved: u64,
}

const _: () = assert!(size_of::<MessageBytes>() == 64);

impl StandbyMessage {
    /// Whom it is about.
    pub(super) fn id(self) -> Option<SpaceId> {
        match self {
            StandbyMessage::Process { id, .. }
            | StandbyMessage::Fork { id, .. }
            | StandbyMessage::Remap { id, .. }
            | StandbyMessage::Gone { id, .. }
            | StandbyMessage::Exited { id } => Some(id),
            StandbyMessage::Source { .. } | StandbyMessage::Socket(_) => None,
        }
    }

    pub(super) fn encode(self, events: u64) -> MessageBytes {
        let (host, started) = match self {
            StandbyMessage::Process { host, started, .. } => (host, started),
            _ => (0, 0),
        };
        let (kind, id, other, range, to) = match self {
            StandbyMessage::Process { id, pid, .. } => (1, id, pid, None, 0),
            StandbyMessage::Fork { id, parent } => (2, id, parent.0, None, 0),
            StandbyMessage::Remap { id, from, to } => (3, id, 0, Some(from), to.get()),
            StandbyMessage::Gone { id, range } => (4, id, 0, Some(range), 0),
            StandbyMessage::Exited { id } => (5, id, 0, None, 0),
            StandbyMessage::Source { faults } => (6, SpaceId(0), u32::from(faults), None, 0),
            StandbyMessage::Socket(change) => return socket_change(change, events),
        };
        MessageBytes {
            events,
            kind,
            id: id.0,
            other,
            host,
            start: range.map_or(0, |range| range.start().get()),
            end: range.map_or(0, |range| range.end().get()),
            to,
            started,
            reserved: 0,
        }
    }

    pub(super) fn decode(record: MessageBytes) -> io::Result<StandbyMessage> {
        let id = SpaceId(record.id);
        let range = || PageRange::new(record.start, record.end.max(record.start));
        Ok(match record.kind {
            1 => StandbyMessage::Process {
                id,
                pid: record.other,
                host: record.host,
                started: record.started,
            },
            2 => StandbyMessage::Fork {
                id,
                parent: SpaceId(record.other),
            },
            3 => StandbyMessage::Remap {
                id,
                from: range(),
                to: Vaddr(record.to),
            },
            4 => StandbyMessage::Gone { id, range: range() },
            5 => StandbyMessage::Exited { id },
            6 => StandbyMessage::Source {
                faults: record.other != 0,
            },
            7..=11 => StandbyMessage::Socket(decode_socket_change(record)),
            kind => {
                return Err(io::Error::other(format!(
                    "a message of unknown kind {kind}"
                )));
            }
        })
    }
}

fn socket_change(change: SocketChange, events: u64) -> MessageBytes {
    let (kind, other, start, end) = match change {
        SocketChange::Listening { device, inode } => (7, 0, device, inode),
        SocketChange::Accepted { number } => (8, number, 0, 0),
        SocketChange::Dropped { number } => (9, number, 0, 0),
        SocketChange::Chosen { number } => (10, number, 0, 0),
        SocketChange::Over => (11, 0, 0, 0),
    };
    MessageBytes {
        events,
        kind,
        other,
        start,
        end,
        ..MessageBytes::zeroed()
    }
}

fn decode_socket_change(record: MessageBytes) -> SocketChange {
    let number = record.other;
    match record.kind {
        7 => SocketChange::Listening {
            device: record.start,
            inode: record.end,
        },
        8 => SocketChange::Accepted { number },
        9 => SocketChange::Dropped { number },
        10 => SocketChange::Chosen { number },
        _ => SocketChange::Over,
    }
}
