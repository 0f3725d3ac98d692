//! Addresses that come with a container without state or with a service, as they are kept in the migration's directory.

use std::fs;
use std::path::Path;

use pageferry::error::Result;
use pageferry::migration::messages::ServiceAddress;

use crate::address::{self, Attributes};
use crate::records;

/// Those that may be on their devices.
const ADDRESSES: &str = "addresses.json";

/// Brings them up, and tells the network.
pub(super) async fn bring_up(dir: &Path, services: Vec<ServiceAddress>) -> Result<()> {
    records::write(&dir.join(ADDRESSES), &services)?;
    for service in &services {
        address::add(service, &Attributes::default()).await?;
    }
    for service in services {
        tokio::spawn(async move { address::announce(&service).await });
    }
    Ok(())
}

/// Takes off what was brought up, once: later the addresses may be somebody else's. `of` names the migration in logs.
pub(super) async fn take_off(dir: &Path, of: &str) {
    let path = dir.join(ADDRESSES);
    let Ok(Some(services)) = records::read::<Vec<ServiceAddress>>(&path) else {
        return;
    };
    for service in &services {
        if let Err(error) = address::remove(service).await {
            tracing::error!("{of}: {error}");
        }
    }
    if let Err(error) = fs::remove_file(&path) {
        tracing::error!("cannot remove {}: {error}", path.display());
    }
}
