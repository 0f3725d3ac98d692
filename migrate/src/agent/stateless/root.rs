//! The root file system of a container that comes, and the container that is made of it.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::StatelessEvent;
use pageferry::migration::StatelessState;
use pageferry::migration::messages::{ContainerCreate, ContainerStatus};

use super::image::unpack;
use super::session::Session;
use crate::files::{Installed, Permitted, StagingDir};
use crate::records;
use crate::runtime::bundle;

/// Which directory became the root file system, as it is kept.
const INSTALLED: &str = "installed.json";

/// A root goes where nothing is.
const NEW: Permitted = Permitted {
    replace: false,
    unused: false,
};

impl Session {
    /// Where its files arrive.
    fn root_staging(&self) -> StagingDir {
        let overlay = self.begin.overlay.as_ref();
        let lowers = overlay.map(|overlay| self.context.layers.lowers(overlay));
        StagingDir::of(&self.bundle().join("rootfs")).over(lowers)
    }

    /// Stores the image that comes, in place of an earlier one.
    pub(super) async fn store(&self, from: impl Read + Send + 'static) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.advance(StatelessEvent::ImageComes)?;
        {
            let mut inner = self.lock();
            inner.image = None;
            inner.root = None;
        }
        self.remove().await?;
        let (staging, id) = (self.root_staging(), self.begin.id.to_string());
        let unpacked = tokio::task::spawn_blocking(move || {
            staging.prepare(&id, NEW)?;
            unpack(from, &staging.arrived())
        });
        let unpacked = unpacked.await;
        let digest = unpacked.map_err(|error| {
            Error::wrap(Kind::Io, "an image was ended", io::Error::other(error))
        })??;
        self.lock().image = Some(digest);
        Ok(())
    }

    /// Makes the container.
    pub(super) async fn create(&self, request: &ContainerCreate) -> Result<ContainerStatus> {
        let _turn = self.turn.lock().await;
        let (state, image) = {
            let inner = self.lock();
            (inner.state, inner.image.clone())
        };
        if state != StatelessState::Receiving || image.as_ref() != Some(&request.sha256) {
            let text = format!(
                "container {}: its image arrived damaged: send it again",
                self.begin.id
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        let bundle = self.bundle();
        let staging = self.root_staging();
        if staging.overlay().is_some() {
            self.context.layers.note_target(staging.target())?;
        }
        let installed = staging.installed()?;
        records::write(&self.dir.join(INSTALLED), &installed)?;
        staging.install()?;
        staging.settle(&self.begin.id.to_string())?;
        bundle::make(&bundle, &self.begin.container.config)?;
        let id = &self.begin.container.id;
        let runtime = self.runtime()?;
        runtime.create(id, &bundle, &self.log()).await?;
        self.set_limits(&runtime).await;
        let root = self.find_root(&runtime).await?;
        self.lock().root = Some(root);
        self.advance(StatelessEvent::Made)?;
        Ok(self.status())
    }

    /// Ends the container, if there is one, and removes its bundle.
    pub(super) async fn remove(&self) -> Result<()> {
        let runtime = self.runtime()?;
        let id = &self.begin.container.id;
        let bundle = self.bundle();
        if let Some(state) = runtime.state(id).await?
            // Another one may have been given the name.
            && is_same(&state.bundle, &bundle)
        {
            runtime.delete(id).await?;
        }
        let installed = records::read::<Installed>(&self.dir.join(INSTALLED))?;
        self.root_staging().give_up(installed.as_ref(), false)?;
        // It may not be there.
        let _ = fs::remove_file(self.dir.join(INSTALLED));
        match fs::remove_dir_all(&bundle) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", &bundle, error))
            }
            _ => Ok(()),
        }
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}
