//! What a service starts from: one file, as it came.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_IMAGES_BYTES_MAX;
use pageferry::migration::messages::Digest;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_stream::StreamExt;

/// Its name in the directory of the migration.
pub(super) const NAME: &str = "snapshot";

/// How long a source may be silent within it.
const SILENCE: Duration = Duration::from_secs(60);

/// Stores it, and tells its sum.
pub(super) async fn store(path: &Path, body: Body) -> Result<Digest> {
    let failed = |error| Error::file("write", path, error);
    let mut file = File::create(path).await.map_err(failed)?;
    let mut parts = body.into_data_stream();
    let mut sum = Sha256::new();
    let mut bytes = 0;
    loop {
        let next = timeout(SILENCE, parts.next()).await.map_err(|_| {
            let text = format!(
                "nothing of the snapshot arrived for {} s",
                SILENCE.as_secs()
            );
            Error::new(Kind::PeerLost, text)
        })?;
        let Some(part) = next else {
            break;
        };
        let part =
            part.map_err(|error| Error::wrap(Kind::PeerLost, "the snapshot breaks off", error))?;
        bytes += part.len() as u64;
        if bytes > MIGRATION_IMAGES_BYTES_MAX {
            let text = format!("a snapshot may have {MIGRATION_IMAGES_BYTES_MAX} bytes");
            return Err(Error::new(Kind::Protocol, text));
        }
        sum.update(&part);
        file.write_all(&part).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(Digest::of(&sum.finalize().into()))
}

/// Removes it, if it is there.
pub(super) fn remove(dir: &Path) {
    let path = dir.join(NAME);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}
