//! The options of files that move along.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use pageferry::migration::messages::{FileTree, OverlayRoot, RootFiles, WantedFiles};
use serde_json::Value;

/// Options for files.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct FilesArgs {
    /// Whether to send the container's root file system
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = FilesArg::Auto)]
    pub(super) files: FilesArg,

    /// Whether to keep the layers of a root file system that is an overlay
    ///
    /// Each layer is sent once, named by its digest. The destination keeps it, and mounts the writable layer over it.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = LayersArg::Auto)]
    pub(super) layers: LayersArg,

    /// A directory that moves too, to DST or to the same path; a bind mount of it in the container's configuration is
    /// changed accordingly. May be given several times
    #[arg(long, value_name = "SRC[:DST]", value_parser = volume)]
    pub(super) volume: Vec<VolumeArg>,

    /// Only send the files ahead; a later migration sends what has changed since
    #[arg(long, conflicts_with_all = ["resume", "mode", "address", "stateless"])]
    pub(super) preload: bool,
}

/// Values of `--files`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum FilesArg {
    /// Unless the destination has one that no migration created
    Auto,
    /// No: it is at the destination already
    Never,
    /// Yes, and replace what is at the destination; the same for volumes
    Replace,
}

/// Values of `--layers`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum LayersArg {
    /// If both hosts support it
    Auto,
    /// No: what the container sees becomes a plain directory
    Never,
}

/// A volume and its places on both hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct VolumeArg {
    pub(super) here: PathBuf,
    pub(super) there: String,
}

/// `/data`, `/data:/srv/data`.
fn volume(text: &str) -> std::result::Result<VolumeArg, String> {
    let (here, there) = text.split_once(':').unwrap_or((text, text));
    let (here, there) = (Path::new(here), there.trim_end_matches('/').to_owned());
    let tree = FileTree {
        path: Some(there.clone()),
        replace: false,
        overlay: None,
    };
    match here.is_absolute() && tree.is_possible() {
        true => Ok(VolumeArg {
            here: here.to_owned(),
            there,
        }),
        false => Err(format!(
            "{text:?} is not a directory with an absolute path, as /data or /data:/srv/data"
        )),
    }
}

impl FilesArgs {
    /// Those of who looks at a container alone.
    pub(super) fn to_look() -> FilesArgs {
        FilesArgs {
            files: FilesArg::Auto,
            layers: LayersArg::Never,
            volume: Vec::new(),
            preload: false,
        }
    }

    /// What the destination is asked about, for a container whose root is this overlay.
    pub(super) fn wanted(&self, is_container: bool, overlay: Option<OverlayRoot>) -> WantedFiles {
        let root = match self.files {
            _ if !is_container => RootFiles::Never,
            FilesArg::Auto => RootFiles::Auto,
            FilesArg::Never => RootFiles::Never,
            FilesArg::Replace => RootFiles::Replace,
        };
        let volumes = self.volume.iter().map(|volume| FileTree {
            path: Some(volume.there.clone()),
            replace: self.files == FilesArg::Replace,
            overlay: None,
        });
        WantedFiles {
            root,
            volumes: volumes.collect(),
            overlay,
        }
    }

    /// Whether layers of the root file system are looked for.
    pub(super) fn wants_layers(&self) -> bool {
        self.layers == LayersArg::Auto && self.files != FilesArg::Never
    }

    /// Leads bind mounts of volumes to where these are at the destination.
    pub(super) fn redirect(&self, config: &mut Value) {
        let mounts = config["mounts"].as_array_mut().into_iter().flatten();
        for mount in mounts {
            let Some(source) = mount["source"].as_str().map(PathBuf::from) else {
                continue;
            };
            let below = self.volume.iter().find_map(|volume| {
                let rest = source.strip_prefix(&volume.here).ok()?;
                Some(Path::new(&volume.there).join(rest))
            });
            if let Some(there) = below {
                // Joined with nothing it ends with a slash.
                let there = there.to_string_lossy();
                mount["source"] = Value::from(there.trim_end_matches('/'));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn volumes_have_places_on_both_hosts() {
        let of = |text| volume(text).unwrap();
        assert_eq!(of("/data").there, "/data");
        let other = of("/data/a:/srv/b/");
        assert_eq!(
            (&*other.here, &*other.there),
            (Path::new("/data/a"), "/srv/b")
        );
        for bad in ["data", "/data:srv", "/data:/", "/:/", "", "/a:/b/../c"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bind_mounts_lead_to_where_volumes_are() {
        let args = FilesArgs {
            volume: vec![volume("/data:/srv/data").unwrap()],
            ..FilesArgs::to_look()
        };
        let mount = |source: &str| json!({"destination": "/d", "source": source});
        let mut config = json!({"mounts": [mount("/data"), mount("/data/x"), mount("/database")]});
        args.redirect(&mut config);
        let sources: Vec<_> = config["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["source"].as_str().unwrap())
            .collect();
        assert_eq!(sources, ["/srv/data", "/srv/data/x", "/database"]);
        let wanted = args.wanted(false, None);
        assert_eq!((wanted.root, wanted.volumes.len()), (RootFiles::Never, 1));
    }
}
