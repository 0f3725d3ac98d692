//! The documents of a checkpoint's archive, as podman writes them and checkpointctl reads them. Pure.

use serde_json::{Value, json};

/// The annotation by which readers know whose layout an archive has.
const MANAGER: &str = "io.container.manager";

/// podman's name there.
const PODMAN: &str = "libpod";

/// `spec.dump`: the bundle's configuration, with the annotation that tells the layout.
pub(super) fn spec(bundle: &Value) -> Value {
    let mut spec = bundle.clone();
    if let Some(object) = spec.as_object_mut() {
        let annotations = object.entry("annotations").or_insert_with(|| json!({}));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.insert(MANAGER.to_owned(), json!(PODMAN));
        }
    }
    spec
}

/// `config.dump`: what names the container. `created` is a time as RFC 3339 has it.
pub(super) fn config(id: &str, runtime: &str, created: Option<&str>) -> Value {
    json!({
        "id": id,
        "name": id,
        "rootfsImageName": "",
        "runtime": runtime,
        "createdTime": created.unwrap_or("0001-01-01T00:00:00Z"),
    })
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
    }

    #[test]
    fn the_name_is_found() {
        assert_eq!(name(&config("c1", "runc", None)), Some("c1"));
        assert_eq!(name(&json!({"id": "c2"})), Some("c2"));
        assert_eq!(name(&json!({})), None);
    }
}
