//! The harness's end of a load.
