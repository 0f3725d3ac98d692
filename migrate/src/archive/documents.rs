//! The documents of a checkpoint's archive, as podman writes them and checkpointctl reads them. Pure.

use serde_json::{Value, json};

use super::podman::{Image, OWN_FILES};

/// The annotation by which readers know whose layout an archive has.
const MANAGER: &str = "io.container.manager";

/// podman's name there.
const PODMAN: &str = "libpod";

/// Bytes of a container's /dev/shm, where podman is told nothing else.
const SHM_BYTES: u64 = 65_536_000;

/// What podman runs when the container has ended: it puts the last word, the container's name, itself.
const EXIT_COMMAND: &str = "/bin/true";

/// `spec.dump`: the bundle's configuration, with the annotation that tells the layout, and without the files that podman
/// makes for each container by itself.
pub(super) fn spec(bundle: &Value) -> Value {
    let mut spec = bundle.clone();
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|mount| {
            let source = mount["source"].as_str().unwrap_or_default();
            !source.contains(OWN_FILES)
        });
    }
    if let Some(object) = spec.as_object_mut() {
        let annotations = object.entry("annotations").or_insert_with(|| json!({}));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.insert(MANAGER.to_owned(), json!(PODMAN));
        }
    }
    spec
}

/// `config.dump`: what names the container, and the image that it was made of. `created` is a time as RFC 3339 has it.
pub(super) fn config(
    (id, name): (&str, &str),
    image: &Image,
    runtime: &str,
    created: Option<&str>,
) -> Value {
    json!({
        "id": id,
        "name": name,
        "rootfsImageName": image.name,
        "rootfsImageID": image.id,
        "runtime": runtime,
        "createdTime": created.unwrap_or("0001-01-01T00:00:00Z"),
        "shmSize": SHM_BYTES,
        "exitCommand": [EXIT_COMMAND, id],
    })
}

/// Whether this `spec.dump` is of a container in podman's storage: its root lies there, and its images name files that
/// podman alone makes.
pub(super) fn is_podmans(spec: &Value) -> bool {
    let root = spec["root"]["path"].as_str().unwrap_or_default();
    root.contains("/overlay/") && root.ends_with("/merged")
}

/// The container's name in `config.dump`.
pub(super) fn name(config: &Value) -> Option<&str> {
    config["name"].as_str().or_else(|| config["id"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_keeps_its_annotations() {
        let bundle = json!({"root": {"path": "r"}, "annotations": {"a": "b"}});
        let wanted = json!({"a": "b", "io.container.manager": "libpod"});
        assert_eq!(spec(&bundle)["annotations"], wanted);
        assert_eq!(
            spec(&json!({}))["annotations"],
            json!({"io.container.manager": "libpod"})
        );
        let mount = |source: &str| json!({"destination": "/x", "source": source});
        let own = mount("/run/containers/storage/overlay-containers/77/userdata/hosts");
        let of = |mounts| spec(&json!({"mounts": mounts}))["mounts"].clone();
        assert_eq!(of(json!([own, mount("/data")])), json!([mount("/data")]));
    }

    #[test]
    fn containers_of_podman_are_known_by_their_root() {
        let of = |root: &str| is_podmans(&json!({"root": {"path": root}}));
        assert!(of("/var/lib/containers/storage/overlay/77/merged"));
        assert!(!of("rootfs") && !of("/srv/merged") && !is_podmans(&json!({})));
    }

    #[test]
    fn the_name_is_found() {
        let image = Image::default();
        let config = config(("77", "c1"), &image, "runc", None);
        assert_eq!(
            (name(&config), &config["exitCommand"][1]),
            (Some("c1"), &json!("77"))
        );
        assert_eq!(name(&json!({"id": "c2"})), Some("c2"));
        assert_eq!(name(&json!({})), None);
    }
}
