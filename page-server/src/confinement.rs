//! What each role of a page server needs once it serves, and the process that reads /proc for it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use pageferry::daemon::sandbox::{FileAccess, Needs, hides_processes};
use pageferry::daemon::{Daemon, Forked, fork_waiting};
use pageferry::engine::io::transport::Peer;
use pageferry::engine::pending::{ProcReader, ReaderEnds};
use pageferry::engine::receive::stores::Stores;
use pageferry::error::Result;
use pageferry::image::dir::ImageDir;
use pageferry::image::reach::reach;

use crate::args::Args;

/// The images directory, that for lazy pages, and what is known of parents.
pub(crate) fn receiving(args: &Args, images: &Path, stores: &Stores) -> Needs {
    let mut write = vec![images.to_owned()];
    write.extend(args.split_lazy.clone());
    let first_parent = stores.first_parent();
    let parents = first_parent.map_or_else(Vec::new, |parent| reach(&parent, stores.page()));
    let mut read = Vec::new();
    match args.auto_dedup {
        // What has come anew is taken out of the parents.
        true => write.extend(parents),
        false => read.extend(parents),
    }
    Needs::receiving(FileAccess {
        read,
        write,
        remove: socket_directory(args),
        ..FileAccess::default()
    })
}

/// The images and their parents.
pub(crate) fn serving(args: &Args, images: &ImageDir) -> Needs {
    Needs::serving(FileAccess {
        read: reach(images.path(), images.page()),
        remove: socket_directory(args),
        ..FileAccess::default()
    })
}

/// No files, but the destination: it is found and connected to for each session.
pub(crate) fn forwarding(args: &Args, far_end: &Peer) -> Needs {
    let (names, ports) = match far_end {
        Peer::Tcp { host, port } => (host.parse::<IpAddr>().is_err(), vec![*port]),
        Peer::Unix(_) => (false, Vec::new()),
    };
    Needs::serving(FileAccess {
        remove: socket_directory(args),
        names,
        ports,
        ..FileAccess::default()
    })
}

/// Where the socket of `--unix` has its name, which goes at the end.
fn socket_directory(args: &Args) -> Vec<PathBuf> {
    let directory = args.unix.as_deref().and_then(Path::parent);
    let directory = directory.map(|path| match path.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => path.to_owned(),
    });
    directory.into_iter().collect()
}

/// Starts a process that reads /proc for this one, if the sandbox will hide other processes.
pub(crate) fn read_proc(daemon: &mut Daemon) -> Result<Option<ProcReader>> {
    if !hides_processes(daemon.sandbox()) {
        return Ok(None);
    }
    let ends = ReaderEnds::new()?;
    match fork_waiting(Forked::Background)? {
        Some(child) => {
            child.release()?;
            Ok(Some(ends.ask()))
        }
        None => ends.read(|| {
            if let Err(error) = daemon.stand_by(c"proc-reader", &Needs::reading_proc()) {
                tracing::error!("{error}");
                std::process::exit(1)
            }
        }),
    }
}
