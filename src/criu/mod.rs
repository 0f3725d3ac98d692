//! What CRIU says on its sockets, as pure code: no descriptors, no clock, no payload.

pub mod header;
