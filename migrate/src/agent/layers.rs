//! Layers of containers that are kept here by the digests of what they hold, below the writable layers of containers.
//!
//! ```text
//! DIR/layers/DIGEST/             a layer, whole: nobody changes it
//!            DIGEST.pageferry/   one that arrives
//!            targets.json        what may be mounted over layers
//! ```
//!
//! A layer has its name once all of it is here and on the disk, and what it holds has that digest.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{LAYERS_ARRIVING_MAX, LAYERS_STORED_MAX};
use pageferry::migration::messages::{Digest, OverlayRoot, Seal};
use tokio::time::{Instant, sleep_until};

use super::contact::Contact;
use super::incoming::blocking;
use crate::files::{
    Lowers, Permitted, ReceivedTree, StagingDir, name_layer, overlays_are_possible,
};
use crate::records;

/// The directory, in the agent's.
const LAYERS: &str = "layers";

/// Targets that may be mounted over layers, in it.
const TARGETS: &str = "targets.json";

/// A layer of which nothing has come for so long is given up: the source has done so after 60 s.
const SILENCE: Duration = Duration::from_secs(120);

/// A layer goes where nothing is.
const NEW: Permitted = Permitted {
    replace: false,
    unused: false,
};

/// A layer on its way.
#[derive(Debug)]
pub(super) struct Arriving {
    pub(super) tree: Arc<ReceivedTree>,
    pub(super) contact: Contact,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct LayerStore {
    dir: PathBuf,
    arriving: Mutex<HashMap<Digest, Arc<Arriving>>>,
    /// Whether overlays can be mounted here, once that was tried.
    possible: OnceLock<bool>,
    /// Held while the list of targets changes.
    targets: Mutex<()>,
}

impl LayerStore {
    /// That of the agent whose directory is `dir`. What has arrived in part is removed, and overlays are mounted again
    /// that were mounted before this host was started.
    pub(super) fn open(dir: &Path) -> Result<LayerStore> {
        let store = LayerStore {
            dir: dir.join(LAYERS),
            arriving: Mutex::default(),
            possible: OnceLock::new(),
            targets: Mutex::default(),
        };
        let failed = |error| Error::file("make the directory", &store.dir, error);
        match fs::DirBuilder::new().mode(0o700).create(&store.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            _ => {}
        }
        for entry in fs::read_dir(&store.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_layer = entry.file_name().to_str().is_some_and(is_digest);
            if !is_layer && entry.path().is_dir() {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(|error| Error::file("remove", &path, error))?;
            }
        }
        for target in store.targets()? {
            if let Err(error) = StagingDir::of(&target).mount_again() {
                tracing::error!("{error}");
            }
        }
        Ok(store)
    }

    fn path(&self, layer: &Digest) -> PathBuf {
        self.dir.join(layer.to_string())
    }

    /// A layer that arrives.
    pub(super) fn find(&self, layer: &Digest) -> Result<Arc<Arriving>> {
        self.arriving().get(layer).map(Arc::clone).ok_or_else(|| {
            let text = format!("the layer {layer} does not arrive: ask what is here of it first");
            Error::new(Kind::Usage, text)
        })
    }

    fn arriving(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Arriving>>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which layers of an overlay are not here; `None` if no overlay can be mounted.
    pub(super) fn missing(&self, overlay: &OverlayRoot) -> Option<Vec<Digest>> {
        let possible = || overlays_are_possible(&self.dir);
        if !overlay.is_possible() || !*self.possible.get_or_init(possible) {
            return None;
        }
        let layers = overlay.layers.iter();
        let missing = layers.filter(|layer| !self.path(layer).is_dir());
        Some(missing.cloned().collect())
    }

    /// What an overlay is mounted over here. A layer that is missing is told when it is mounted.
    pub(super) fn lowers(&self, overlay: &OverlayRoot) -> Lowers {
        Lowers {
            dirs: overlay
                .layers
                .iter()
                .map(|layer| self.path(layer))
                .collect(),
            userxattr: overlay.userxattr,
            redirect_dir: overlay.redirect_dir,
        }
    }

    fn targets(&self) -> Result<Vec<PathBuf>> {
        Ok(records::read(&self.dir.join(TARGETS))?.unwrap_or_default())
    }

    /// Notes a target that is about to be mounted over layers.
    pub(super) fn note_target(&self, target: &Path) -> Result<()> {
        let _changing = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut targets = self.targets()?;
        targets
            .retain(|known| known != target && !StagingDir::of(known).layers_in_use().is_empty());
        targets.push(target.to_owned());
        records::write(&self.dir.join(TARGETS), &targets)
    }

    /// The layer on its way; its arrival begins if it has not.
    pub(super) fn begin(self: &Arc<LayerStore>, layer: &Digest) -> Result<Arc<Arriving>> {
        let mut all = self.arriving();
        if let Some(known) = all.get(layer) {
            return Ok(Arc::clone(known));
        }
        let refused = |text: String| Err(Error::new(Kind::Usage, text));
        if self.path(layer).exists() {
            return refused(format!("the layer {layer} is here already"));
        }
        if all.len() >= LAYERS_ARRIVING_MAX {
            return refused(format!(
                "{LAYERS_ARRIVING_MAX} layers arrive already: try again later"
            ));
        }
        self.make_room()?;
        let staging = StagingDir::of(&self.path(layer));
        staging.prepare("layer", NEW)?;
        let arriving = Arc::new(Arriving {
            tree: Arc::new(ReceivedTree::new(staging)?),
            contact: Contact::new(SILENCE),
        });
        all.insert(layer.clone(), Arc::clone(&arriving));
        let (store, name, watched) = (Arc::clone(self), layer.clone(), Arc::clone(&arriving));
        tokio::spawn(async move {
            while watched.contact.deadline() > Instant::now() {
                sleep_until(watched.contact.deadline()).await;
            }
            let given_up = blocking(move || store.give_up(&name, &watched)).await;
            if let Err(error) = given_up {
                tracing::error!("{error}");
            }
        });
        Ok(arriving)
    }

    /// Removes what has arrived of a layer, if it is not whole.
    fn give_up(&self, layer: &Digest, arriving: &Arc<Arriving>) -> Result<()> {
        let mut all = self.arriving();
        if !all
            .get(layer)
            .is_some_and(|known| Arc::ptr_eq(known, arriving))
        {
            return Ok(());
        }
        all.remove(layer);
        arriving.tree.end();
        arriving.tree.staging().give_up(None, false)
    }

    /// Removes layers that nothing is mounted over, if there are too many.
    fn make_room(&self) -> Result<()> {
        let failed = |error| Error::file("read", &self.dir, error);
        let mut stored = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(is_digest) {
                stored.push(entry.path());
            }
        }
        if stored.len() < LAYERS_STORED_MAX {
            return Ok(());
        }
        let targets = self.targets()?.into_iter();
        let used: HashSet<PathBuf> = targets
            .flat_map(|target| StagingDir::of(&target).layers_in_use())
            .collect();
        let Some(unused) = stored.iter().find(|layer| !used.contains(*layer)) else {
            let text = format!(
                "{} has {LAYERS_STORED_MAX} layers, and containers use all of them: let layers travel as files \
                 (--layers never)",
                self.dir.display()
            );
            return Err(Error::new(Kind::Usage, text));
        };
        // Its name goes first: what is left of it is no layer.
        let gone = self.dir.join("removed");
        fs::rename(unused, &gone).map_err(|error| Error::file("rename", unused, error))?;
        fs::remove_dir_all(&gone).map_err(|error| Error::file("remove", &gone, error))
    }

    /// The arrival of a layer has ended: it is what its name says, or it is removed.
    pub(super) fn seal(&self, layer: &Digest, seal: &Seal) -> Result<()> {
        let arriving = self.find(layer)?;
        arriving.tree.seal(&seal.digest)?;
        let staging = arriving.tree.staging();
        let named = name_layer(&staging.arrived());
        if !named.as_ref().is_ok_and(|named| named.digest == *layer) {
            self.give_up(layer, &arriving)?;
            let named = named?.digest;
            let text = format!(
                "the layer that was sent as {layer} has the digest {named}: it was removed"
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        staging.install()?;
        self.arriving().remove(layer);
        arriving.tree.end();
        staging.settle_layer()
    }
}

fn is_digest(name: &str) -> bool {
    name.parse::<Digest>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::SentBytes;

    fn store(dir: &Path) -> Arc<LayerStore> {
        Arc::new(LayerStore::open(dir).unwrap())
    }

    /// A layer with some files.
    fn layer(dir: &Path) -> Digest {
        fs::create_dir_all(dir.join("etc")).unwrap();
        fs::write(dir.join("etc/file"), vec![7; 100_000]).unwrap();
        name_layer(dir).unwrap().digest
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir.join(LAYERS)).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn overlay(layer: &Digest) -> OverlayRoot {
        OverlayRoot {
            layers: vec![layer.clone()],
            userxattr: false,
            redirect_dir: false,
        }
    }

    #[tokio::test]
    async fn a_layer_is_here_once_it_is_whole_and_what_its_name_says() {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, from) = (tmp.path().join("agent"), tmp.path().join("from"));
        fs::create_dir(&dir).unwrap();
        let name = layer(&from);
        let store = store(&dir);
        let arriving = store.begin(&name).unwrap();
        let sent = SentBytes::of(&from, &arriving.tree.index().unwrap());
        // Half of it, and then all.
        let half = &sent.stream[..sent.stream.len() / 2];
        assert!(arriving.tree.store(half).is_err());
        assert!(!store.path(&name).exists());
        let again = SentBytes::of(&from, &arriving.tree.index().unwrap());
        arriving.tree.store(&again.stream[..]).unwrap();
        assert!(!store.path(&name).exists());
        store.seal(&name, &again.seal).unwrap();
        assert_eq!(names(&dir), [name.to_string()]);
        assert_eq!(name_layer(&store.path(&name)).unwrap().digest, name);
        assert!(store.begin(&name).is_err());
        store.possible.set(true).unwrap();
        assert_eq!(store.missing(&overlay(&name)), Some(Vec::new()));
        let other = Digest::of(&[1; 32]);
        assert_eq!(store.missing(&overlay(&other)), Some(vec![other]));
    }

    #[tokio::test]
    async fn what_is_not_what_it_was_said_to_be_is_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, from) = (tmp.path().join("agent"), tmp.path().join("from"));
        fs::create_dir(&dir).unwrap();
        layer(&from);
        let store = store(&dir);
        let wrong = Digest::of(&[1; 32]);
        assert!(
            store
                .seal(
                    &wrong,
                    &Seal {
                        digest: String::new()
                    }
                )
                .is_err()
        );
        let arriving = store.begin(&wrong).unwrap();
        let sent = SentBytes::of(&from, &arriving.tree.index().unwrap());
        arriving.tree.store(&sent.stream[..]).unwrap();
        let refused = store.seal(&wrong, &sent.seal).unwrap_err();
        assert_eq!(refused.kind(), Kind::Protocol);
        assert!(names(&dir).is_empty() && store.arriving().is_empty());
    }

    #[tokio::test]
    async fn half_of_a_layer_is_gone_when_the_agent_is_started_again_or_hears_no_more() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let name = Digest::of(&[2; 32]);
        let first = store(dir);
        drop(first.begin(&name).unwrap());
        assert_eq!(names(dir), [format!("{name}.pageferry")]);
        let second = store(dir);
        assert!(names(dir).is_empty());
        let arriving = second.begin(&name).unwrap();
        second.give_up(&name, &arriving).unwrap();
        assert!(names(dir).is_empty() && second.arriving().is_empty());
        // Others must not be removed with it.
        let next = second.begin(&name).unwrap();
        second.give_up(&name, &arriving).unwrap();
        assert!(second.arriving().contains_key(&name));
        drop(next);
    }
}
