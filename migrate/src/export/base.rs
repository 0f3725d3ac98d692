//! The image that a container was made of, in a layout of its own: its blobs are taken over as they are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, DigestAlgorithm, ImageIndex, ImageManifest, MediaType};
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{OCI_DOCUMENT_BYTES_MAX, OCI_LAYERS_MAX};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::layout::{Hashed, INDEX, Layout, damaged};

/// The annotation that is an image's name in a layout.
const NAME: &str = "org.opencontainers.image.ref.name";

/// An image of another layout.
#[derive(Debug)]
pub(super) struct Base {
    /// Its layers, lowest first.
    pub(super) layers: Vec<Descriptor>,
    /// Its configuration.
    pub(super) config: Value,
}

impl Base {
    /// Takes the blobs of the image `name` in the layout at `dir` into `layout`. Without a name the layout must have
    /// one image alone.
    pub(super) fn take(dir: &Path, name: Option<&str>, layout: &Layout) -> Result<Base> {
        let manifest = find(dir, name)?;
        if manifest.layers().len() > OCI_LAYERS_MAX {
            let text = format!("{} has more than {OCI_LAYERS_MAX} layers", dir.display());
            return Err(Error::new(Kind::Unsupported, text));
        }
        for layer in manifest.layers() {
            let (path, digest) = blob(dir, layer)?;
            let file = File::open(&path).map_err(|error| Error::file("open", &path, error))?;
            layout.add_blob(
                layer.media_type().clone(),
                &mut file.take(layer.size()),
                Some(&digest),
            )?;
        }
        Ok(Base {
            layers: manifest.layers().clone(),
            config: read_blob(dir, manifest.config())?,
        })
    }
}

/// The manifest of an image.
fn find(dir: &Path, name: Option<&str>) -> Result<ImageManifest> {
    let index: ImageIndex = read(&dir.join(INDEX))?;
    let is_it = |descriptor: &&Descriptor| match name {
        None => true,
        Some(name) => {
            let annotations = descriptor.annotations().as_ref();
            annotations
                .and_then(|all| all.get(NAME))
                .is_some_and(|found| found == name)
                || descriptor.digest().as_ref() == name
        }
    };
    let found: Vec<_> = index.manifests().iter().filter(is_it).collect();
    let [found] = found[..] else {
        let text = format!(
            "{} has {} such images: --base DIR:NAME names one",
            dir.display(),
            found.len()
        );
        return Err(Error::new(Kind::Usage, text));
    };
    if *found.media_type() != MediaType::ImageManifest {
        let text = format!(
            "the image in {} is a {}: copy the one for this machine out of it (skopeo copy)",
            dir.display(),
            found.media_type()
        );
        return Err(Error::new(Kind::Unsupported, text));
    }
    read_blob(dir, found)
}

/// A blob's path and digest.
fn blob(dir: &Path, descriptor: &Descriptor) -> Result<(PathBuf, String)> {
    let digest = descriptor.digest();
    if *digest.algorithm() != DigestAlgorithm::Sha256 {
        let text = format!("{}: the digest {digest} is not a sha256", dir.display());
        return Err(Error::new(Kind::Unsupported, text));
    }
    // Checked by the type: hexadecimal digits alone.
    let digest = digest.digest().to_owned();
    Ok((dir.join("blobs/sha256").join(&digest), digest))
}

/// A document among the blobs, which must have its digest.
fn read_blob<T: DeserializeOwned>(dir: &Path, descriptor: &Descriptor) -> Result<T> {
    let (path, wanted) = blob(dir, descriptor)?;
    let text = text_of(&path)?;
    let mut hashed = Hashed::new(io::sink());
    hashed
        .write_all(&text)
        .map_err(|error| Error::file("read", &path, error))?;
    let (digest, ..) = hashed.finish();
    if digest != wanted {
        return Err(damaged(&wanted, &digest));
    }
    understood(&path, &text)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    understood(path, &text_of(path)?)
}

fn understood<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|error| Error::file("understand", path, error))
}

fn text_of(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
    let mut text = Vec::new();
    let read = file.take(OCI_DOCUMENT_BYTES_MAX + 1).read_to_end(&mut text);
    read.map_err(|error| Error::file("read", path, error))?;
    if text.len() as u64 > OCI_DOCUMENT_BYTES_MAX {
        let text = format!(
            "{} is longer than {OCI_DOCUMENT_BYTES_MAX} bytes",
            path.display()
        );
        return Err(Error::new(Kind::Unsupported, text));
    }
    Ok(text)
}
