//! The layers below a container's writable one: which they are, and those that the destination lacks.
//!
//! A layer is known by the digest of what it holds, which takes a reading of all of it. `STATE_DIR/layers.json` keeps
//! the digests of layers whose names, inodes, sizes and times are what they were.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::OCI_LAYERS_MAX;
use pageferry::migration::messages::{Check, Digest, OverlayRoot, Wanted, WantedFiles};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::container::Found;
use crate::client::AgentClient;
use crate::export::root_layers;
use crate::files::{LayerName, SentTree, name_layer};
use crate::records;
use crate::tree_summary::summarize;

/// Digests that are known, in the state directory.
const KNOWN: &str = "layers.json";

/// So many are kept.
const KNOWN_MAX: usize = 1024;

/// What has changed in the last moments may change again without another time.
const SETTLED: Duration = Duration::from_secs(3);

/// A layer below the writable one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Layer {
    dir: PathBuf,
    name: LayerName,
}

/// The overlay that a container's root is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Layered {
    /// The writable layer.
    pub(super) upper: PathBuf,
    /// The layers below, lowest first.
    layers: Vec<Layer>,
    userxattr: bool,
    redirect_dir: bool,
    /// Those that the destination lacks.
    pub(super) missing: Vec<Digest>,
}

/// A layer in a report.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct LayerReport {
    /// SHA-256 of what it holds.
    pub(crate) digest: String,
    /// Bytes of its files.
    pub(crate) holds_bytes: u64,
    /// Bytes that were sent; none of one that the destination had.
    pub(crate) bytes: u64,
    /// How long that took, ms.
    pub(crate) ms: f64,
}

impl LayerReport {
    /// For people.
    pub(super) fn shown(&self) -> String {
        let holds = self.holds_bytes;
        match self.bytes {
            0 => format!("{holds} bytes, there already"),
            sent => format!("{holds} bytes, {sent} bytes sent in {:.0} ms", self.ms),
        }
    }
}

/// A digest that is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Known {
    look: Digest,
    digest: Digest,
    bytes: u64,
}

/// Looks for the layers of the root file system at `root`; `None` if it is no overlay, or none that can be moved as one.
pub(super) async fn find(root: &Path, state_dir: &Path) -> Result<Option<Layered>> {
    let Some(found) = root_layers(root)? else {
        return Ok(None);
    };
    if found.lowers.len() > OCI_LAYERS_MAX {
        return Ok(None);
    }
    let known = state_dir.join(KNOWN);
    let (lowers, path) = (found.lowers.clone(), known.clone());
    let named = tokio::task::spawn_blocking(move || name_all(lowers, &path)).await;
    let named = named.map_err(|error| {
        let error = std::io::Error::other(error);
        Error::wrap(Kind::Io, "reading the layers was ended", error)
    })?;
    Ok(Some(Layered {
        upper: found.upper,
        layers: named?,
        userxattr: found.userxattr,
        redirect_dir: found.redirect_dir,
        missing: Vec::new(),
    }))
}

/// The same, if the destination can mount it; what is missing there is known then.
pub(super) async fn shared(
    container: &Found,
    state_dir: &Path,
    client: &AgentClient,
) -> Result<Option<Layered>> {
    let Some(mut layered) = find(&container.rootfs, state_dir).await? else {
        return Ok(None);
    };
    let missing = layered.ask_missing(client).await?;
    Ok(missing.map(|missing| {
        layered.missing = missing;
        layered
    }))
}

/// What `check` says of the layers; `None` if they do not travel by themselves.
pub(super) fn agreed(layered: Option<Layered>, check: &Check) -> Option<Layered> {
    let mut layered = layered.filter(|_| check.sends_root)?;
    layered.missing.clone_from(check.missing_layers.as_ref()?);
    Some(layered)
}

fn name_all(dirs: Vec<PathBuf>, path: &Path) -> Result<Vec<Layer>> {
    // Without it everything is read again.
    let mut known: Vec<Known> = records::read(path).ok().flatten().unwrap_or_default();
    let (mut layers, mut is_new) = (Vec::<Layer>::new(), false);
    for dir in dirs {
        let summary = summarize(&dir)?;
        let sum = Digest::of(&summary.sum);
        let name = match known.iter().find(|known| known.look == sum) {
            Some(known) => LayerName {
                digest: known.digest.clone(),
                bytes: known.bytes,
            },
            None => {
                tracing::info!("the layer {} is read", dir.display());
                let name = name_layer(&dir)?;
                if is_settled(summary.changed_s) {
                    is_new = true;
                    known.push(Known {
                        look: sum,
                        digest: name.digest.clone(),
                        bytes: name.bytes,
                    });
                }
                name
            }
        };
        // What one holds that is there again further up, nobody sees; and no overlay takes a directory twice.
        layers.retain(|layer| layer.name.digest != name.digest);
        layers.push(Layer { dir, name });
    }
    if is_new {
        known.drain(..known.len().saturating_sub(KNOWN_MAX));
        if let Err(error) = records::write(path, &known) {
            tracing::debug!("{error}");
        }
    }
    Ok(layers)
}

fn is_settled(changed_s: i64) -> bool {
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(changed_s).unwrap_or(0));
    let age = SystemTime::now().duration_since(changed);
    age.is_ok_and(|age| age > SETTLED)
}

impl Layered {
    /// Its description for the agent.
    pub(super) fn description(&self) -> OverlayRoot {
        OverlayRoot {
            layers: self
                .layers
                .iter()
                .map(|layer| layer.name.digest.clone())
                .collect(),
            userxattr: self.userxattr,
            redirect_dir: self.redirect_dir,
        }
    }

    /// Bytes of the layers that the destination lacks.
    pub(super) fn missing_bytes(&self) -> u64 {
        let missing = |layer: &&Layer| self.missing.contains(&layer.name.digest);
        let layers = self.layers.iter().filter(missing);
        layers.map(|layer| layer.name.bytes).sum()
    }

    /// Sends what the destination lacks.
    pub(super) async fn send(&self, client: &AgentClient) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::new();
        for layer in &self.layers {
            let LayerName { digest, bytes } = &layer.name;
            let mut report = LayerReport {
                digest: digest.to_string(),
                holds_bytes: *bytes,
                ..LayerReport::default()
            };
            if self.missing.contains(digest) {
                let mut tree = SentTree::new(layer.dir.clone(), format!("/v1/layers/{digest}"));
                match tree.seal(client, &[]).await {
                    Ok(sent) => (report.bytes, report.ms) = (sent.bytes, sent.ms),
                    // Another migration may have brought it meanwhile.
                    Err(error) => {
                        let missing = self.ask_missing(client).await?;
                        if missing.is_none_or(|missing| missing.contains(digest)) {
                            return Err(error);
                        }
                    }
                }
                tracing::info!(
                    "layer {digest}: {} bytes sent in {:.0} ms",
                    report.bytes,
                    report.ms
                );
            }
            reports.push(report);
        }
        Ok(reports)
    }

    /// Which layers the destination lacks; `None` if it can mount no overlay.
    async fn ask_missing(&self, client: &AgentClient) -> Result<Option<Vec<Digest>>> {
        let wanted = Wanted {
            container: None,
            addresses: Vec::new(),
            files: WantedFiles {
                overlay: Some(self.description()),
                ..WantedFiles::default()
            },
        };
        let check: Check = client.post("/v1/check", &wanted).await?;
        Ok(check.missing_layers)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_layer_is_read_once_and_again_when_it_has_changed() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join(KNOWN);
        let dirs: Vec<PathBuf> = ["a", "b", "c"]
            .iter()
            .map(|name| tmp.path().join(name))
            .collect();
        for (dir, text) in dirs.iter().zip(["one", "two", "one"]) {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("file"), text).unwrap();
            for at in [dir.join("file"), dir.clone()] {
                let file = fs::File::open(at).unwrap();
                file.set_modified(UNIX_EPOCH).unwrap();
            }
        }
        let layers = name_all(dirs.clone(), &path).unwrap();
        // The third one has what the first one has: of the two the upper one stays.
        let of = |layers: &[Layer]| -> Vec<PathBuf> {
            layers.iter().map(|layer| layer.dir.clone()).collect()
        };
        assert_eq!(of(&layers), &dirs[1..]);
        // They are too new to be relied on.
        assert!(!path.exists() && is_settled(0));
        let known = Known {
            look: Digest::of(&summarize(&dirs[0]).unwrap().sum),
            digest: Digest::of(&[9; 32]),
            bytes: 7,
        };
        records::write(&path, &[known]).unwrap();
        let layers = name_all(dirs[..1].to_vec(), &path).unwrap();
        assert_eq!(layers[0].name.bytes, 7);
        fs::write(dirs[0].join("file"), "three").unwrap();
        assert_eq!(
            name_all(dirs[..1].to_vec(), &path).unwrap()[0].name.bytes,
            5
        );
    }
}
