//! A container of podman's that goes on without podman: what its configuration names in podman's storage is made in the
//! bundle.
//!
//! ```text
//! BUNDLE/rootfs              what the image holds; the archive's files are written over it
//! BUNDLE/podman/hosts, ...   the files that podman makes for each container, as mounts of the same places
//! BUNDLE/podman/shm/         /dev/shm
//! ```
//!
//! CRIU's images name these places as mounts from outside, and a restore without one of them fails. Archives of
//! `pageferry dump` do not have them in their `spec.dump`, those of podman have.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use serde_json::{Value, json};

use super::podman::OWN_FILES;

/// The directory of what podman would make, in the bundle.
const DIR: &str = "podman";

/// What podman mounts into each container: the file's name, and where.
const MOUNTED: [(&str, &str); 5] = [
    ("hosts", "/etc/hosts"),
    ("hostname", "/etc/hostname"),
    ("resolv.conf", "/etc/resolv.conf"),
    (".containerenv", "/run/.containerenv"),
    (SHM, "/dev/shm"),
];

/// The only directory of them.
const SHM: &str = "shm";

/// The configuration for the bundle at `bundle`. Pure; [`make_files`] makes what it names.
pub(super) fn spec(podmans: &Value, bundle: &Path) -> Result<Value> {
    let mut spec = podmans.clone();
    if let Some(problem) = problem(&spec) {
        return Err(Error::new(Kind::Unsupported, problem));
    }
    spec["root"]["path"] = json!("rootfs");
    if let Some(linux) = spec["linux"].as_object_mut() {
        // A group of podman's, perhaps in the words of systemd: the runtime has one of its own.
        linux.remove("cgroupsPath");
    }
    let mut mounts = spec["mounts"].as_array().cloned().unwrap_or_default();
    for mount in &mut mounts {
        let source = mount["source"].as_str().unwrap_or_default();
        if source.contains(OWN_FILES) {
            let name = Path::new(source).file_name().unwrap_or_default();
            mount["source"] = json!(bundle.join(DIR).join(name));
        }
    }
    for (name, destination) in MOUNTED {
        if !mounts
            .iter()
            .any(|mount| mount["destination"] == destination)
        {
            let source = bundle.join(DIR).join(name);
            let options = ["bind", "rprivate"];
            mounts.push(
                json!({"destination": destination, "type": "bind", "source": source,
                "options": options}),
            );
        }
    }
    spec["mounts"] = Value::from(mounts);
    Ok(spec)
}

/// What only podman can give a container.
fn problem(spec: &Value) -> Option<String> {
    if spec["process"]["terminal"] == true {
        return Some(
            "the container has a terminal, which podman held: run it without --tty".to_owned(),
        );
    }
    let namespaces = spec["linux"]["namespaces"].as_array()?;
    let given = namespaces.iter().find(|namespace| {
        namespace["path"]
            .as_str()
            .is_some_and(|path| !path.is_empty())
    })?;
    let kind = given["type"].as_str().unwrap_or_default();
    Some(format!(
        "the container's {kind} namespace is one that podman makes ({}): put a config.json that names another one \
         into the bundle, or take `podman container restore --import`",
        given["path"].as_str().unwrap_or_default()
    ))
}

/// Makes the files that `spec` names in the bundle, unless they are there.
pub(super) fn make_files(spec: &Value, bundle: &Path) -> Result<()> {
    let dir = bundle.join(DIR);
    let hostname = spec["hostname"].as_str().unwrap_or_default();
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let path = PathBuf::from(mount["source"].as_str().unwrap_or_default());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.parent() != Some(&dir) || path.exists() {
            continue;
        }
        let failed = |error| Error::file("make", &path, error);
        if *name == *SHM {
            fs::create_dir_all(&path).map_err(failed)?;
            continue;
        }
        fs::create_dir_all(&dir).map_err(failed)?;
        let text = match &*name {
            "hosts" => format!("127.0.0.1 localhost {hostname}\n::1 localhost\n"),
            "hostname" => format!("{hostname}\n"),
            // A host may have none.
            "resolv.conf" => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            _ => String::new(),
        };
        fs::write(&path, text).map_err(failed)?;
    }
    Ok(())
}

/// Where the files of /dev/shm are, in the bundle.
pub(super) fn shm(bundle: &Path) -> PathBuf {
    bundle.join(DIR).join(SHM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_podman_made_is_made_in_the_bundle() {
        let tmp = tempfile::tempdir().unwrap();
        let bundle = tmp.path();
        let userdata = "/run/containers/storage/overlay-containers/77/userdata";
        let podmans = json!({
            "root": {"path": "/var/lib/containers/storage/overlay/77/merged"}, "hostname": "h",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind", "source": format!("{userdata}/hosts")},
                {"destination": "/data", "type": "bind", "source": "/srv/data"},
            ],
            "linux": {"cgroupsPath": "machine.slice:libpod:77", "namespaces": [{"type": "network"}]},
        });
        let spec = spec(&podmans, bundle).unwrap();
        assert_eq!(spec["root"]["path"], "rootfs");
        assert_eq!(spec["linux"]["cgroupsPath"], Value::Null);
        let mounts = spec["mounts"].as_array().unwrap();
        assert_eq!(mounts.len(), 7);
        assert_eq!(mounts[1]["source"], json!(bundle.join("podman/hosts")));
        assert_eq!(mounts[2]["source"], "/srv/data");
        make_files(&spec, bundle).unwrap();
        assert!(shm(bundle).is_dir());
        let read = |name: &str| fs::read_to_string(bundle.join(DIR).join(name)).unwrap();
        assert_eq!(read("hostname"), "h\n");
        assert!(read("hosts").contains("localhost h"));
        // What is there stays.
        fs::write(bundle.join("podman/hosts"), "mine").unwrap();
        make_files(&spec, bundle).unwrap();
        assert_eq!(read("hosts"), "mine");
    }

    #[test]
    fn what_podman_alone_can_give_is_refused() {
        let of =
            |spec: Value| super::spec(&spec, Path::new("/b")).map_err(|error| error.to_string());
        let terminal = of(json!({"process": {"terminal": true}}));
        assert!(terminal.unwrap_err().contains("terminal"));
        let network = json!({"type": "network", "path": "/run/netns/netns-1"});
        let message = of(json!({"linux": {"namespaces": [{"type": "pid"}, network]}})).unwrap_err();
        assert!(
            message.contains("network") && message.contains("/run/netns/netns-1"),
            "{message}"
        );
        assert!(of(json!({"linux": {"namespaces": [{"type": "pid", "path": ""}]}})).is_ok());
    }
}
