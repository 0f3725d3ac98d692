//! Addresses that come with a migration: on their devices before the restore, and gone again if it is given up.

use std::path::PathBuf;

use pageferry::error::Result;
use pageferry::migration::messages::{ServiceAddress, TcpConnections};

use super::session::Session;
use crate::address::{self, Attributes};
use crate::records;

/// What was put on a device, as it is kept.
const ADDRESSES: &str = "addresses.json";

impl Session {
    fn addresses_file(&self) -> PathBuf {
        self.dir.join(ADDRESSES)
    }

    /// Name of the firewall's table for this migration.
    fn table(&self) -> String {
        format!("pageferry-{}", self.begin.id)
    }

    /// Whether packets for connections must wait until their sockets are restored and it is decided that they
    /// live here.
    fn blocks(&self) -> bool {
        self.begin.tcp == TcpConnections::Established && !self.begin.addresses.is_empty()
    }

    /// Brings the addresses up: the restore needs them here.
    pub(super) async fn bring_addresses_up(&self) -> Result<()> {
        if self.begin.addresses.is_empty() {
            return Ok(());
        }
        records::write(&self.addresses_file(), &self.begin.addresses)?;
        if self.blocks() {
            address::block(&self.table(), &self.begin.addresses).await?;
        }
        for service in &self.begin.addresses {
            address::add(service, &Attributes::default()).await?;
        }
        Ok(())
    }

    /// The processes live here: packets pass, and the hosts around are told.
    pub(super) async fn announce_addresses(&self) {
        if self.begin.addresses.is_empty() {
            return;
        }
        if self.blocks()
            && let Err(error) = address::pass(&self.table()).await
        {
            tracing::error!("migration {}: {error}", self.begin.id);
        }
        for service in self.begin.addresses.clone() {
            tokio::spawn(async move { address::announce(&service).await });
        }
    }

    /// The migration was given up: the addresses are the source's.
    pub(super) async fn take_addresses_down(&self) {
        let up = records::read::<Vec<ServiceAddress>>(&self.addresses_file());
        let Ok(Some(services)) = up else {
            return;
        };
        for service in &services {
            if let Err(error) = address::remove(service).await {
                tracing::error!("migration {}: {error}", self.begin.id);
            }
        }
        if self.blocks()
            && let Err(error) = address::pass(&self.table()).await
        {
            tracing::error!("migration {}: {error}", self.begin.id);
        }
    }
}
