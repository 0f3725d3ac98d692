//! A look at the tree and at both hosts, before anything is done.

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Check, HostFacts, Wanted};
use pageferry::sys::process::page_size;
use pageferry::tls::Tls;
use pageferry::units::PageSize;

use super::args::{AddressArg, Subject, Target};
use super::container::Found;
use super::preflight;
use crate::client::AgentClient;
use crate::facts;
use crate::programs::Programs;
use crate::rounds::{self, Size, Tree};

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
    /// The container that the tree is, if it was named as one.
    pub(super) found: Option<Found>,
    other_problems: Vec<String>,
}

impl Survey {
    /// Looks at what is to be moved, at this host and at the agent's.
    pub(super) async fn take(
        subject: &Subject,
        addresses: &[AddressArg],
        target: &Target,
    ) -> Result<Survey> {
        let found = match &subject.container {
            Some(id) => Some(Found::look(id, subject).await?),
            None => None,
        };
        let root = found.as_ref().map(|found| found.root).or(subject.pid);
        let root = root.ok_or_else(|| {
            Error::new(Kind::Usage, "--pid or --container says what is to be moved")
        })?;
        let programs = target.programs.find()?;
        let client = AgentClient::new(target.to.clone(), Tls::load(&target.tls)?);
        let tree = Tree::of(root)?;
        std::fs::create_dir_all(&target.state_dir)
            .map_err(|error| Error::file("make the directory", &target.state_dir, error))?;
        let there: HostFacts = client.get("/v1/host").await?;
        let here = facts::of_host(&programs, &target.state_dir).await?;
        let page = page_size()
            .map_err(|error| Error::wrap(Kind::Unsupported, "cannot tell the page size", error))?;
        let size = rounds::measure(&tree, page);
        let wanted = Wanted {
            container: found.as_ref().map(|found| found.container.clone()),
            addresses: addresses
                .iter()
                .map(|address| address.there.clone())
                .collect(),
        };
        let check: Check = client.post("/v1/check", &wanted).await?;
        let mut other_problems = match &found {
            Some(found) => found.problems(&tree, check.runtime.as_deref()).await?,
            None => Vec::new(),
        };
        other_problems.extend(check.problems);
        Ok(Survey {
            programs,
            client,
            tree,
            here,
            there,
            page,
            size,
            found,
            other_problems,
        })
    }

    /// What is in the way of a migration.
    pub(super) fn problems(&self, lazy: bool) -> Vec<String> {
        let of_hosts =
            preflight::problems(&self.tree, &self.here, &self.there, self.size.bytes(), lazy);
        [of_hosts, self.other_problems.clone()].concat()
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
