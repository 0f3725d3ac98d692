//! The only `unsafe` code: what the kernel offers and no well-kept crate wraps.
#![allow(unsafe_code)]

pub mod mapping;
pub mod process;
