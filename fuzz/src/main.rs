//! The fuzzer: libFuzzer around the target that the environment names. `cargo xtask fuzz` builds and runs it.

#![no_main]

use std::sync::LazyLock;

use fuzz_targets::Target;

static TARGET: LazyLock<&Target> = LazyLock::new(fuzz_targets::chosen);

libfuzzer_sys::fuzz_target!(|data: &[u8]| (TARGET.run)(data));
