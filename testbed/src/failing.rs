//! Makes calls of a program fail: each call about files below a directory (open, read, write, rename, fsync, ...) is
//! counted, and those with given numbers return an error instead of doing anything. Or the calls on sockets are counted
//! (accept, sendmsg, recvmsg, ...), and the program is killed at one of them.
//!
//! A library, compiled by the C compiler of this machine, stands before the C library. What goes through io_uring it does
//! not see. Invariants: the program's own file descriptors are as without it; calls about other files are not counted.

use std::fs::{self, File};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::process::run;

/// What is compiled.
const SOURCE: &str = include_str!("failing.c");

/// Bytes of what program and test share: two counters and a name.
const COUNTS_BYTES: usize = 48;

/// The library, compiled.
#[derive(Debug)]
pub struct FailingCalls {
    library: PathBuf,
}

/// Which calls fail.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Their numbers, from 1 on.
    pub calls: RangeInclusive<u64>,
    /// What they return.
    pub errno: Errno,
    /// Only those of threads of this name are counted.
    pub thread: Option<&'static str>,
}

/// At which call on a socket a program is killed.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// Its number, from 1 on.
    pub call: u64,
    /// Only those of threads of this name are counted.
    pub thread: &'static str,
}

/// What one program has done.
#[derive(Debug)]
pub struct CallCounts(PathBuf);

impl FailingCalls {
    /// Compiles the library into `dir`.
    ///
    /// # Errors
    /// There is no C compiler.
    pub fn compiled(dir: &Path) -> Result<FailingCalls> {
        let (source, library) = (dir.join("failing.c"), dir.join("failing.so"));
        fs::write(&source, SOURCE)?;
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-O1", "-o"]);
        command.arg(&library).arg(&source).arg("-ldl");
        run(&mut command).context("compiling a library that fails calls")?;
        Ok(FailingCalls { library })
    }

    /// Has calls of the program that `command` starts fail, which are about files below `dir`. `counts` is a file to be made.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn apply(
        &self,
        command: &mut Command,
        dir: &Path,
        failure: &Failure,
        counts: &Path,
    ) -> Result<CallCounts> {
        let (environment, counts) = self.environment(dir, failure, counts)?;
        command.envs(environment);
        Ok(counts)
    }

    /// The environment of such a program.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn environment(
        &self,
        dir: &Path,
        failure: &Failure,
        counts: &Path,
    ) -> Result<(Vec<(&'static str, String)>, CallCounts)> {
        File::create(counts)?.set_len(COUNTS_BYTES as u64)?;
        let path = |path: &Path| path.display().to_string();
        let mut environment = vec![
            ("LD_PRELOAD", path(&self.library)),
            ("FAILING_COUNTS", path(counts)),
            ("FAILING_BELOW", path(dir)),
            ("FAILING_FIRST", failure.calls.start().to_string()),
            ("FAILING_LAST", failure.calls.end().to_string()),
            ("FAILING_ERRNO", (failure.errno as i32).to_string()),
        ];
        let thread = failure.thread.map(str::to_owned);
        environment.extend(thread.map(|name| ("FAILING_THREAD", name)));
        Ok((environment, CallCounts(counts.to_owned())))
    }

    /// The environment of a program that is killed. `counts` is a file to be made.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn killing(
        &self,
        kill: Kill,
        counts: &Path,
    ) -> Result<(Vec<(&'static str, String)>, CallCounts)> {
        let failure = Failure {
            calls: kill.call..=kill.call,
            // No error at all.
            errno: Errno::UnknownErrno,
            thread: Some(kill.thread),
        };
        let (mut environment, counts) = self.environment(Path::new("/"), &failure, counts)?;
        environment.push(("FAILING_SOCKETS", "1".to_owned()));
        Ok((environment, counts))
    }
}

impl CallCounts {
    /// How many calls were counted, and the name of the first one that failed.
    ///
    /// # Errors
    /// The file is gone.
    pub fn read(&self) -> Result<(u64, Option<String>)> {
        let bytes = fs::read(&self.0)?;
        ensure!(
            bytes.len() == COUNTS_BYTES,
            "counts of {} bytes",
            bytes.len()
        );
        let number =
            |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let name = bytes[16..]
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        let failed = (number(8) > 0).then(|| String::from_utf8_lossy(name).into_owned());
        Ok((number(0), failed))
    }
}
