//! Bundles of containers: whether a container finds at the destination what its configuration names.

use std::fs;
use std::path::{Component, Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use serde_json::Value;

/// A bundle's configuration.
const CONFIG: &str = "config.json";

/// Parts of a configuration that may differ: the root's path is looked at by itself, and annotations are
/// notes of whoever made the bundle.
const MAY_DIFFER: [&str; 2] = ["root", "annotations"];

/// Reads the configuration of the bundle at `dir`.
pub(crate) fn config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    let text = fs::read(&path).map_err(|error| Error::file("read", &path, error))?;
    if text.len() > MIGRATION_JSON_BYTES_MAX / 2 {
        let text = format!("{} is longer than a request may be", path.display());
        return Err(Error::new(Kind::Usage, text));
    }
    serde_json::from_slice(&text).map_err(|error| Error::file("understand", &path, error))
}

/// Whether the bundle at `dir` has a configuration.
pub(crate) fn is_configured(dir: &Path) -> bool {
    dir.join(CONFIG).exists()
}

/// Puts `config` into the bundle at `dir`, if there is a root and no configuration.
pub(crate) fn complete(dir: &Path, config: &Value) -> Result<()> {
    let path = dir.join(CONFIG);
    if is_configured(dir) || !root_of(dir, config).is_dir() {
        return Ok(());
    }
    let text =
        serde_json::to_vec_pretty(config).map_err(|error| Error::file("write", &path, error))?;
    fs::write(&path, text).map_err(|error| Error::file("write", &path, error))
}

/// The configuration with a root file system within the bundle.
pub(crate) fn portable(config: &Value) -> Value {
    let mut config = config.clone();
    let path = config["root"]["path"].as_str().unwrap_or_default();
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    if path.is_empty() || !Path::new(path).components().all(plain) {
        config["root"]["path"] = Value::from("rootfs");
    }
    config
}

/// Puts `config` into the bundle at `dir`, which has none, for a root that is to come. Returns the path of what it made.
pub(crate) fn supply(dir: &Path, config: &Value) -> Result<Option<PathBuf>> {
    let path = dir.join(CONFIG);
    if path.exists() {
        return Ok(None);
    }
    let failed = |error| Error::file("write", &path, error);
    fs::create_dir_all(dir).map_err(failed)?;
    let text = serde_json::to_vec_pretty(&portable(config))
        .map_err(|error| Error::file("write", &path, error))?;
    fs::write(&path, text).map_err(failed)?;
    Ok(Some(path))
}

/// Files that are sent along with a container.
#[derive(Debug, Default)]
pub(crate) struct TransferredFiles<'a> {
    /// Its root file system.
    pub(crate) root: bool,
    /// Directories of the host.
    pub(crate) volumes: Vec<&'a str>,
}

/// What is in the way of a container, here where it runs.
pub(crate) fn problems_here(config: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    if config["process"]["terminal"] == Value::Bool(true) {
        problems.push(
            "the container has a terminal, which stays on this host: run it with `terminal: false`"
                .to_owned(),
        );
    }
    problems
}

/// What the bundle at `dir` lacks for a container that runs elsewhere with `config`.
pub(crate) fn problems_there(
    dir: &Path,
    wanted: &Value,
    transferred: &TransferredFiles<'_>,
) -> Vec<String> {
    let found = match config(dir) {
        Ok(found) => found,
        // It comes with the root.
        Err(_) if transferred.root && !dir.join(CONFIG).exists() => wanted.clone(),
        Err(error) => {
            return vec![format!(
                "the bundle at the destination: {error} (--bundle names its directory)"
            )];
        }
    };
    let mut problems = Vec::new();
    let root = root_of(dir, &found);
    let is_empty = fs::read_dir(&root).is_ok_and(|mut entries| entries.next().is_none());
    if !transferred.root && (!root.is_dir() || is_empty) {
        problems.push(format!(
            "{} is missing or empty at the destination: copy the container's root file system there",
            root.display()
        ));
    }
    let names = |value: &Value| -> Vec<String> {
        let object = value.as_object().into_iter();
        object.flat_map(|object| object.keys().cloned()).collect()
    };
    let mut parts = [names(wanted), names(&found)].concat();
    parts.sort();
    parts.dedup();
    for part in parts {
        if !MAY_DIFFER.contains(&part.as_str()) && wanted[&part] != found[&part] {
            problems.push(format!(
                "{part} in {} at the destination differs from the configuration here: copy it there",
                dir.join(CONFIG).display()
            ));
        }
    }
    problems.extend(sources_missing(
        &found,
        &transferred.volumes,
        "at the destination",
    ));
    problems
}

/// Files of the host that a configuration names and that are not there: `place` says where that is.
pub(crate) fn sources_missing(config: &Value, volumes: &[&str], place: &str) -> Vec<String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let is_bind = |mount: &Value| {
        let options = list(&mount["options"]);
        let bound = options
            .iter()
            .any(|option| option == "bind" || option == "rbind");
        bound || mount["type"] == "bind"
    };
    let mounts = list(&config["mounts"]);
    let mounts = mounts.iter().filter(|mount| is_bind(mount));
    let mounts = mounts.filter_map(|mount| Some(("mount", text(&mount["source"])?)));
    let namespaces = list(&config["linux"]["namespaces"]);
    let namespaces = namespaces
        .iter()
        .filter_map(|namespace| Some(("namespace", text(&namespace["path"])?)));
    let missing = mounts
        .chain(namespaces)
        .filter(|(_, path)| !Path::new(path).exists())
        .filter(|(_, path)| {
            !volumes
                .iter()
                .any(|volume| Path::new(path).starts_with(volume))
        });
    missing
        .map(|(what, path)| format!("{path}, a {what} of the container, does not exist {place}"))
        .collect()
}

/// Writes the configuration of a new bundle at `dir`, whose root file system is `rootfs` in it.
pub(crate) fn make(dir: &Path, config: &Value) -> Result<()> {
    let mut config = config.clone();
    config["root"]["path"] = Value::from("rootfs");
    let path = dir.join(CONFIG);
    let text =
        serde_json::to_vec_pretty(&config).map_err(|error| Error::file("write", &path, error))?;
    fs::write(&path, text).map_err(|error| Error::file("write", &path, error))
}

/// The root directory of the bundle at `dir` with this configuration.
pub(crate) fn root_of(dir: &Path, config: &Value) -> PathBuf {
    dir.join(config["root"]["path"].as_str().unwrap_or("rootfs"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_thing_that_is_missing_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let config = json!({
            "root": {"path": "rootfs"},
            "process": {"args": ["a"]},
            "mounts": [{"destination": "/data", "type": "bind", "source": "/nonexistent/data"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/nonexistent/ns"}]},
        });
        let of =
            |wanted: &Value| problems_there(dir, wanted, &TransferredFiles::default()).join("\n");
        assert!(of(&config).contains("config.json"), "{}", of(&config));
        complete(dir, &config).unwrap();
        assert!(!dir.join(CONFIG).exists(), "there is no root yet");
        fs::create_dir_all(dir.join("rootfs/bin")).unwrap();
        complete(dir, &config).unwrap();
        let problems = of(&config);
        assert_eq!(problems.lines().count(), 2, "{problems}");
        assert!(problems.contains("/nonexistent/data") && problems.contains("/nonexistent/ns"));
        let mut other = config.clone();
        other["process"]["args"] = json!(["b"]);
        other["root"]["path"] = json!("/elsewhere");
        assert!(of(&other).contains("process in"), "{}", of(&other));
        assert_eq!(of(&other).lines().count(), 3);
        fs::remove_dir(dir.join("rootfs/bin")).unwrap();
        assert!(of(&config).contains("empty"));
        let transferred = TransferredFiles {
            root: true,
            volumes: vec!["/nonexistent/data"],
        };
        let problems = problems_there(dir, &config, &transferred).join("\n");
        assert!(
            problems.contains("/nonexistent/ns") && problems.lines().count() == 1,
            "{problems}"
        );
        let nowhere = dir.join("nowhere");
        assert_eq!(problems_there(&nowhere, &config, &transferred).len(), 1);
        let made = supply(&nowhere, &other).unwrap();
        assert_eq!(made, Some(nowhere.join(CONFIG)));
        assert_eq!(super::config(&nowhere).unwrap()["root"]["path"], "rootfs");
        assert_eq!(supply(&nowhere, &other).unwrap(), None);
        let with_terminal = json!({"process": {"terminal": true}});
        assert_eq!(problems_here(&with_terminal).len(), 1);
        assert!(problems_here(&config).is_empty());
    }
}
