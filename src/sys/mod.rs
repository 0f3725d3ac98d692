//! The only `unsafe` code: what the kernel offers and no well-kept crate wraps.
#![allow(unsafe_code)]

pub mod arp;
pub mod buffers;
pub mod collapse;
pub mod disconnect;
pub mod fdpass;
pub mod inject;
pub mod laboratory;
pub mod mapping;
pub mod netns;
pub mod owned_process;
pub mod pagemap;
pub mod process;
pub mod ring;
pub mod shared;
pub mod signals;
pub mod tcp_info;
pub mod uffd;
mod uffd_messages;
pub mod write_tracking;
