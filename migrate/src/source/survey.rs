//! A look at the tree and at both hosts, before anything is done.

use std::path::PathBuf;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::Costs;
use pageferry::migration::messages::{Check, HostFacts, TreeSpace, Wanted, WantedFiles};
use pageferry::sys::process::page_size;
use pageferry::tls::Tls;
use pageferry::units::PageSize;
use tokio::time::Instant;

use super::args::{AddressArg, Subject, Target};
use super::container::Found;
use super::disk_space::{self, SpaceNeed};
use super::files_args::FilesArgs;
use super::layers::{self, Layered};
use super::preflight::{self, NeededSpace};
use super::protections;
use crate::client::AgentClient;
use crate::facts;
use crate::programs::Programs;
use crate::rounds::{self, Size, Tree};
use crate::tree_summary::disk_bytes;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) programs: Programs,
    pub(super) client: AgentClient,
    pub(super) tree: Tree,
    pub(super) here: HostFacts,
    pub(super) there: HostFacts,
    pub(super) page: PageSize,
    pub(super) size: Size,
    /// With the rate at which the agent takes bytes.
    pub(super) costs: Costs,
    /// The share of the memory that has to travel, once it is compressed.
    pub(super) packed_share: f64,
    /// The container that the tree is, if it was named as one.
    pub(super) found: Option<Found>,
    /// Whether its root file system has to travel.
    pub(super) sends_root: bool,
    /// The overlay that it is, if its layers travel by themselves.
    pub(super) layered: Option<Layered>,
    /// Space that images need, as far as the destination has not said what space there is for all.
    disk_bytes: u64,
    other_problems: Vec<String>,
}

impl Survey {
    /// Looks at what is to be moved, at this host and at the agent's.
    pub(super) async fn take(
        subject: &Subject,
        addresses: &[AddressArg],
        (target, files): (&Target, &FilesArgs),
    ) -> Result<Survey> {
        let (root, found) = find_subject(subject, files).await?;
        let programs = target.programs.find()?;
        let client = AgentClient::new(target.to.clone(), Tls::load(&target.tls)?);
        let tree = Tree::of(root)?;
        std::fs::create_dir_all(&target.state_dir)
            .map_err(|error| Error::file("make the directory", &target.state_dir, error))?;
        let layered = match &found {
            Some(found) if files.wants_layers() => {
                layers::find(&found.rootfs, &target.state_dir).await?
            }
            _ => None,
        };
        let there: HostFacts = client.get("/v1/host").await?;
        let here = facts::of_host(&programs, &target.state_dir).await?;
        let page = page_size().map_err(|error| {
            Error::wrap(Kind::Unsupported, "cannot determine the page size", error)
        })?;
        let size = rounds::measure(&tree, page);
        let wanted = Wanted {
            container: found.as_ref().map(|found| found.container.clone()),
            addresses: addresses
                .iter()
                .map(|address| address.there.clone())
                .collect(),
            files: files.wanted(found.is_some(), layered.as_ref().map(Layered::description)),
        };
        let check: Check = client.post("/v1/check", &wanted).await?;
        let layered = layers::agreed(layered, &check);
        let costs = costs(&client)
            .await
            .on_hosts(here.copy_us_per_gib, there.copy_us_per_gib);
        let packed_share = rounds::packed_share(&tree, page, size.private_bytes);
        let mut other_problems = match &found {
            Some(found) => found.problems(&tree, check.runtime.as_deref()).await?,
            None => Vec::new(),
        };
        let of_root = (found.as_ref(), layered.as_ref());
        let needs = space_needs(of_root, files, &check, size.bytes()).await?;
        other_problems.extend(disk_space::problems(&needs));
        other_problems.extend(check.problems);
        Ok(Survey {
            disk_bytes: match needs.is_empty() {
                true => size.bytes(),
                false => 0,
            },
            programs,
            client,
            tree,
            here,
            there,
            page,
            size,
            costs,
            packed_share,
            found,
            sends_root: check.sends_root,
            layered,
            other_problems,
        })
    }

    /// Bytes on the wire for all of the memory.
    pub(super) fn packed_bytes(&self) -> u64 {
        packed_bytes(self.size.bytes(), self.packed_share)
    }

    /// What is in the way of a migration.
    pub(super) fn problems(&self, lazy: bool) -> Vec<String> {
        let space = NeededSpace {
            memory_bytes: self.size.restored_bytes(lazy),
            disk_bytes: self.disk_bytes,
        };
        let of_hosts = preflight::problems(&self.tree, &self.here, &self.there, space, lazy);
        [of_hosts, self.other_problems.clone()].concat()
    }

    /// What will be other than it was, though nothing is in the way.
    pub(super) fn warnings(&self) -> Vec<String> {
        protections::warnings(&self.tree)
    }

    /// What the restore makes copies of that forks share.
    pub(super) fn copied_bytes(&self, lazily: bool) -> u64 {
        self.size.restored_bytes(lazily) - self.size.restored_bytes(false)
    }

    /// Whether the restored processes fit into the destination's memory.
    pub(super) fn fits(&self, lazily: bool) -> bool {
        preflight::fits(&self.there, self.size.restored_bytes(lazily))
    }

    /// Whether only a restore that shares again what forks share fits into the destination's memory.
    pub(super) fn must_share(&self) -> bool {
        !self.fits(true) && self.fits(false)
    }

    /// The first process.
    pub(super) fn root(&self) -> i32 {
        self.tree.members().first().map_or(0, |member| member.pid)
    }

    /// Fails with a list if something is in the way.
    pub(super) fn expect_no_problem(&self, lazy: bool) -> Result<()> {
        let problems = self.problems(lazy);
        if problems.is_empty() {
            return Ok(());
        }
        let root = self.root();
        let list = problems.join("\n  - ");
        Err(Error::new(
            Kind::Usage,
            format!("pid {root} cannot be moved:\n  - {list}"),
        ))
    }
}

/// The first process of what is to be moved, and the container that it is, as the destination is to run it.
async fn find_subject(subject: &Subject, files: &FilesArgs) -> Result<(i32, Option<Found>)> {
    let mut found = match &subject.container {
        Some(id) => Some(Found::look(id, subject).await?),
        None => None,
    };
    if let Some(found) = &mut found {
        files.redirect(&mut found.container.config);
    }
    let root = found.as_ref().map(|found| found.root).or(subject.pid);
    let root = root.ok_or_else(|| {
        let text = "--pid or --container says what is to be moved";
        Error::new(Kind::Usage, text)
    })?;
    Ok((root, found))
}

/// What is to come to the destination's disks, where it says what space there is.
async fn space_needs(
    (found, layered): (Option<&Found>, Option<&Layered>),
    args: &FilesArgs,
    check: &Check,
    images_bytes: u64,
) -> Result<Vec<SpaceNeed>> {
    let root = found.filter(|_| check.sends_root);
    let volumes: Vec<PathBuf> = args
        .volume
        .iter()
        .map(|volume| volume.here.clone())
        .collect();
    let spaces: Vec<TreeSpace> = check.rooms.clone();
    let files = root.map(|found| match layered {
        Some(layered) => (layered.upper.clone(), "the writable layer"),
        None => (found.rootfs.clone(), "the root file system"),
    });
    let layers_bytes = layered.map_or(0, Layered::missing_bytes);
    let look = move || {
        let volumes = volumes
            .into_iter()
            .map(|dir| (dir.clone(), dir.display().to_string()));
        let files = files.map(|(dir, what)| (dir, what.to_owned()));
        let trees = files.into_iter().chain(volumes);
        let mut needs = Vec::new();
        let mut spaces = spaces.into_iter();
        if let Some(space) = spaces.next() {
            for (what, bytes) in [("images", images_bytes), ("layers", layers_bytes)] {
                let what = what.to_owned();
                needs.push(SpaceNeed { what, bytes, space });
            }
        }
        needs.extend(trees.zip(spaces).map(|((dir, what), space)| SpaceNeed {
            what,
            bytes: disk_bytes(&dir),
            space,
        }));
        needs
    };
    tokio::task::spawn_blocking(look).await.map_err(|error| {
        let error = std::io::Error::other(error);
        Error::wrap(Kind::Io, "the look at files was ended", error)
    })
}

/// The `share` of `bytes`.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]
pub(super) fn packed_bytes(bytes: u64, share: f64) -> u64 {
    (bytes as f64 * share.clamp(0.0, 1.0)) as u64
}

/// Short requests, of which the fastest tells what a request takes by itself.
const SHORT_REQUESTS: usize = 3;

/// Long requests at most, on one connection: 4 MiB.
const LONG_REQUESTS: usize = 8;

/// A link is not asked for longer.
const RATE_TIME: Duration = Duration::from_millis(500);

/// What a freeze costs, with the rate at which the agent takes bytes if that can be told.
async fn costs(client: &AgentClient) -> Costs {
    let mut costs = Costs::default();
    match rate(client).await {
        Ok(rate) => costs.bytes_per_s = rate,
        Err(error) => tracing::warn!("the link's rate is not known: {error}"),
    }
    costs
}

/// How fast the agent takes bytes, bytes a second: long requests one after another, less what the fastest short one took.
/// The first half of them does not count, as far as there are more: they open the connection's window, and what shapes a
/// link lets a burst pass faster.
async fn rate(client: &AgentClient) -> Result<f64> {
    // Nothing is asked that it must look for.
    let nothing = Wanted {
        container: None,
        addresses: Vec::new(),
        files: WantedFiles::default(),
    };
    let short = serde_json::to_vec(&nothing)
        .map_err(|error| Error::wrap(Kind::Usage, "a request cannot be written", error))?;
    let mut long = short.clone();
    // Space behind JSON means nothing.
    long.resize((MIGRATION_JSON_BYTES_MAX / 2).max(short.len()), b' ');
    let fastest = times(client, &short, SHORT_REQUESTS).await?;
    let fastest = fastest.into_iter().min().unwrap_or_default();
    let took = times(client, &long, LONG_REQUESTS).await?;
    Ok(sustained(long.len() - short.len(), fastest, &took))
}

/// How long each of some requests takes that ask `text`: at least one, and no more when all have taken [`RATE_TIME`].
async fn times(client: &AgentClient, text: &[u8], most: usize) -> Result<Vec<Duration>> {
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || times.len() < most && begun.elapsed() < RATE_TIME {
        let asked = Instant::now();
        let _: Check = client.post_text("/v1/check", text.to_vec()).await?;
        times.push(asked.elapsed());
    }
    Ok(times)
}

/// Bytes a second of long requests that each have `bytes` more than a `short` one, and took so long.
#[allow(clippy::cast_precision_loss)]
fn sustained(bytes: usize, short: Duration, took: &[Duration]) -> f64 {
    let counted = &took[took.len() / 2..];
    // The short one may have met a busy moment.
    let times = counted
        .iter()
        .map(|long| long.saturating_sub(short.min(*long / 2)));
    let time: Duration = times.sum();
    (bytes * counted.len()) as f64 / time.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_leaves_the_way_out_and_at_most_half() {
        let ms = Duration::from_millis;
        let near = |rate: f64, expected: f64| (rate / expected - 1.0).abs() < 1e-6;
        assert!(near(sustained(1_000_000, ms(2), &[ms(12)]), 100e6));
        assert!(near(sustained(1_000_000, ms(90), &[ms(20)]), 100e6));
        assert!(sustained(1, ms(1), &[Duration::ZERO]).is_finite());
    }

    #[test]
    fn a_burst_at_the_beginning_does_not_count() {
        let ms = Duration::from_millis;
        let took = [1, 3, 12, 11, 13].map(ms);
        let rate = sustained(1_000_000, ms(2), &took);
        assert!((rate / 100e6 - 1.0).abs() < 1e-6, "{rate}");
    }

    #[test]
    fn a_share_is_one_of_the_whole() {
        assert_eq!(packed_bytes(1 << 30, 0.5), 1 << 29);
        assert_eq!(packed_bytes(9, 7.0), 9);
    }
}
