//! Faults on missing pages: what they take by how the handler waits for them, and on which CPU it runs.

use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use hdrhistogram::Histogram;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::time::{ClockId, clock_gettime};
use pageferry::sys::laboratory::{Area, Backing, Modes, RingReader, Watched};
use pageferry::sys::process::page_size;
use pageferry::sys::uffd::{Event, Filled, Message, MessageBuffer, Wake};
use pageferry::units::{PageSize, Vaddr};

use super::{Scale, Unsupported, cpus, need};

/// See [`super::Group::metrics`].
pub(super) const METRICS: [&str; 6] = [
    "p50 µs",
    "p90 µs",
    "p99 µs",
    "max µs",
    "handler CPU µs",
    "faults",
];

/// Between two faults the thread computes for so long: the handler waits by then.
const PAUSE: Duration = Duration::from_micros(20);

/// How a handler waits for the next message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// There is none: the kernel fills the page with zero.
    Kernel,
    /// A read that blocks.
    Read,
    /// poll, then a read.
    Poll,
    /// epoll, then a read.
    Epoll,
    /// A read by io_uring.
    Uring,
    /// Reads that do not block, over and over.
    Spinning,
}

impl Wait {
    pub(super) const ALL: [Wait; 6] = [
        Wait::Kernel,
        Wait::Read,
        Wait::Poll,
        Wait::Epoll,
        Wait::Uring,
        Wait::Spinning,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Wait::Kernel => "no userfaultfd",
            Wait::Read => "read",
            Wait::Poll => "poll, read",
            Wait::Epoll => "epoll, read",
            Wait::Uring => "io_uring",
            Wait::Spinning => "spinning",
        }
    }
}

/// Where the handler runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// On the CPU of the thread that faults.
    SameCpu,
    /// On another one.
    OtherCpu,
}

impl Place {
    pub(super) const ALL: [Place; 2] = [Place::OtherCpu, Place::SameCpu];

    pub(super) fn name(self) -> &'static str {
        match self {
            Place::SameCpu => "the same CPU",
            Place::OtherCpu => "another CPU",
        }
    }
}

/// Measures faults on the pages of an area. The fault on its last page ends the handler.
pub(super) fn round(wait: Wait, place: Place, scale: &Scale) -> Result<Vec<f64>> {
    let page = page_size()?;
    let pages = (scale.bytes / page.as_usize()).min(scale.faults + 1);
    let area = Area::new(pages * page.as_usize(), Backing::Private)?;
    let (own, _) = cpus::two()?;
    let handlers = match place {
        Place::SameCpu => own,
        Place::OtherCpu => cpus::other()?,
    };
    if wait == Wait::Kernel {
        let of_thread = thread::scope(|scope| {
            scope
                .spawn(|| fault(&area, page, own, scale.time))
                .join()
                .ok()
        });
        let latencies = of_thread.context("the thread that faults")??;
        return Ok(figures(&latencies, Duration::ZERO));
    }
    need(0, "userfaultfd", "4.3")?;
    if wait == Wait::Uring {
        check_ring()?;
    }
    let blocks = matches!(wait, Wait::Read | Wait::Uring);
    let watched = Watched::new(area, 0, Modes::MISSING, blocks)?;
    let mut waiter = Waiter::new(wait, &watched)?;
    let (latencies, cpu) = thread::scope(|scope| {
        let faulting = scope.spawn(|| fault(watched.area(), page, own, scale.time));
        let serving = scope.spawn(|| {
            let served = serve(&mut waiter, &watched, page, handlers);
            if served.is_err() {
                // Or the thread that faults would wait for ever.
                watched.release()?;
            }
            served
        });
        (faulting.join(), serving.join())
    });
    let latencies = latencies.ok().context("the thread that faults")??;
    let cpu = cpu.ok().context("the handler")??;
    Ok(figures(&latencies, cpu))
}

fn figures(latencies: &Histogram<u64>, cpu: Duration) -> Vec<f64> {
    let us = |share: f64| latencies.value_at_quantile(share) as f64 / 1e3;
    let faults = latencies.len() as f64;
    let cpu_us = cpu.as_secs_f64() * 1e6 / faults.max(1.0);
    vec![us(0.5), us(0.9), us(0.99), us(1.0), cpu_us, faults]
}

/// Touches page after page, the last one at the end in any case.
fn fault(area: &Area, page: PageSize, cpu: usize, time: Duration) -> Result<Histogram<u64>> {
    cpus::stay_on(cpu)?;
    let mut latencies = Histogram::new(3)?;
    let begun = Instant::now();
    let last = area.length() - page.as_usize();
    for offset in (0..last).step_by(page.as_usize()) {
        let at = Instant::now();
        area.load(offset);
        latencies.record(u64::try_from(at.elapsed().as_nanos())?.max(1))?;
        if begun.elapsed() > time {
            break;
        }
        let pause = Instant::now();
        while pause.elapsed() < PAUSE {
            spin_loop();
        }
    }
    area.load(last);
    Ok(latencies)
}

/// Serves faults until the one on the last page. Returns the handler's CPU time.
fn serve(waiter: &mut Waiter, watched: &Watched, page: PageSize, cpu: usize) -> Result<Duration> {
    cpus::stay_on(cpu)?;
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let begun = now()?;
    let content = vec![1; page.as_usize()];
    let last = watched.area().length() - page.as_usize();
    let mut faults = Vec::new();
    loop {
        waiter.next(watched, &mut faults)?;
        for at in faults.drain(..) {
            let at = page.floor(at.get());
            let filled = watched.uffd().copy(Vaddr(at), &content, Wake::Now)?;
            ensure!(
                filled == Filled::Bytes(page.bytes()),
                "UFFDIO_COPY at {at:#x}: {filled:?}"
            );
            let start = watched.area().range(0..0)?.start().get();
            if at - start == last as u64 {
                return Ok(now()?.saturating_sub(begun));
            }
        }
    }
}

/// Waits for faults in one of the ways.
struct Waiter {
    wait: Wait,
    room: Box<MessageBuffer>,
    epoll: Option<Epoll>,
    ring: Option<RingReader>,
}

impl Waiter {
    fn new(wait: Wait, watched: &Watched) -> Result<Waiter> {
        let epoll = match wait {
            Wait::Epoll => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
                epoll.add(watched.uffd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
                Some(epoll)
            }
            _ => None,
        };
        Ok(Waiter {
            wait,
            room: Box::new(MessageBuffer::zeroed()),
            epoll,
            ring: None,
        })
    }

    /// Adds the addresses of the next faults.
    fn next(&mut self, watched: &Watched, faults: &mut Vec<Vaddr>) -> Result<()> {
        match self.wait {
            Wait::Poll => {
                let fd = watched.uffd().as_fd();
                poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE)
                    .context("poll")?;
            }
            Wait::Epoll => {
                let mut events = [EpollEvent::empty()];
                if let Some(epoll) = &self.epoll {
                    epoll
                        .wait(&mut events, EpollTimeout::NONE)
                        .context("epoll_wait")?;
                }
            }
            Wait::Uring => return self.by_ring(watched, faults),
            Wait::Kernel | Wait::Read | Wait::Spinning => {}
        }
        self.room.clear();
        let seen = |event| {
            if let Event::Fault(fault) = event {
                faults.push(fault.address);
            }
        };
        watched.uffd().read(&self.room, seen).context("read")?;
        if self.wait == Wait::Spinning {
            spin_loop();
        }
        Ok(())
    }

    /// The ring is made by the thread that uses it.
    fn by_ring(&mut self, watched: &Watched, faults: &mut Vec<Vaddr>) -> Result<()> {
        let ring = match &mut self.ring {
            Some(ring) => ring,
            empty => empty.insert(RingReader::new().context("io_uring")?),
        };
        let seen = |message| {
            if let Message::Fault(fault) = message {
                faults.push(fault.address);
            }
        };
        ring.read(watched.uffd(), seen)
            .context("a read by io_uring")
    }
}

/// Whether io_uring can be had.
fn check_ring() -> Result<()> {
    let made = RingReader::new().map(drop);
    made.map_err(|error| Unsupported(format!("no io_uring for this process: {error}")).into())
}
