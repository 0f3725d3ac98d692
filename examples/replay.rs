//! Feeds a recorded trace to a policy, and prints what it would have asked the source for.
//!
//! ```text
//! lazy-client -D images --trace faults.trace ...        records one; with --record-working-set all touches are in it
//! cargo run --example replay -- images/faults.trace images [adaptive|recording] > requests.csv
//! ```
//!
//! The source of the simulation has all lazy pages of the images, 200 µs away at 110 MiB/s. The time between two touches is
//! that of the trace, without what the first of them waited.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use pageferry::criu::header::Target;
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::lazy::policy::{ADAPTIVE, Policy, RECORDING};
use pageferry::lazy::simulation::{Link, Outcome, Simulation, Touch};
use pageferry::observe::trace::TraceReader;
use pageferry::units::{PageRange, PageSize, Vaddr};

const LINK: Link = Link {
    round_trip_us: 200,
    bytes_per_s: 110 << 20,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (trace, images, policy): (_, _, &'static dyn Policy) = match words[..] {
        [trace, images] | [trace, images, "adaptive"] => (trace, images, &ADAPTIVE),
        [trace, images, "recording"] => (trace, images, &RECORDING),
        _ => bail!("usage: replay TRACE IMAGES [adaptive|recording]"),
    };
    let outcome = replay(Path::new(trace), Path::new(images), policy)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    writeln!(out, "time_us,pid,address,bytes,class")?;
    for sent in &outcome.sent {
        let (image, request) = (sent.request.image, sent.request);
        writeln!(
            out,
            "{},{},{},{},{:?}",
            sent.time_us,
            request.pid,
            image.start(),
            image.bytes(),
            request.class
        )?;
    }
    out.flush()?;
    eprintln!(
        "{} touches waited, {} µs together; complete after {} µs",
        outcome.waits, outcome.waited_us, outcome.complete_us
    );
    Ok(())
}

fn replay(trace: &Path, images: &Path, policy: &'static dyn Policy) -> Result<Outcome> {
    let trace = TraceReader::open(trace)?;
    let page = PageSize::new(trace.page_bytes().into()).context("a page size")?;
    let memory = lazy_memory(&ImageDir::open(images, page)?)?;
    let mut simulation = Simulation::new(policy, page, &memory, LINK);
    let mut served_us = 0;
    for fault in trace {
        let fault = fault?;
        simulation.touch(Touch {
            after_us: fault.time_us.saturating_sub(served_us),
            pid: fault.pid,
            address: Vaddr(fault.address),
        });
        served_us = fault.time_us.saturating_add(fault.latency_us.into());
    }
    Ok(simulation.finish())
}

/// What a restore of `images` leaves to faults and the stream, by pid.
fn lazy_memory(images: &ImageDir) -> Result<Vec<(u32, Vec<PageRange>)>> {
    let of = |pid| {
        let chain = Chain::open(images, Target::Process(pid), Missing::Leave)?;
        let lazy = chain.extents().iter().filter(|extent| extent.lazy);
        Ok((pid, lazy.map(|extent| extent.range).collect()))
    };
    images.processes()?.into_iter().map(of).collect()
}
