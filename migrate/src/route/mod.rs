//! `--route`: what leads clients to a service, switched from this host to the destination and given back.
//!
//! ```text
//! look (before anything) ──> begun, on disk ──> switch ──> decision
//!                                                 └── anything fails until then: give back
//! ```
//!
//! A route that was given back leads where it led when it was looked at. Giving back what was never switched changes
//! nothing, so it may be done again by whoever finishes a migration.

mod exec;
mod haproxy;
mod nft;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use pageferry::error::Result;
use serde::{Deserialize, Serialize};

use exec::Exec;
use haproxy::Haproxy;
use nft::NftMap;

/// What commands are told of a migration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    /// The migration's directory.
    pub(crate) dir: &'a Path,
    /// Variables of the environment, without their prefix.
    pub(crate) variables: &'a [(&'static str, String)],
    /// How long a command may take.
    pub(crate) limit: Duration,
}

/// One route.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Route {
    /// An element of a map of nftables.
    Nft(NftMap),
    /// Two servers of a backend of HAProxy's.
    Haproxy(Haproxy),
    /// A command of the user's.
    Exec(Exec),
}

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Route, String> {
        match text.split_once(':') {
            Some(("nft", rest)) => rest.parse().map(Route::Nft),
            Some(("haproxy", rest)) => rest.parse().map(Route::Haproxy),
            Some(("exec", rest)) => rest.parse().map(Route::Exec),
            _ => Err(format!(
                "{text:?} is not a route: nft:, haproxy:, exec: or address: begin one"
            )),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Nft(map) => write!(f, "nft:{map}"),
            Route::Haproxy(servers) => write!(f, "haproxy:{servers}"),
            Route::Exec(exec) => write!(f, "exec:{exec}"),
        }
    }
}

/// A route, and how it was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    route: Route,
    /// The two servers, the first and the second, as they were.
    #[serde(default)]
    servers: Option<[haproxy::Server; 2]>,
}

/// The routes of one migration, as they are written down.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Routes {
    entries: Vec<Entry>,
    /// Whether they may have been switched.
    #[serde(default)]
    pub(crate) begun: bool,
}

impl Routes {
    /// Looks at each of them.
    ///
    /// # Errors
    /// One leads somewhere else than it says, or cannot be changed from here.
    pub(crate) async fn look(given: Vec<Route>) -> Result<Routes> {
        let mut entries = Vec::new();
        for route in given {
            let servers = match &route {
                Route::Nft(map) => {
                    map.expect_old().await?;
                    None
                }
                Route::Haproxy(servers) => Some(servers.look().await?),
                Route::Exec(_) => None,
            };
            entries.push(Entry { route, servers });
        }
        Ok(Routes {
            entries,
            begun: false,
        })
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Leads clients to the destination, by one route after the other. [`Routes::begun`] must be on disk before.
    ///
    /// # Errors
    /// One cannot be switched: all are to be given back.
    pub(crate) async fn switch(&self, facts: Facts<'_>) -> Result<()> {
        for entry in &self.entries {
            match &entry.route {
                Route::Nft(map) => map.switch().await?,
                Route::Haproxy(servers) => servers.switch().await?,
                Route::Exec(exec) => exec.run("switch", facts).await?,
            }
            tracing::info!("the route {} leads to the destination", entry.route);
        }
        Ok(())
    }

    /// Leads clients to this host again, where they may have been led away. Returns what could not be done.
    pub(crate) async fn give_back(&self, facts: Facts<'_>) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.begun {
            return problems;
        }
        for entry in self.entries.iter().rev() {
            let given = match (&entry.route, &entry.servers) {
                (Route::Nft(map), _) => map.give_back().await,
                (Route::Haproxy(servers), Some(before)) => servers.give_back(before).await,
                (Route::Haproxy(_), None) => Ok(()),
                (Route::Exec(exec), _) => exec.run("back", facts).await,
            };
            if let Err(error) = given {
                problems.push(format!(
                    "the route {} may not lead here: {error}",
                    entry.route
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_shown_as_it_is_written() {
        for text in [
            "nft:inet/nat/services/80=10.0.0.1 . 8080->10.0.0.2 . 8080",
            "haproxy:/run/haproxy.sock/web/old->new",
            "haproxy:127.0.0.1:9999/web/old->new",
            "exec:update-dns web",
        ] {
            assert_eq!(text.parse::<Route>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_route_is_refused() {
        for text in [
            "",
            "nft",
            "exec:",
            "dns:web",
            "nft:inet/nat/services",
            "nft:inet/nat/services/80=10.0.0.1",
            "nft:bridge/nat/services/80=a->b",
            "nft:inet/nat/services/80=a->a",
            "nft:inet/nat/ser;vices/80=a->b",
            "nft:inet/nat/services/80=a->b }; flush ruleset",
            "nft:inet/nat/services/=a->b",
            "nft:inet/-a/services/80=a->b",
            "haproxy:/run/haproxy.sock/web/old",
            "haproxy:/run/haproxy.sock/web/old->old",
            "haproxy:/web/old->new",
            "haproxy:/run/a.sock/web/old->new;shutdown",
            "haproxy:host/web/old->new",
        ] {
            assert!(text.parse::<Route>().is_err(), "{text}");
        }
    }
}
