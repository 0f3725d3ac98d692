//! What CRIU says on its sockets, as pure code: no descriptors, no clock, no payload.

pub mod deframer;
pub mod fetch;
pub mod header;
pub mod lazy_socket;
pub mod log;
mod page_flags;
pub mod receive;
pub mod rpc;
pub mod rpc_fields;
pub mod serve;
