//! What the shim is told: runtimes hand it no options, so by the environment and by a file of its own.
//!
//! | in the file | environment | |
//! |---|---|---|
//! | `criu PATH` | `PAGEFERRY_CRIU` | the real CRIU; without it the first other `criu` in PATH |
//! | `bin-dir DIR` | `PAGEFERRY_BIN_DIR` | where page-server and lazy-client are; without it beside this program, then PATH |
//! | `emulate-pre-dump auto\|always\|never` | `PAGEFERRY_EMULATE_PRE_DUMP` | `auto`: where dirty pages cannot be tracked |
//!
//! The environment counts more than the file, and `--emulate-pre-dump[=WHEN]` and `--no-emulate-pre-dump`
//! on the command line more than both.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pageferry::daemon::config_file::lines;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::CONFIG_FILE_BYTES_MAX;
use pageferry::sys::process::page_size;

/// The shim's own file, in the format of CRIU's.
const FILE: &str = "/etc/pageferry/criu-shim.conf";

/// Names another file.
const FILE_VARIABLE: &str = "PAGEFERRY_SHIM_CONFIG";

/// Says that the client of `swrk` came to a service.
pub(crate) const SERVICE_CLIENT: &str = "--service-client";

/// Bit of an entry of /proc/PID/pagemap: the page was written to. Kernels without such tracking never
/// set it, kernels with it set it for new pages (Documentation/admin-guide/mm/soft-dirty.rst).
const SOFT_DIRTY_BIT: u64 = 1 << 55;

/// Bytes of an entry of /proc/PID/pagemap.
const PAGEMAP_ENTRY_BYTES: u64 = 8;

/// When pre-dumps are emulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Emulate {
    #[default]
    Auto,
    Always,
    Never,
}

/// See the module's text.
#[derive(Default, Debug)]
pub(crate) struct Config {
    pub(crate) criu: Option<PathBuf>,
    pub(crate) bin_dir: Option<PathBuf>,
    emulate: Emulate,
    /// Whether this process was started for a client of a service.
    pub(crate) is_for_service: bool,
}

impl Config {
    /// Reads the file and the environment, and takes the shim's own options out of `argv`.
    pub(crate) fn load(argv: &mut Vec<OsString>) -> Result<Config> {
        let mut config = Config::default();
        match env::var_os(FILE_VARIABLE) {
            Some(path) => config.read_file(Path::new(&path), true)?,
            None => config.read_file(Path::new(FILE), false)?,
        }
        for (name, variable) in [
            ("criu", "PAGEFERRY_CRIU"),
            ("bin-dir", "PAGEFERRY_BIN_DIR"),
            ("emulate-pre-dump", "PAGEFERRY_EMULATE_PRE_DUMP"),
        ] {
            if let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) {
                config
                    .set(name, &value)
                    .map_err(|error| error.within(variable))?;
            }
        }
        config.take_options(argv)?;
        Ok(config)
    }

    fn read_file(&mut self, path: &Path, named: bool) -> Result<()> {
        let mut text = Vec::new();
        let limit = u64::try_from(CONFIG_FILE_BYTES_MAX).unwrap_or(u64::MAX);
        let read = File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut text));
        match read {
            Err(error) if error.kind() == ErrorKind::NotFound && !named => return Ok(()),
            read => read.map_err(|error| Error::file("read the configuration", path, error))?,
        };
        let damaged = |error| Error::wrap(Kind::Usage, format!("in {}", path.display()), error);
        for line in lines(&text).map_err(damaged)? {
            let name = line.option.to_string_lossy();
            let place = format!("{}, line {}", path.display(), line.number);
            if line.oddity.is_some() {
                let text = "write the value without # and blanks";
                return Err(Error::new(Kind::Usage, text).within(place));
            }
            let value = line.value.unwrap_or_default();
            self.set(name.trim_start_matches("--"), &value)
                .map_err(|error| error.within(place))?;
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: &OsStr) -> Result<()> {
        match name {
            "criu" => self.criu = Some(value.into()),
            "bin-dir" => self.bin_dir = Some(value.into()),
            "emulate-pre-dump" => self.emulate = when(value)?,
            _ => {
                let text = format!("{name} is not a setting of this program");
                return Err(Error::new(Kind::Usage, text));
            }
        }
        Ok(())
    }

    fn take_options(&mut self, argv: &mut Vec<OsString>) -> Result<()> {
        let own = argv.iter().take_while(|word| *word != "--").count();
        let mut kept = Vec::new();
        for (at, word) in std::mem::take(argv).into_iter().enumerate() {
            let bytes = word.as_bytes();
            if at >= own {
                kept.push(word);
            } else if let Some(value) = bytes.strip_prefix(b"--emulate-pre-dump=") {
                self.emulate = when(OsStr::from_bytes(value))?;
            } else if bytes == b"--emulate-pre-dump" {
                self.emulate = Emulate::Always;
            } else if bytes == SERVICE_CLIENT.as_bytes() {
                self.is_for_service = true;
            } else if bytes == b"--no-emulate-pre-dump" {
                self.emulate = Emulate::Never;
            } else {
                kept.push(word);
            }
        }
        *argv = kept;
        Ok(())
    }

    /// Whether pre-dumps are dumps here.
    pub(crate) fn emulates_pre_dump(&self) -> bool {
        match self.emulate {
            Emulate::Always => true,
            Emulate::Never => false,
            Emulate::Auto => !tracks_dirty_pages().unwrap_or(true),
        }
    }
}

fn when(value: &OsStr) -> Result<Emulate> {
    match value.to_str() {
        Some("auto") => Ok(Emulate::Auto),
        Some("always" | "") => Ok(Emulate::Always),
        Some("never") => Ok(Emulate::Never),
        _ => {
            let text = format!(
                "emulate-pre-dump {} is none of auto, always, never",
                value.display()
            );
            Err(Error::new(Kind::Usage, text))
        }
    }
}

/// Whether this kernel tells which pages were written to: it then says so of a page that just was.
fn tracks_dirty_pages() -> std::io::Result<bool> {
    let page_bytes = page_size()?.bytes();
    let page = vec![1_u8; usize::try_from(page_bytes).map_err(std::io::Error::other)?];
    let address = std::hint::black_box(&page).as_ptr().addr();
    let index = u64::try_from(address).map_err(std::io::Error::other)? / page_bytes;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, index * PAGEMAP_ENTRY_BYTES)?;
    Ok(u64::from_ne_bytes(entry) & SOFT_DIRTY_BIT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shims_own_options_do_not_reach_criu() {
        let line = "dump --emulate-pre-dump=never -t 7 --emulate-pre-dump -- --no-emulate-pre-dump";
        let mut argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let mut config = Config::default();
        config.take_options(&mut argv).unwrap();
        assert_eq!(config.emulate, Emulate::Always);
        assert_eq!(argv, ["dump", "-t", "7", "--", "--no-emulate-pre-dump"]);
        let mut argv = vec!["--emulate-pre-dump=perhaps".into()];
        assert!(config.take_options(&mut argv).is_err());
    }

    #[test]
    fn the_file_is_understood_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shim.conf");
        std::fs::write(
            &path,
            "# where\ncriu /usr/sbin/criu\nemulate-pre-dump always\n",
        )
        .unwrap();
        let mut config = Config::default();
        config.read_file(&path, true).unwrap();
        assert_eq!(config.criu, Some("/usr/sbin/criu".into()));
        assert!(config.emulates_pre_dump());
        for text in ["cruu x\n", "emulate-pre-dump perhaps\n", "criu \"/a#b\"\n"] {
            std::fs::write(&path, text).unwrap();
            let error = config.read_file(&path, true).unwrap_err().to_string();
            assert!(error.contains("shim.conf"), "{error}");
        }
        assert!(config.read_file(&dir.path().join("none"), true).is_err());
        config.read_file(&dir.path().join("none"), false).unwrap();
    }
}
