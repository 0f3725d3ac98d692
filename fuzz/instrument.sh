#!/bin/sh
# Runs the compiler with what libFuzzer needs: counters at branches, calls at comparisons. Stable rustc passes these
# flags on to LLVM. cargo calls this for the crates of the workspace alone (RUSTC_WORKSPACE_WRAPPER). A build script is no
# part of the fuzzer, and would not link.
case " $* " in
*" --crate-name build_script_"*) exec "$@" ;;
esac
exec "$@" -Copt-level=1 -Cdebug-assertions=on -Coverflow-checks=on -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
