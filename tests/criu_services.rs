//! Services that people run move in every mode, while clients at a third host talk to them over connections that
//! last. One quick case runs always. All the others:
//!
//! ```text
//! cargo nextest run -p pageferry --test criu_services --run-ignored only
//! ```

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::gate;
use testbed::services::{Service, ServiceHosts};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// Memory of the Redis.
const MIB: u32 = 32;

/// Moves the service once, in `mode`. No answer is wrong, no connection ends, and one copy lives.
fn moved(test_dir: &TestDir, criu: &Criu, service: Service, mode: &str) -> Result<()> {
    let Some(system) = gate::need(service.name(), service.system()) else {
        return Ok(());
    };
    let mut hosts = ServiceHosts::start(test_dir, &system, criu, &format!("services-{mode}"))?;
    let pid = hosts.serve(service)?;
    let mut clients = service.talk(hosts.client(), hosts.address()?, MIB)?;
    let report = hosts.migrate(pid, mode, &["--max-rounds", "3"])?;
    ensure!(
        report["result"] == "moved" && report["mode"] == mode,
        "{report}"
    );
    clients.expect_answers()?;
    hosts.expect_moved(pid)?;
    let longest = clients.take_longest();
    clients.finish()?;
    eprintln!(
        "{} {mode}: downtime {} ms, longest wait of a client {} ms, {} answers",
        service.name(),
        report["downtime_ms"],
        longest.as_millis(),
        clients.answers()
    );
    Ok(())
}

fn in_each_mode(suite: Suite, service: Service) {
    with_criu(suite, |test_dir, criu| {
        MODES.iter().try_for_each(|mode| {
            moved(test_dir, criu, service, mode)
                .with_context(|| format!("{} {mode}", service.name()))
        })
    });
}

#[test]
fn a_redis_moves_under_load() {
    with_criu(Suite::Sid, |test_dir, criu| {
        moved(test_dir, criu, Service::Redis, "hybrid")
    });
}

macro_rules! services {
    ($($name:ident: $service:ident),+ $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            #[ignore = "four migrations of a service: a minute or two"]
            fn sid() {
                in_each_mode(Suite::Sid, Service::$service);
            }

            #[test]
            #[ignore = "four migrations of a service: a minute or two"]
            fn experimental() {
                in_each_mode(Suite::Experimental, Service::$service);
            }
        }
    )+};
}

services! {
    redis: Redis,
    postgres: Postgres,
    nginx: Nginx,
    python: Python,
    forks: Forks,
    threads: Threads,
}
