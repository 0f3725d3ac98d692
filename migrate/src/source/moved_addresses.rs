//! The service addresses at the source: off their devices while the processes may live elsewhere.

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ServiceAddress;
use serde::{Deserialize, Serialize};

use super::args::AddressArg;
use crate::address::{self, Attributes};

/// The addresses as they are written down.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct MovedAddresses {
    /// Each with how it lay on its device.
    found: Vec<(ServiceAddress, Attributes)>,
    /// Whether they may have been taken off.
    pub(super) taken: bool,
}

impl MovedAddresses {
    /// Looks for them on their devices.
    pub(super) async fn find(given: &[AddressArg]) -> Result<MovedAddresses> {
        let mut found = Vec::new();
        for AddressArg { here, .. } in given {
            let attributes = address::find(here).await?.ok_or_else(|| {
                let text = format!("{} is not on {} here", here.cidr(), here.device);
                Error::new(Kind::Usage, text)
            })?;
            found.push((here.clone(), attributes));
        }
        Ok(MovedAddresses {
            found,
            taken: false,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Takes them off.
    pub(super) async fn take(&self) -> Result<()> {
        for (service, _) in &self.found {
            address::remove(service).await?;
        }
        Ok(())
    }

    /// Puts them back, and tells the hosts around.
    pub(super) async fn give_back(&self) {
        for (service, attributes) in &self.found {
            if let Err(error) = address::add(service, attributes).await {
                tracing::error!("{} is not put back: {error}", service.cidr());
            }
        }
        for (service, _) in &self.found {
            address::announce(service).await;
        }
    }
}
