//! A look at the tree and at both hosts, before anything is done.

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::HostFacts;
use pageferry::sys::process::page_size;
use pageferry::tls::Tls;
use pageferry::units::PageSize;

use super::args::Target;
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
}

impl Survey {
    /// Looks at the tree under `root`, at this host and at the agent's.
    pub(super) async fn take(root: i32, target: &Target) -> Result<Survey> {
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
        Ok(Survey {
            programs,
            client,
            tree,
            here,
            there,
            page,
            size,
        })
    }

    /// What is in the way of a migration.
    pub(super) fn problems(&self, lazy: bool) -> Vec<String> {
        preflight::problems(&self.tree, &self.here, &self.there, self.size.bytes(), lazy)
    }

    /// Fails with a list if something is in the way.
    pub(super) fn expect_no_problem(&self, lazy: bool) -> Result<()> {
        let problems = self.problems(lazy);
        if problems.is_empty() {
            return Ok(());
        }
        let root = self.tree.members().first().map_or(0, |member| member.pid);
        let list = problems.join("\n  - ");
        Err(Error::new(
            Kind::Usage,
            format!("pid {root} cannot be moved:\n  - {list}"),
        ))
    }
}
