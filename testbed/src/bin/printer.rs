//! Prints numbered lines to standard output and standard error, for as long as it lives.

use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

/// Prints `line 1`, `line 2`, and so on.
#[derive(Parser)]
struct Args {
    /// Between two lines, µs.
    #[arg(long, default_value_t = 500)]
    pause_us: u64,
}

fn main() -> Result<()> {
    let pause = Duration::from_micros(Args::parse().pause_us);
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    for number in 1_u64.. {
        let line = format!("line {number}\n");
        // Both in turn: they may go to one log.
        match number % 10 {
            0 => err.write_all(line.as_bytes())?,
            _ => {
                out.write_all(line.as_bytes())?;
                out.flush()?;
            }
        }
        thread::sleep(pause);
    }
    Ok(())
}
