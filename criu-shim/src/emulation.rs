//! Pre-dumps where the kernel tracks no dirty pages: dumps that leave the processes running, and whose
//! unchanged pages become holes by content.
//!
//! ```text
//! pre-dump                              -> dump --leave-running
//! pre-dump, dump with --prev-images-dir -> the same without it, to a page-server --dedup-content
//!                                          --prev-images-dir, over an inherited socket
//! ```
//!
//! Where the pages go to another host, its page server makes the holes: the shim adds `--dedup-content` to
//! page servers with a parent.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pageferry::criu::rpc::kind;
use pageferry::criu::rpc_fields::{Fields, options};
use pageferry::daemon::command_line::words::{Part, action};
use pageferry::daemon::swrk::{Client, inherit};
use pageferry::error::{Error, Kind, Result};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;

use crate::programs::Programs;

/// Log of the page server that makes the holes, in the images directory.
const LOG_FILE: &str = "pageferry-holes.log";

/// Largest deleted file that a pre-dump stores, bytes: it must not fail where a real one, which looks at no
/// files, would not.
const GHOST_LIMIT_BYTES: u64 = 1 << 31;

/// What a pre-dump is allowed and a dump is not: it looks at memory alone, and what is open or connected
/// must not make it fail.
const ALLOWED: &[u32] = &[
    options::LEAVE_RUNNING,
    options::EXT_UNIX_SK,
    options::TCP_ESTABLISHED,
    options::EVASIVE_DEVICES,
    options::SHELL_JOB,
    options::FILE_LOCKS,
    options::LINK_REMAP,
    options::AUTO_EXT_MNT,
    options::EXT_SHARING,
    options::EXT_MASTERS,
];

/// The same on the command line.
const ALLOWED_WORDS: &[&str] = &[
    "--leave-running",
    "--ext-unix-sk",
    "--tcp-established",
    "--evasive-devices",
    "--shell-job",
    "--file-locks",
    "--link-remap",
    "--external=mnt[]:sm",
    "--network-lock=skip",
    "--ghost-limit=2147483648",
];

/// What a real CRIU uses of this process's while it meets a request.
#[derive(Default)]
pub(crate) struct RequestResources {
    files: Vec<File>,
    /// Ends of sockets that only other processes use.
    handed_on: Vec<OwnedFd>,
    page_server: Option<Child>,
}

impl RequestResources {
    /// Opens what `given` names by descriptors of the client: for the real CRIU this process is the client.
    pub(crate) fn descriptors(&mut self, given: &mut Fields, client: &Client) -> Result<()> {
        for (field, flags) in [
            (options::IMAGES_DIR_FD, OFlag::O_RDONLY),
            (options::WORK_DIR_FD, OFlag::O_RDONLY),
            (options::STATUS_FD, OFlag::O_WRONLY),
        ] {
            let Some(number) = given.int(field).filter(|number| *number >= 0) else {
                continue;
            };
            let link = client.descriptor_link(number);
            let mut open = File::options();
            open.read(flags == OFlag::O_RDONLY)
                .write(flags == OFlag::O_WRONLY);
            let file = open.custom_flags(libc_flags()).open(&link);
            let file = file.map_err(|error| Error::file("open", &link, error))?;
            given.set(field, u64::try_from(file.as_raw_fd()).unwrap_or_default());
            self.files.push(file);
        }
        if given.get(options::PID).is_none() {
            // Without a pid it is the client itself.
            given.set(
                options::PID,
                u64::from(client.pid().as_raw().unsigned_abs()),
            );
        }
        // It names a socket of the client's, for what only dirty tracking needs.
        given.remove(options::PIDFD_STORE_SK);
        Ok(())
    }

    /// Starts a page server that stores in `images` what differs from `parent`. Returns the descriptor over
    /// which it is sent pages.
    fn start_page_server(
        &mut self,
        programs: &Programs,
        images: &Path,
        parent: &OsStr,
    ) -> Result<i32> {
        let pair = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        );
        let (ours, theirs) =
            pair.map_err(|errno| Error::wrap(Kind::Io, "cannot make a socket", errno))?;
        inherit(theirs.as_fd())?;
        let mut command = programs.page_server();
        command.args([
            "--no-default-config",
            "page-server",
            "--dedup-content",
            "-v3",
            "-o",
            LOG_FILE,
        ]);
        command
            .arg("-D")
            .arg(images)
            .arg("--prev-images-dir")
            .arg(parent);
        command
            .arg("--ps-socket")
            .arg(theirs.as_raw_fd().to_string());
        command.env_remove("CRIU_CONFIG_FILE");
        let server = command.spawn();
        let server =
            server.map_err(|error| Error::wrap(Kind::Usage, "cannot start page-server", error))?;
        self.page_server = Some(server);
        inherit(ours.as_fd())?;
        let number = ours.as_raw_fd();
        self.handed_on.push(ours);
        Ok(number)
    }

    /// The real CRIU has been started: it alone holds its end of the socket from now on, so that its end
    /// is noticed.
    pub(crate) fn close_handed_on(&mut self) {
        self.handed_on.clear();
    }

    /// Waits for the page server. If CRIU was content, so must it be.
    pub(crate) fn finish(mut self, done: bool) -> Result<()> {
        self.close_handed_on();
        let Some(mut server) = self.page_server.take() else {
            return Ok(());
        };
        let ended = server
            .wait()
            .map_err(|error| Error::wrap(Kind::Io, "cannot wait for page-server", error))?;
        if done && !ended.success() {
            let text = format!(
                "page-server failed ({ended}): {LOG_FILE} in the images directory says why"
            );
            return Err(Error::new(Kind::Io, text));
        }
        Ok(())
    }
}

/// Flags for descriptors that are opened once more.
fn libc_flags() -> i32 {
    OFlag::O_CLOEXEC.bits()
}

/// The options of a request of `kind`, as a dump that this kernel can do.
pub(crate) fn changed(
    kind: i32,
    given: &Fields,
    client: &Client,
    programs: &Programs,
    resources: &mut RequestResources,
) -> Result<Fields> {
    let mut changed = given.clone();
    let parent = given
        .bytes(options::PARENT_IMG)
        .map(|path| OsString::from_vec(path.to_vec()));
    changed.remove(options::PARENT_IMG);
    changed.remove(options::TRACK_MEM);
    if kind != kind::DUMP {
        for field in [
            options::PRE_DUMP_MODE,
            options::NOTIFY_SCRIPTS,
            options::LEAVE_STOPPED,
            options::LAZY_PAGES,
        ] {
            changed.remove(field);
        }
        for field in ALLOWED {
            changed.set(*field, 1);
        }
        changed.set(options::NETWORK_LOCK, options::NETWORK_LOCK_SKIP);
        changed.set(options::GHOST_LIMIT, GHOST_LIMIT_BYTES);
    }
    resources.descriptors(&mut changed, client)?;
    let stays_here =
        given.get(options::PAGE_SERVER).is_none() && !changed.is_on(options::LAZY_PAGES);
    if let Some(parent) = parent.filter(|_| stays_here) {
        let images = images_dir(given, client)?;
        let number = resources.start_page_server(programs, &images, &parent)?;
        let mut server = Fields::default();
        server.set(
            options::PAGE_SERVER_FD,
            u64::try_from(number).unwrap_or_default(),
        );
        changed.set_message(options::PAGE_SERVER, &server);
    }
    Ok(changed)
}

fn images_dir(given: &Fields, client: &Client) -> Result<PathBuf> {
    match given.int(options::IMAGES_DIR_FD) {
        Some(number) if number >= 0 => client.descriptor_path(number),
        _ => match given.bytes(options::IMAGES_DIR) {
            Some(path) => Ok(OsStr::from_bytes(path).into()),
            None => {
                let text = "swrk: the request names no images directory";
                Err(Error::new(Kind::Usage, text))
            }
        },
    }
}

fn value_of<'a>(parts: &'a [Part], name: &str) -> Option<&'a OsString> {
    let given = parts.iter().filter(|part| part.option == Some(name));
    given.filter_map(|part| part.value.as_ref()).next_back()
}

fn has(parts: &[Part], name: &str) -> bool {
    parts.iter().any(|part| part.option == Some(name))
}

/// Whether a page server's command line is one for differences to a parent.
pub(crate) fn stores_differences(parts: &[Part]) -> bool {
    has(parts, "prev-images-dir") && !has(parts, "lazy-pages")
}

/// Whether the command line of a dump or pre-dump needs dirty tracking.
pub(crate) fn concerns(parts: &[Part]) -> bool {
    let tracks = has(parts, "track-mem") || has(parts, "prev-images-dir");
    tracks || action(parts) == Some(OsStr::new("pre-dump"))
}

/// Carries out a dump or pre-dump that was asked for on the command line.
pub(crate) fn command_line(parts: &[Part], programs: &Programs) -> Result<ExitCode> {
    let pre_dump = action(parts) == Some(OsStr::new("pre-dump"));
    let dropped = ["track-mem", "prev-images-dir", "pre-dump-mode"];
    let mut words: Vec<OsString> = Vec::new();
    for part in parts {
        let is_action = part.is_word() && part.words[0] == "pre-dump";
        match part.option {
            _ if is_action => words.push("dump".into()),
            Some(name) if dropped.contains(&name) => {}
            Some("leave-stopped" | "network-lock" | "ghost-limit") if pre_dump => {}
            _ => words.extend(part.words.clone()),
        }
    }
    if pre_dump {
        words.extend(ALLOWED_WORDS.iter().map(OsString::from));
    }
    let parent = value_of(parts, "prev-images-dir");
    let stays_here = !has(parts, "page-server") && !has(parts, "lazy-pages");
    let Some(parent) = parent.filter(|_| stays_here) else {
        return programs.become_criu(&words);
    };
    let images = value_of(parts, "images-dir").map_or(Path::new("."), Path::new);
    let mut resources = RequestResources::default();
    let number = resources.start_page_server(programs, images, parent)?;
    words.extend([
        "--page-server".into(),
        "--ps-socket".into(),
        number.to_string().into(),
    ]);
    let mut command: Command = programs.criu();
    let criu = command.args(words).spawn();
    resources.close_handed_on();
    let ended = criu.and_then(|mut criu| criu.wait());
    let ended =
        ended.map_err(|error| Error::wrap(Kind::Usage, "cannot run the real criu", error))?;
    resources.finish(ended.success())?;
    let code = ended.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

/// `criu check`: what dirty tracking is wanted for can be done.
pub(crate) fn check(parts: &[Part], programs: &Programs) -> Result<ExitCode> {
    let is_tracking = |part: &&Part| {
        part.option == Some("feature")
            && part.value.as_deref() == Some(OsStr::new("mem_dirty_track"))
    };
    let others: Vec<OsString> = parts
        .iter()
        .filter(|part| !is_tracking(part))
        .flat_map(|part| part.words.clone())
        .collect();
    let asked = parts.iter().any(|part| is_tracking(&part));
    if !asked
        || parts
            .iter()
            .any(|part| part.option == Some("feature") && !is_tracking(&part))
    {
        return programs.become_criu(&others);
    }
    println!("mem_dirty_track is supported (pre-dumps are dumps here)");
    Ok(ExitCode::SUCCESS)
}
