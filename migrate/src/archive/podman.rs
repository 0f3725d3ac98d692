//! What podman knows of a container, where podman made it: its image, by which it is imported again.
//!
//! podman's storage has for each container a directory `overlay-containers/ID/userdata`, the container's bundle, and a list
//! `overlay-containers/containers.json`.

use std::fs;
use std::io;
use std::path::Path;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::OCI_DOCUMENT_BYTES_MAX;
use serde_json::Value;

/// The list of containers.
const LIST: &str = "containers.json";

/// A part of the path of files that podman makes for one container and binds into it.
pub(super) const OWN_FILES: &str = "/overlay-containers/";

/// An image, as podman's storage names it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Image {
    pub(super) name: String,
    /// 64 hexadecimal digits.
    pub(super) id: String,
}

/// A container of podman's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct PodmanContainer {
    /// The name that its user knows.
    pub(super) name: Option<String>,
    pub(super) image: Image,
}

/// Looks for the container `id` in the storage that its bundle lies in; `None` if it is none of podman's.
pub(super) fn find(bundle: &Path, id: &str) -> Result<Option<PodmanContainer>> {
    let Some(dir) = bundle.parent().and_then(Path::parent) else {
        return Ok(None);
    };
    let path = dir.join(LIST);
    let failed = |error| Error::file("read", &path, error);
    let bytes = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta.map_err(failed)?.len(),
    };
    if bytes > OCI_DOCUMENT_BYTES_MAX {
        let text = format!(
            "{} is longer than {OCI_DOCUMENT_BYTES_MAX} bytes",
            path.display()
        );
        return Err(Error::new(Kind::Unsupported, text));
    }
    let text = fs::read(&path).map_err(failed)?;
    let list: Value =
        serde_json::from_slice(&text).map_err(|error| Error::file("understand", &path, error))?;
    Ok(in_list(&list, id))
}

fn in_list(list: &Value, id: &str) -> Option<PodmanContainer> {
    let found = list.as_array()?.iter().find(|one| one["id"] == id)?;
    // A document within the document.
    let metadata: Value = serde_json::from_str(found["metadata"].as_str()?).ok()?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Some(PodmanContainer {
        name: text(&metadata["name"]).or_else(|| text(&found["names"][0])),
        image: Image {
            name: text(&metadata["image-name"])?,
            id: text(&metadata["image-id"]).or_else(|| text(&found["image"]))?,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_of_podman_is_found_by_the_list_beside_its_bundle() {
        let tmp = tempfile::tempdir().unwrap();
        let bundle = tmp.path().join("overlay-containers/abc/userdata");
        fs::create_dir_all(&bundle).unwrap();
        assert_eq!(find(&bundle, "abc").unwrap(), None);
        let metadata =
            json!({"image-name": "localhost/tiny:latest", "image-id": "77", "name": "c1"});
        let list = json!([{"id": "xyz"}, {"id": "abc", "names": ["c1"], "image": "77",
            "metadata": metadata.to_string()}]);
        let path = tmp.path().join("overlay-containers/containers.json");
        fs::write(&path, list.to_string()).unwrap();
        let found = find(&bundle, "abc").unwrap().unwrap();
        let image = Image {
            name: "localhost/tiny:latest".to_owned(),
            id: "77".to_owned(),
        };
        assert_eq!((found.name.as_deref(), found.image), (Some("c1"), image));
        assert_eq!(find(&bundle, "other").unwrap(), None);
        assert_eq!(find(Path::new("/"), "abc").unwrap(), None);
        fs::write(&path, "no list").unwrap();
        assert!(find(&bundle, "abc").is_err());
    }
}
