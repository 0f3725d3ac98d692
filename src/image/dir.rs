//! A directory of CRIU images: which processes it holds, their mappings, and its parent.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use prost::Message;

use super::file::{FileError, Magic, MessageReader};
use super::mm::Mappings;
use super::open::open_regular;
use super::proto::{Core, Mm, PstreeEntry, TASK_DEAD};
use crate::criu::header::Target;
use crate::error::{Error, Kind, Result};
use crate::limits::{COMMAND_LINE_BYTES_MAX, PARENT_DEPTH_MAX};
use crate::units::{PageSize, Vaddr};

/// Name of the link to the images that a directory's images are a difference to.
pub const PARENT_LINK: &str = "parent";

/// The head of a list of robust futexes in bytes (`struct robust_list_head` of a 64-bit kernel).
const ROBUST_HEAD_BYTES: u64 = 24;

/// An image file with its messages, open.
pub type ImageReader = MessageReader<BufReader<File>>;

/// An image directory. Its path is absolute: it stays right when the working directory changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageDir {
    path: PathBuf,
    page: PageSize,
}

impl ImageDir {
    /// Opens the directory `path`, whose images were made on a host with pages of `page`. Fails
    /// with [`Kind::Usage`] if it holds no images.
    pub fn open(path: &Path, page: PageSize) -> Result<ImageDir> {
        let dir = ImageDir::open_any(path, page)?;
        let holds_images = dir.path.join("pstree.img").exists() || !dir.targets()?.is_empty();
        if !holds_images {
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "{} is not an image directory: it has neither pstree.img nor pagemap-*.img (give \
                     the directory that holds the dump)",
                    path.display()
                ),
            ));
        }
        Ok(dir)
    }

    /// Opens the directory `path`, whether it holds images already or is to receive them.
    pub fn open_any(path: &Path, page: PageSize) -> Result<ImageDir> {
        let usage = |error: io::Error| {
            let context = format!("cannot open the image directory {}", path.display());
            Error::wrap(Kind::Usage, context, error)
        };
        let absolute = path.canonicalize().map_err(usage)?;
        if !absolute.is_dir() {
            return Err(usage(io::ErrorKind::NotADirectory.into()));
        }
        Ok(ImageDir {
            path: absolute,
            page,
        })
    }

    /// The directory's absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The page size of the images.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// Pids of the tasks in `pstree.img`, in its order (the root first). Zombies are among them:
    /// they have no memory.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let path = self.path.join("pstree.img");
        let tasks: Option<Vec<PstreeEntry>> = self.messages(&path, Magic::Pstree)?;
        let Some(tasks) = tasks else {
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "there is no {}: the directory given with -D must be the one that criu dump \
                     wrote and criu restore reads",
                    path.display()
                ),
            ));
        };
        Ok(tasks.iter().map(|task| task.pid).collect())
    }

    /// Whether the process `pid` of `pstree.img` has memory: a zombie has none. Without `core-PID.img` that
    /// cannot be told.
    pub(crate) fn has_memory(&self, pid: u32) -> Result<Option<bool>> {
        let path = self.path.join(format!("core-{pid}.img"));
        let cores: Option<Vec<Core>> = self.messages(&path, Magic::Core)?;
        let cores = cores.into_iter().flatten();
        let task = cores.filter_map(|core| core.task).next();
        Ok(task.map(|task| task.task_state != TASK_DEAD))
    }

    /// The addresses that the kernel touches when a thread of `pid` ends: its list of robust futexes and the
    /// word of `set_tid_address`. It waits for no userfaultfd then, so that these pages must be there before.
    /// Without `core-TID.img` of a thread, that thread has none.
    pub(crate) fn touched_at_exit(&self, pid: u32) -> Result<Vec<Vaddr>> {
        let tasks: Option<Vec<PstreeEntry>> =
            self.messages(&self.path.join("pstree.img"), Magic::Pstree)?;
        let tasks = tasks.into_iter().flatten();
        let mut threads: Vec<u32> = tasks
            .filter(|task| task.pid == pid)
            .flat_map(|task| task.threads)
            .collect();
        if !threads.contains(&pid) {
            threads.push(pid);
        }
        let mut touched = Vec::new();
        for thread in threads {
            let path = self.path.join(format!("core-{thread}.img"));
            let cores: Option<Vec<Core>> = self.messages(&path, Magic::Core)?;
            for core in cores.into_iter().flatten() {
                let infos = [core.thread_x86, core.thread_aarch64];
                touched.extend(infos.iter().flatten().map(|info| info.clear_tid_addr));
                if let Some(thread) = core.thread {
                    // Three words, which may lie on two pages.
                    let head = thread.futex_rla;
                    touched.extend([head, head.saturating_add(ROBUST_HEAD_BYTES - 1)]);
                }
            }
        }
        touched.sort_unstable();
        touched.dedup();
        Ok(touched.into_iter().map(Vaddr).collect())
    }

    /// The pages with the command line and the environment of `pid`, of which the kernel gives out nothing while they
    /// are missing. No more of each than [`COMMAND_LINE_BYTES_MAX`]; none without `mm-PID.img`.
    pub(crate) fn command_line(&self, pid: u32) -> Result<Vec<Vaddr>> {
        let mm: Option<Vec<Mm>> =
            self.messages(&self.path.join(format!("mm-{pid}.img")), Magic::Mm)?;
        let mut pages = Vec::new();
        for mm in mm.iter().flatten() {
            for (start, end) in [(mm.arg_start, mm.arg_end), (mm.env_start, mm.env_end)] {
                if start >= end {
                    continue;
                }
                let end = end.min(start.saturating_add(COMMAND_LINE_BYTES_MAX));
                let page = self.page.as_usize();
                pages.extend((self.page.floor(start)..end).step_by(page).map(Vaddr));
            }
        }
        pages.dedup();
        Ok(pages)
    }

    /// Whether `other` is this directory, by whatever path: links and bind mounts lead to one as well.
    pub fn is_same(&self, other: &ImageDir) -> Result<bool> {
        let identity = |dir: &ImageDir| {
            let found = std::fs::metadata(&dir.path);
            let found = found.map_err(|error| Error::file("look at", &dir.path, error))?;
            Ok((found.dev(), found.ino()))
        };
        Ok(identity(self)? == identity(other)?)
    }

    /// The mappings of process `pid`, from `mm-PID.img`.
    pub fn mappings(&self, pid: u32) -> Result<Mappings> {
        let path = self.path.join(format!("mm-{pid}.img"));
        let mm: Option<Vec<Mm>> = self.messages(&path, Magic::Mm)?;
        let Some(mm) = mm else {
            let text = format!(
                "there is no {}: pid {pid} was not dumped here",
                path.display()
            );
            return Err(Error::new(Kind::Image, text));
        };
        let vmas = mm.iter().flat_map(|mm| &mm.vmas);
        Mappings::new(vmas, self.page).map_err(|problem| {
            let text = format!("{} is damaged: {problem}", path.display());
            Error::new(Kind::Image, text)
        })
    }

    /// Whose pagemaps the directory has, sorted.
    pub fn targets(&self) -> Result<Vec<Target>> {
        let failed = |error| Error::file("list", &self.path, error);
        let mut targets = Vec::new();
        for entry in self.path.read_dir().map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            targets.extend(name.to_str().and_then(target_of_pagemap));
        }
        targets.sort_unstable();
        Ok(targets)
    }

    /// The pagemap of `target`, at its first message. `None` if the directory has none.
    pub fn pagemap(&self, target: Target) -> Result<Option<(PathBuf, ImageReader)>> {
        let path = self.path.join(target.pagemap_name());
        let reader = open_image(&path, Magic::Pagemap)?;
        Ok(reader.map(|reader| (path, reader)))
    }

    /// Whether the directory has a pagemap of `target`.
    pub fn has_pagemap(&self, target: Target) -> bool {
        self.path.join(target.pagemap_name()).exists()
    }

    /// Path of the pages file with the number `pages_id`.
    pub fn pages_path(&self, pages_id: u32) -> PathBuf {
        self.path.join(format!("pages-{pages_id}.img"))
    }

    /// The directory behind the `parent` link; `None` if there is no link or nothing behind it, as
    /// for CRIU.
    pub fn parent(&self) -> Result<Option<ImageDir>> {
        let link = self.path.join(PARENT_LINK);
        match link.try_exists() {
            Ok(true) => ImageDir::open_any(&link, self.page).map(Some),
            Ok(false) => Ok(None),
            Err(error) => Err(Error::file("follow", &link, error)),
        }
    }

    /// This directory and its parents, nearest first. Fails if they go round in a ring or deeper
    /// than [`PARENT_DEPTH_MAX`].
    pub fn chain_dirs(&self) -> Result<Vec<ImageDir>> {
        let mut chain_dirs = vec![self.clone()];
        let mut next = self.parent()?;
        while let Some(dir) = next {
            let mut came_by = false;
            for seen in &chain_dirs {
                came_by |= seen.is_same(&dir)?;
            }
            let problem = if came_by {
                Some(format!("come back to {}", dir.path.display()))
            } else if chain_dirs.len() == PARENT_DEPTH_MAX {
                Some(format!("go deeper than {PARENT_DEPTH_MAX} directories"))
            } else {
                None
            };
            if let Some(problem) = problem {
                let text = format!("the parents of {} {problem}", self.path.display());
                return Err(Error::new(Kind::Image, text));
            }
            next = dir.parent()?;
            chain_dirs.push(dir);
        }
        Ok(chain_dirs)
    }

    /// All messages of an image file, `None` if there is no such file.
    ///
    /// # Errors
    ///
    /// [`Kind::Image`]: it is of another kind, cut short or damaged.
    pub fn messages<M: Message + Default>(
        &self,
        path: &Path,
        magic: Magic,
    ) -> Result<Option<Vec<M>>> {
        let Some(mut reader) = open_image(path, magic)? else {
            return Ok(None);
        };
        let mut messages = Vec::new();
        while let Some(message) = reader.read().map_err(|error| unreadable(path, error))? {
            messages.push(message);
        }
        Ok(Some(messages))
    }
}

/// The error for an image file that cannot be read.
pub(super) fn unreadable(path: &Path, error: FileError) -> Error {
    Error::wrap(
        Kind::Image,
        format!("cannot read {}", path.display()),
        error,
    )
}

fn open_image(path: &Path, magic: Magic) -> Result<Option<ImageReader>> {
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("open", path, error)),
    };
    let reader = MessageReader::new(BufReader::new(file), magic);
    reader.map(Some).map_err(|error| unreadable(path, error))
}

fn target_of_pagemap(name: &str) -> Option<Target> {
    let id = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    match id.strip_prefix("shmem-") {
        Some(id) => id.parse().ok().map(Target::Shmem),
        None => id.parse().ok().map(Target::Process),
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::{ThreadCore, ThreadInfo};
    use super::*;
    use crate::image::file::MessageWriter;
    use crate::image::proto::Vma;
    use crate::units::PageRange;

    const PAGE: PageSize = PageSize::KIB_4;

    fn write<M: Message>(path: &Path, magic: Magic, messages: &[M]) {
        let mut writer = MessageWriter::new(File::create(path).unwrap(), magic).unwrap();
        for message in messages {
            writer.write(message).unwrap();
        }
    }

    fn task(pid: u32, ppid: u32) -> PstreeEntry {
        PstreeEntry {
            pid,
            ppid,
            threads: Vec::new(),
        }
    }

    #[test]
    fn what_the_kernel_touches_at_the_end_of_threads_is_in_their_cores() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("pstree.img");
        let with_threads = PstreeEntry {
            threads: vec![7, 8, 9],
            ..task(7, 0)
        };
        write(&path, Magic::Pstree, &[with_threads]);
        let info = |clear_tid_addr| Some(ThreadInfo { clear_tid_addr });
        let core = Core {
            thread_x86: info(0x7010),
            thread: Some(ThreadCore { futex_rla: 0x7ff0 }),
            ..Core::default()
        };
        write(&tmp.path().join("core-7.img"), Magic::Core, &[core]);
        let core = Core {
            thread_aarch64: info(0x9000),
            ..Core::default()
        };
        write(&tmp.path().join("core-8.img"), Magic::Core, &[core]);
        let dir = ImageDir::open(tmp.path(), PAGE).unwrap();
        let touched = [0x7010, 0x7ff0, 0x8007, 0x9000].map(Vaddr);
        assert_eq!(dir.touched_at_exit(7).unwrap(), touched);
        assert_eq!(dir.touched_at_exit(11).unwrap(), []);
    }

    #[test]
    fn pages_of_the_command_line_and_the_environment_are_known() {
        let tmp = tempfile::tempdir().unwrap();
        write(&tmp.path().join("pstree.img"), Magic::Pstree, &[task(7, 0)]);
        let dir = ImageDir::open(tmp.path(), PAGE).unwrap();
        let pages = |mm: Mm| {
            write(&tmp.path().join("mm-7.img"), Magic::Mm, &[mm]);
            let pages = dir.command_line(7).unwrap().into_iter();
            pages.map(|page| page.get() >> 12).collect::<Vec<_>>()
        };
        let mm = |arg_start, arg_end, env_end| Mm {
            arg_start,
            arg_end,
            env_start: arg_end,
            env_end,
            ..Mm::default()
        };
        assert_eq!(pages(mm(0x7ff0, 0x8010, 0x9ff0)), [7, 8, 9]);
        assert!(pages(mm(0x7010, 0x7010, 0x7010)).is_empty());
        assert!(pages(Mm::default()).is_empty());
        // Ends below their starts, and more than anybody has.
        assert!(pages(mm(0x9000, 0x1000, 0)).is_empty());
        let most = usize::try_from(COMMAND_LINE_BYTES_MAX >> 12).unwrap();
        assert_eq!(pages(mm(0, u64::MAX, 0)).len(), most);
        assert_eq!(dir.command_line(11).unwrap(), []);
    }

    #[test]
    fn a_directory_without_images_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let error = ImageDir::open(dir.path(), PAGE).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(
            error
                .to_string()
                .contains("give the directory that holds the dump"),
            "{error}"
        );
        let error = ImageDir::open(&dir.path().join("none"), PAGE).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
    }

    #[test]
    fn processes_and_mappings_come_from_pstree_and_mm() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("pstree.img");
        write(&path, Magic::Pstree, &[task(7, 0), task(9, 7)]);
        let vma = |start, end| Vma {
            start,
            end,
            ..Vma::default()
        };
        let mm = |vmas| Mm {
            vmas,
            ..Mm::default()
        };
        let good = mm(vec![vma(0x1000, 0x3000), vma(0x3000, 0x4000)]);
        write(&tmp.path().join("mm-7.img"), Magic::Mm, &[good]);
        let bad = mm(vec![vma(0x1000, 0x3000), vma(0x4000, 0x4000)]);
        write(&tmp.path().join("mm-9.img"), Magic::Mm, &[bad]);

        let dir = ImageDir::open(tmp.path(), PAGE).unwrap();
        assert_eq!(dir.processes().unwrap(), [7, 9]);
        let ranges = [
            PageRange::new(0x1000, 0x3000),
            PageRange::new(0x3000, 0x4000),
        ];
        assert_eq!(dir.mappings(7).unwrap().fillable, ranges);
        assert_eq!(dir.mappings(9).unwrap_err().kind(), Kind::Image);
        assert_eq!(dir.mappings(11).unwrap_err().kind(), Kind::Image);
    }

    #[test]
    fn parents_are_followed_and_rings_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..3).map(|i| tmp.path().join(i.to_string())).collect();
        for path in &paths {
            std::fs::create_dir(path).unwrap();
            write(&path.join("pstree.img"), Magic::Pstree, &[task(1, 0)]);
        }
        std::os::unix::fs::symlink("../1", paths[0].join(PARENT_LINK)).unwrap();
        std::os::unix::fs::symlink("../2", paths[1].join(PARENT_LINK)).unwrap();
        let dir = ImageDir::open(&paths[0], PAGE).unwrap();
        assert_eq!(dir.chain_dirs().unwrap().len(), 3);
        std::os::unix::fs::symlink("../gone", paths[2].join(PARENT_LINK)).unwrap();
        assert_eq!(dir.chain_dirs().unwrap().len(), 3);
        std::fs::remove_file(paths[2].join(PARENT_LINK)).unwrap();
        std::os::unix::fs::symlink("../1", paths[2].join(PARENT_LINK)).unwrap();
        assert_eq!(dir.chain_dirs().unwrap_err().kind(), Kind::Image);
    }

    #[test]
    fn pagemaps_are_listed_by_what_they_name() {
        let tmp = tempfile::tempdir().unwrap();
        for name in [
            "pagemap-12.img",
            "pagemap-shmem-3.img",
            "pages-1.img",
            "pagemap-x.img",
        ] {
            std::fs::write(tmp.path().join(name), "").unwrap();
        }
        let dir = ImageDir::open(tmp.path(), PAGE).unwrap();
        let targets = [Target::Process(12), Target::Shmem(3)];
        assert_eq!(dir.targets().unwrap(), targets);
    }
}
