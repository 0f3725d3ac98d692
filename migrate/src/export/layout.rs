//! An OCI image layout on disk. It is whole or it is none: `index.json` is written last, once all that it names is
//! on the disk.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use flate2::Compression;
use flate2::write::GzEncoder;
use oci_spec::image::{Descriptor, DescriptorBuilder, MediaType, Sha256Digest};
use pageferry::error::{Error, Kind, Result};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// Blobs, below the layout's directory.
const BLOBS: &str = "blobs/sha256";

/// The file that makes a directory a layout.
pub(super) const INDEX: &str = "index.json";

/// Level of zstd's compression: its own default.
const ZSTD_LEVEL: i32 = 3;

/// How layers are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(super) enum Compress {
    /// Read by all tools
    Gzip,
    /// Quicker and smaller
    Zstd,
    None,
}

impl Compress {
    fn media_type(self) -> MediaType {
        match self {
            Compress::Gzip => MediaType::ImageLayerGzip,
            Compress::Zstd => MediaType::ImageLayerZstd,
            Compress::None => MediaType::ImageLayer,
        }
    }
}

/// A layout that is being written.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
}

/// A layer in a layout.
#[derive(Clone, Debug)]
pub(super) struct LayerBlob {
    pub(super) descriptor: Descriptor,
    /// Digest of the archive before it is compressed.
    pub(super) diff_id: String,
}

impl Layout {
    /// A layout in `dir`, which must be empty or not be there.
    pub(super) fn create(dir: &Path) -> Result<Layout> {
        fs::create_dir_all(dir).map_err(|error| Error::file("create", dir, error))?;
        let mut entries = fs::read_dir(dir).map_err(|error| Error::file("read", dir, error))?;
        if entries.next().is_some() {
            let text = format!("{} is not empty: name another directory", dir.display());
            return Err(Error::new(Kind::Usage, text));
        }
        let blobs = dir.join(BLOBS);
        fs::create_dir_all(&blobs).map_err(|error| Error::file("create", &blobs, error))?;
        Ok(Layout {
            dir: dir.to_owned(),
        })
    }

    /// Adds the layer that `write` writes.
    pub(super) fn add_layer<T>(
        &self,
        compress: Compress,
        write: impl FnOnce(LayerFile) -> Result<(LayerFile, T)>,
    ) -> Result<(LayerBlob, T)> {
        let unnamed = self.unnamed()?;
        let failed = |error| Error::file("write", &unnamed, error);
        let file = File::create_new(&unnamed).map_err(failed)?;
        let (written, result) = write(LayerFile::new(Packer::new(compress, file)?))?;
        let (diff_id, _, packer) = written.finish();
        let (digest, size, file) = packer.finish().map_err(failed)?.finish();
        self.name(&unnamed, &file, &digest)?;
        let blob = LayerBlob {
            descriptor: descriptor(compress.media_type(), &digest, size)?,
            diff_id: format!("sha256:{diff_id}"),
        };
        Ok((blob, result))
    }

    /// Adds a document.
    pub(super) fn add_json(
        &self,
        kind: MediaType,
        document: &impl Serialize,
    ) -> Result<Descriptor> {
        let bytes = bytes_of(document)?;
        self.add_blob(kind, &mut &bytes[..], None)
    }

    /// Adds what `from` holds, as it is. Fails if its digest is not the `wanted` one.
    pub(super) fn add_blob(
        &self,
        kind: MediaType,
        from: &mut impl Read,
        wanted: Option<&str>,
    ) -> Result<Descriptor> {
        let unnamed = self.unnamed()?;
        let failed = |error| Error::file("write", &unnamed, error);
        let mut file = Hashed::new(File::create_new(&unnamed).map_err(failed)?);
        io::copy(from, &mut file).map_err(failed)?;
        let (digest, size, file) = file.finish();
        if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
            return Err(damaged(wanted, &digest));
        }
        self.name(&unnamed, &file, &digest)?;
        descriptor(kind, &digest, size)
    }

    /// Ends it: from here on it is a layout, with these images.
    pub(super) fn seal(self, images: &[(&str, Descriptor)]) -> Result<()> {
        let manifests: Vec<_> = images
            .iter()
            .map(|(name, descriptor)| {
                json!({
                    "mediaType": descriptor.media_type(),
                    "digest": descriptor.digest(),
                    "size": descriptor.size(),
                    "annotations": {"org.opencontainers.image.ref.name": name},
                })
            })
            .collect();
        let index = json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageIndex,
            "manifests": manifests,
        });
        let version = json!({"imageLayoutVersion": "1.0.0"});
        put(&self.dir, "oci-layout", &bytes_of(&version)?)?;
        sync_dir(&self.dir.join(BLOBS))?;
        sync_dir(&self.dir.join("blobs"))?;
        sync_dir(&self.dir)?;
        put(&self.dir, INDEX, &bytes_of(&index)?)?;
        sync_dir(&self.dir)
    }

    /// A path for a blob whose digest is not known yet.
    fn unnamed(&self) -> Result<PathBuf> {
        let path = self.dir.join(BLOBS).join(".unfinished");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", &path, error))
            }
            _ => Ok(path),
        }
    }

    fn name(&self, unnamed: &Path, file: &File, digest: &str) -> Result<()> {
        file.sync_all()
            .map_err(|error| Error::file("write", unnamed, error))?;
        let path = self.dir.join(BLOBS).join(digest);
        fs::rename(unnamed, &path).map_err(|error| Error::file("name", &path, error))
    }
}

/// A blob that has another digest than the one that it is named by.
pub(super) fn damaged(wanted: &str, digest: &str) -> Error {
    let text =
        format!("the blob sha256:{wanted} of the base is damaged: its digest is sha256:{digest}");
    Error::new(Kind::Image, text)
}

/// Writes a file of the layout under a name of its own, and gives it its name once it is on the disk.
pub(super) fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (unnamed, path) = (dir.join(format!(".{name}.new")), dir.join(name));
    let written = File::create(&unnamed).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| Error::file("write", &unnamed, error))?;
    fs::rename(&unnamed, &path).map_err(|error| Error::file("name", &path, error))
}

/// Makes the names in a directory last.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| Error::file("sync", dir, error))
}

fn bytes_of(document: &impl Serialize) -> Result<Vec<u8>> {
    // By way of a value, whose keys are sorted: the same document has the same digest.
    let value = serde_json::to_value(document);
    let bytes = value.and_then(|value| serde_json::to_vec(&value));
    bytes.map_err(|error| Error::wrap(Kind::Io, "cannot write a document of the image", error))
}

fn descriptor(kind: MediaType, digest: &str, size: u64) -> Result<Descriptor> {
    let failed = |error| Error::wrap(Kind::Io, "cannot describe a blob", error);
    let digest = Sha256Digest::from_str(digest).map_err(failed)?;
    let builder = DescriptorBuilder::default().media_type(kind);
    builder.digest(digest).size(size).build().map_err(failed)
}

/// What a layer's archive is written to.
pub(super) type LayerFile = Hashed<Packer>;

/// Counts and hashes what is written.
pub(crate) struct Hashed<W> {
    to: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Hashed<W> {
    pub(crate) fn new(to: W) -> Hashed<W> {
        Hashed {
            to,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// The digest in hexadecimal digits, the bytes, and where they went.
    pub(crate) fn finish(self) -> (String, u64, W) {
        let digest = self.hash.finalize();
        let digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        (digest, self.bytes, self.to)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.to.write(bytes)?;
        self.hash.update(bytes.get(..taken).unwrap_or_default());
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// A compressor before a blob's file.
pub(super) enum Packer {
    Gzip(GzEncoder<Hashed<File>>),
    Zstd(zstd::Encoder<'static, Hashed<File>>),
    Plain(Hashed<File>),
}

impl Packer {
    fn new(compress: Compress, file: File) -> Result<Packer> {
        let file = Hashed::new(file);
        Ok(match compress {
            Compress::Gzip => Packer::Gzip(GzEncoder::new(file, Compression::default())),
            Compress::Zstd => {
                let encoder = zstd::Encoder::new(file, ZSTD_LEVEL);
                Packer::Zstd(
                    encoder.map_err(|error| Error::wrap(Kind::Io, "cannot compress", error))?,
                )
            }
            Compress::None => Packer::Plain(file),
        })
    }

    fn finish(self) -> io::Result<Hashed<File>> {
        match self {
            Packer::Gzip(encoder) => encoder.finish(),
            Packer::Zstd(encoder) => encoder.finish(),
            Packer::Plain(file) => Ok(file),
        }
    }
}

impl Write for Packer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Packer::Gzip(to) => to.write(bytes),
            Packer::Zstd(to) => to.write(bytes),
            Packer::Plain(to) => to.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Packer::Gzip(to) => to.flush(),
            Packer::Zstd(to) => to.flush(),
            Packer::Plain(to) => to.flush(),
        }
    }
}
