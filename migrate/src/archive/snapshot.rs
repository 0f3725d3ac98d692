//! `pageferry snapshot`: the volatile state alone, an image directory.

use std::path::PathBuf;
use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ContainerId;

use super::capture::{Target, Unfinished, capture};
use super::found;
use crate::programs::ProgramArgs;
use crate::runtime::RuntimeArg;

/// Writes the images of a container or a process tree into a directory.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Name of the container
    #[arg(
        value_name = "ID",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    id: Option<ContainerId>,

    /// Root of the process tree, instead of a container
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,

    /// The container's runtime
    #[arg(long, value_enum, default_value_t = RuntimeArg::Runc)]
    runtime: RuntimeArg,

    /// Directory of the runtime's state (--root of runc and crun) [default: the runtime's own]
    #[arg(long, value_name = "DIR", requires = "id")]
    runtime_root: Option<PathBuf>,

    /// Directory of the images: it must not be there
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,

    /// Let the processes go on afterwards
    #[arg(long)]
    leave_running: bool,

    #[command(flatten)]
    programs: ProgramArgs,
}

/// Takes a snapshot.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(super::unless_interrupted(snapshot(args)))
}

async fn snapshot(args: &Args) -> Result<()> {
    super::expect_absent(&args.output)?;
    let target = match (&args.id, args.pid) {
        (Some(id), _) => {
            found(id, args.runtime, args.runtime_root.clone())
                .await?
                .target
        }
        (None, Some(pid)) => Target::Pid(pid),
        (None, None) => return Err(Error::new(Kind::Usage, "name a container, or --pid")),
    };
    let programs = args.programs.find()?;
    let unfinished = Unfinished::beside(&args.output)?;
    let (images, work) = (unfinished.dir("images")?, unfinished.dir("work")?);
    let stopped = capture(target, &programs, &images, &work).await?;
    super::sync_files(&images)?;
    super::finish(&images, &args.output, stopped, args.leave_running).await
}
