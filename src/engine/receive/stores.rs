//! Which directory a session's images go to: one for all, or one each.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::engine::ferry::random_bits;
use crate::error::{Error, Kind, Result};
use crate::ferry::hash::HashKey;
use crate::image::check::{check_split, check_writable};
use crate::image::dir::ImageDir;
use crate::image::store::{ImageStore, Sync};
use crate::units::PageSize;

/// A relative path with places for what tells sessions apart: `{peer}` (the peer's address without
/// its port) and `{seq}` (1, 2, 3...).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Template(String);

/// A template that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TemplateError {
    /// A place of another name.
    #[error("{0:?} has a place that is neither {{peer}} nor {{seq}}")]
    Place(String),
    /// It leads out of the images directory.
    #[error("{0:?} is not a path inside the images directory")]
    Outside(String),
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> std::result::Result<Template, TemplateError> {
        let plain = text.replace("{peer}", "x").replace("{seq}", "x");
        if plain.contains(['{', '}']) {
            return Err(TemplateError::Place(text.to_owned()));
        }
        let normal = |component| matches!(component, Component::Normal(_));
        if plain.is_empty() || !Path::new(&plain).components().all(normal) {
            return Err(TemplateError::Outside(text.to_owned()));
        }
        Ok(Template(text.to_owned()))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Template {
    fn fill(&self, peer: &str, seq: u64) -> String {
        // A peer's name must stay one component, whatever it is.
        let peer = peer.replace('/', "_");
        self.0
            .replace("{peer}", &peer)
            .replace("{seq}", &seq.to_string())
    }

    /// How many directories deep a session's directory lies.
    fn depth(&self) -> usize {
        Path::new(&self.fill("peer", 1)).components().count()
    }

    fn has_number(&self) -> bool {
        self.0.contains("{seq}")
    }
}

/// How image directories are opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The images directory.
    pub dir: PathBuf,
    /// Size of the pages to receive.
    pub page: PageSize,
    /// Where the `parent` link of each directory leads, relative to that directory.
    pub previous: Option<PathBuf>,
    /// What is on disk when a session is answered.
    pub sync: Sync,
    /// Where pages go that a lazy restore can do without, if they are kept apart. With a template each session has
    /// a directory of the same name below this one.
    pub split_lazy: Option<PathBuf>,
    /// Whether each page of a process tree is stored once. A directory takes one session then.
    pub dedup_tree: bool,
}

/// See the module's text.
#[derive(Debug)]
pub enum Stores {
    /// All sessions share one directory.
    Shared(Arc<ImageStore>),
    /// Each session has a directory of its own, below that of the options.
    Each {
        /// How directories are opened.
        options: StoreOptions,
        /// Their names.
        template: Template,
        /// The number of the next session.
        next: AtomicU64,
    },
}

/// A session's directory.
#[derive(Debug)]
pub struct SessionStore {
    /// The directory.
    pub store: Arc<ImageStore>,
    /// Its path, and that of the one for lazy pages, if they were made for the session alone.
    made: Vec<PathBuf>,
}

impl Stores {
    /// One directory for all sessions, or with a template one each.
    pub fn open(options: StoreOptions, template: Option<Template>) -> Result<Stores> {
        match template {
            None => {
                let store = options.open(&options.dir, options.split_lazy.as_deref());
                store.map(Stores::Shared)
            }
            Some(template) => {
                options.check_for(&template)?;
                Ok(Stores::Each {
                    options,
                    template,
                    next: AtomicU64::new(1),
                })
            }
        }
    }

    /// Size of the pages to receive.
    pub fn page(&self) -> PageSize {
        match self {
            Stores::Shared(store) => store.dir().page(),
            Stores::Each { options, .. } => options.page,
        }
    }

    /// Where the parents of sessions' directories begin, if they have any outside the images directory.
    pub fn first_parent(&self) -> Option<PathBuf> {
        match self {
            Stores::Shared(store) => {
                let parent = store.dir().parent().ok().flatten()?;
                Some(parent.path().to_owned())
            }
            Stores::Each {
                options, template, ..
            } => match below(options.previous.as_deref()?, template.depth()) {
                Below::Outside(path) => Some(options.dir.join(path)),
                Below::Itself | Below::Nowhere | Below::Inside => None,
            },
        }
    }

    /// The directory for a session with a peer at `peer`, an address without port.
    pub fn for_session(&self, peer: &str) -> Result<SessionStore> {
        match self {
            Stores::Shared(store) => Ok(SessionStore {
                store: Arc::clone(store),
                made: Vec::new(),
            }),
            Stores::Each {
                options,
                template,
                next,
            } => {
                let (path, name) = make_dir(options, template, next, peer)?;
                let lazy = options.split_lazy.as_ref().map(|dir| dir.join(name));
                Ok(SessionStore {
                    store: options.open(&path, lazy.as_deref())?,
                    made: [Some(path), lazy].into_iter().flatten().collect(),
                })
            }
        }
    }
}

impl StoreOptions {
    /// The images directory `dir` for pages of one size, without parents or anything else.
    pub fn new(dir: &Path, page: PageSize) -> StoreOptions {
        StoreOptions {
            dir: dir.to_owned(),
            page,
            previous: None,
            sync: Sync::None,
            split_lazy: None,
            dedup_tree: false,
        }
    }

    /// Checks what can be known before the directory of a session is there.
    fn check_for(&self, template: &Template) -> Result<()> {
        let dir = ImageDir::open_any(&self.dir, self.page)?;
        check_writable(&dir)?;
        if let Some(lazy) = &self.split_lazy {
            let failed = |error| Error::file("make the directory (--split-lazy)", lazy, error);
            std::fs::create_dir_all(lazy).map_err(failed)?;
            let lazy = ImageDir::open_any(lazy, self.page)?;
            check_split(&dir, &lazy)?;
            check_writable(&lazy).map_err(|error| error.within("--split-lazy"))?;
        }
        let Some(previous) = &self.previous else {
            return Ok(());
        };
        let wrong = |problem: &str| {
            let text = format!(
                "--prev-images-dir {} {problem} (it is taken relative to the directory of each session, \
                 --images-dir-template {template})",
                previous.display()
            );
            Error::new(Kind::Usage, text)
        };
        match below(previous, template.depth()) {
            Below::Itself => Err(wrong("leads to the directory itself")),
            Below::Nowhere => Err(wrong("leads into the directory, which is new and empty")),
            // Made for another session, perhaps later.
            Below::Inside => Ok(()),
            Below::Outside(path) if self.dir.join(&path).is_dir() => Ok(()),
            Below::Outside(_) => Err(wrong("is not a directory")),
        }
    }

    fn open(&self, dir: &Path, lazy: Option<&Path>) -> Result<Arc<ImageStore>> {
        if self.dedup_tree {
            let key = HashKey(random_bits()?);
            return ImageStore::open_tree(dir, self.page, self.previous.as_deref(), self.sync, key);
        }
        match (lazy, &self.previous) {
            (None, previous) => ImageStore::open(dir, self.page, previous.as_deref(), self.sync),
            (Some(lazy), None) => ImageStore::open_split(dir, lazy, self.page, self.sync),
            (Some(_), Some(_)) => {
                let text =
                    "--split-lazy makes images without a parent: --prev-images-dir is not possible";
                Err(Error::new(Kind::Usage, text))
            }
        }
    }
}

impl SessionStore {
    /// Removes what was made for a session that failed, if nothing is in it.
    pub fn discard(self) {
        for path in self.made {
            if let Err(error) = std::fs::remove_dir(&path) {
                tracing::debug!("{} stays: {error}", path.display());
            }
        }
    }
}

/// Where a path leads from a directory that is to be made.
enum Below {
    Itself,
    /// Into it, where nothing is.
    Nowhere,
    /// To something else that may be made.
    Inside,
    /// Out of the directories that are to be made, of which there are some above it: the path from there.
    Outside(PathBuf),
}

/// Where `path` leads from a directory that lies `depth` new directories deep.
fn below(path: &Path, depth: usize) -> Below {
    if path.is_absolute() {
        return Below::Outside(path.to_owned());
    }
    let (mut up, mut rest) = (0, PathBuf::new());
    for component in path.components() {
        match component {
            Component::ParentDir if rest.as_os_str().is_empty() && up < depth => up += 1,
            Component::CurDir => {}
            other => rest.push(other),
        }
    }
    match (up, rest.as_os_str().is_empty()) {
        (0, true) => Below::Itself,
        (0, false) => Below::Nowhere,
        (up, _) if up < depth => Below::Inside,
        (_, _) => Below::Outside(rest),
    }
}

/// Makes a directory that no session had before. Returns its path and its name below the images directory.
fn make_dir(
    options: &StoreOptions,
    template: &Template,
    next: &AtomicU64,
    peer: &str,
) -> Result<(PathBuf, String)> {
    loop {
        let seq = next.fetch_add(1, Ordering::Relaxed);
        let name = template.fill(peer, seq);
        let path = options.dir.join(&name);
        let failed = |error| Error::file("make the directory", &path, error);
        if let Some(above) = path.parent() {
            std::fs::create_dir_all(above).map_err(failed)?;
        }
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok((path, name)),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            Err(_) if template.has_number() => {}
            Err(error) => {
                let text = format!(
                    "{} is an earlier session's (add {{seq}} to --images-dir-template)",
                    path.display()
                );
                return Err(Error::wrap(Kind::Usage, text, error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stores(dir: &Path, template: &str) -> Stores {
        let options = StoreOptions::new(dir, PageSize::KIB_4);
        Stores::open(options, Some(template.parse().unwrap())).unwrap()
    }

    #[test]
    fn templates_stay_inside_the_directory() {
        for bad in ["", "/x", "../{seq}", "a/../b", "{pid}", "{seq", "./x"] {
            assert!(bad.parse::<Template>().is_err(), "{bad}");
        }
        for good in ["{seq}", "{peer}/{seq}", "from-{peer}"] {
            assert_eq!(good.parse::<Template>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn a_parent_that_no_session_can_have_is_refused_at_once() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("before")).unwrap();
        let open = |template: &str, previous: &str| {
            let options = StoreOptions {
                previous: Some(previous.into()),
                ..StoreOptions::new(tmp.path(), PageSize::KIB_4)
            };
            Stores::open(options, Some(template.parse().unwrap()))
        };
        for previous in ["../before", "../../before", "../1"] {
            open("{peer}/{seq}", previous).unwrap();
        }
        open("{seq}", "../before").unwrap();
        let begins = |previous: &str| open("{peer}/{seq}", previous).unwrap().first_parent();
        assert_eq!(begins("../1"), None);
        let before = Some(tmp.path().join("before"));
        assert_eq!(begins("../../before"), before);
        for previous in [".", "./", "././", "before", "../none", "/none"] {
            let error = open("{seq}", previous).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{previous}");
        }
        assert!(open("{peer}/{seq}", "../../none").is_err());
    }

    #[test]
    fn each_session_gets_a_directory_that_none_had() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tmp.path().join("::1/2")).unwrap();
        let stores = stores(tmp.path(), "{peer}/{seq}");
        let paths: Vec<PathBuf> = ["::1", "::1", "a/b"]
            .map(|peer| stores.for_session(peer).unwrap().made[0].clone())
            .into();
        let expected = ["::1/1", "::1/3", "a_b/4"].map(|name| tmp.path().join(name));
        assert_eq!(paths, expected);
    }

    #[test]
    fn a_failed_session_takes_its_directory_along_and_names_are_not_shared() {
        let tmp = tempfile::tempdir().unwrap();
        let stores = stores(tmp.path(), "{peer}");
        stores.for_session("::1").unwrap().discard();
        assert!(!tmp.path().join("::1").exists());
        stores.for_session("::1").unwrap();
        let error = stores.for_session("::1").unwrap_err();
        assert!(error.to_string().contains("{seq}"), "{error}");
    }
}
