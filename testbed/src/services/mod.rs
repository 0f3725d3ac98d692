//! Services that people run, moved between two hosts while a client at a third host talks to them and checks every
//! answer.
//!
//! ```text
//!   source (a Debian system)        destination (the same system)      client
//!   service, pageferry migrate ---> pageferry agent                    Clients: connections that last
//!   └──────────────── /shared: files of the service, on both hosts ───┘
//! ```

mod client;
mod download;
mod hosts;
mod postgres;
mod redis;
mod workers;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use client::{Clients, ServiceClient};
pub use hosts::ServiceHosts;

use crate::debian;
use crate::net::NetNs;

/// A service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// Counters and values, over four connections.
    Redis,
    /// Several processes with shared memory; a transaction is open over the move.
    Postgres,
    /// A slow download over one connection.
    Nginx,
    /// One Python process.
    Python,
    /// A tree of Python processes that write shared memory.
    Forks,
    /// A Python process of 16 threads.
    Threads,
}

impl Service {
    /// All of them.
    pub const ALL: [Service; 6] = [
        Service::Redis,
        Service::Postgres,
        Service::Nginx,
        Service::Python,
        Service::Forks,
        Service::Threads,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Service::Redis => "redis",
            Service::Postgres => "postgres",
            Service::Nginx => "nginx",
            Service::Python => "python",
            Service::Forks => "forks",
            Service::Threads => "threads",
        }
    }

    /// Its port.
    fn port(self) -> u16 {
        match self {
            Service::Redis => 6379,
            Service::Postgres => 5432,
            Service::Nginx => 8080,
            Service::Python | Service::Forks | Service::Threads => 7000,
        }
    }

    /// The directory of a system that has it, fetched unless it is here.
    ///
    /// # Errors
    /// No Debian archive, no network, or not root.
    pub fn system(self) -> Result<PathBuf> {
        let (name, package) = match self {
            Service::Redis => ("system-redis", "redis-server"),
            Service::Postgres => ("system-postgres", "postgresql"),
            Service::Nginx => ("system-nginx", "nginx"),
            Service::Python | Service::Forks | Service::Threads => ("system-python", "python3"),
        };
        debian::system(name, &[package])
    }

    /// Writes its files into `shared`, and tells the shell's commands that become it.
    fn prepare(self, shared: &Path) -> Result<String> {
        let port = self.port();
        match self {
            Service::Redis => Ok(redis::command(port)),
            Service::Postgres => postgres::prepare(shared, port),
            Service::Nginx => download::prepare(shared, port),
            Service::Python | Service::Forks | Service::Threads => {
                workers::prepare(shared, self.name(), port)
            }
        }
    }

    /// Clients in `net` that talk to it from now on. They fill a Redis with `mib` MiB; the others have memory of
    /// their own choice.
    ///
    /// # Errors
    /// It does not answer.
    pub fn talk(self, net: &NetNs, address: IpAddr, mib: u32) -> Result<Clients> {
        let at = SocketAddr::new(address, self.port());
        let talks: Result<Vec<Box<dyn ServiceClient>>> = match self {
            Service::Redis => redis::talks(net, at, mib),
            Service::Postgres => postgres::talks(net, at, &self.system()?),
            Service::Nginx => download::talks(net, at),
            Service::Python | Service::Forks | Service::Threads => {
                workers::talks(net, at, self.name())
            }
        };
        Clients::start(talks.with_context(|| self.name())?)
    }
}
