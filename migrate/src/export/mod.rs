//! `pageferry export`: the persistent state of a container, its writable layer, as a layer of an OCI image layout.
//!
//! ```text
//! subject (runtime, mounts) ──> walk (marks) ──> tarball ──> layout: blobs, then index.json
//! ```

mod args;
mod base;
mod deleted;
mod image;
mod layout;
mod marks;
mod mounts;
mod report;
mod subject;
mod tarball;
mod walk;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oci_spec::image::{Descriptor, MediaType};
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ContainerId;
use pageferry::observe::schema::Output;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use args::Args;
use base::Base;
pub(crate) use deleted::open_in_container;
pub(crate) use layout::Hashed;
use layout::{Compress, LayerBlob, Layout};
use marks::Marks;
pub(crate) use marks::travels;
pub(crate) use mounts::overlay_at;
pub(crate) use report::DeletedFile;
use report::{ImageReport, LayerReport, Report};
use subject::Subject;
pub(crate) use subject::root_layers;
use walk::Tree;

use crate::runtime::RuntimeArg;

/// Takes the image in the layout `dir` over into a new layout, and tells the number of its layers.
pub(crate) fn take_base(dir: &Path, to: &Path) -> Result<usize> {
    let base = Base::take(dir, None, &Layout::create(to)?)?;
    Ok(base.layers.len())
}

/// Exports what the command line names.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let report = export(args).await?;
        for warning in report.warnings() {
            tracing::warn!("{warning}");
        }
        if let Some(path) = &args.report {
            let text = serde_json::to_vec_pretty(&report);
            let text = text.map_err(|error| Error::file("write", path, error))?;
            fs::write(path, text).map_err(|error| Error::file("write", path, error))?;
        }
        match args.json {
            true => crate::print_json(&report),
            false => print(&args.output, &report),
        }
        Ok(())
    })
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("export-report", "pageferry export --report FILE, or --json")
}

fn print(dir: &Path, report: &Report) {
    let layer = &report.layer;
    println!(
        "{} files, {} directories, {} bytes, {} deletions",
        layer.files, layer.directories, layer.bytes, layer.whiteouts
    );
    for image in &report.images {
        println!("oci:{}:{} {}", dir.display(), image.name, image.manifest);
    }
}

/// Writes the files of a container that differ from what it was made of to `to`, as a layer without whiteouts.
/// What was deleted is listed in the report.
pub(crate) async fn difference<W: Write + Send + 'static>(
    id: &ContainerId,
    runtime: RuntimeArg,
    root: Option<PathBuf>,
    to: W,
) -> Result<(W, LayerReport)> {
    let subject = Subject::container(id, runtime, root).await?;
    let write = move || {
        let below = subject.below.unwrap_or_default();
        walk::write_difference(&subject.top, &below, to)
    };
    let done = tokio::task::spawn_blocking(write).await;
    done.map_err(|error| Error::wrap(Kind::Io, "the export ended", error))?
}

/// Writes all files of the tree at `dir`, as this host sees them, to `to` as a layer. Of one that is the writable layer
/// of an overlay (`is_upper`) whiteouts and marks are files and attributes.
pub(crate) fn whole<W: Write>(dir: &Path, is_upper: bool, to: W) -> Result<W> {
    let tree = Tree {
        dir: dir.to_owned(),
        marks: match is_upper {
            true => Marks::Raw,
            false => Marks::None,
        },
        mount: None,
    };
    walk::write_layer(&tree, to).map(|(to, _)| to)
}

/// Exports the subject; a container that is to be paused goes on afterwards, whatever happens.
async fn export(args: &Args) -> Result<Report> {
    let subject = Subject::find(&args.subject).await?;
    let paused = match &subject.running {
        Some((runtime, id)) if args.pause => {
            runtime.pause(id).await?;
            Some((runtime.clone(), id.clone()))
        }
        _ => None,
    };
    let exported = unless_interrupted(args, subject).await;
    if let Some((runtime, id)) = paused {
        runtime.resume(&id).await?;
    }
    exported
}

async fn unless_interrupted(args: &Args, subject: Subject) -> Result<Report> {
    let failed = |error| Error::wrap(Kind::Io, "cannot wait for signals", error);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let request = Request {
        output: args.output.clone(),
        base: args.base.clone(),
        compress: args.compress,
        subject,
    };
    tokio::select! {
        done = tokio::task::spawn_blocking(move || request.carry_out()) => {
            done.map_err(|error| Error::wrap(Kind::Io, "the export ended", error))?
        }
        _ = term.recv() => Err(interrupted(&args.output)),
        _ = int.recv() => Err(interrupted(&args.output)),
    }
}

fn interrupted(dir: &Path) -> Error {
    let text = format!(
        "stopped by a signal: {} is not a whole image layout, remove it",
        dir.display()
    );
    Error::new(Kind::Interrupted, text)
}

/// What is to be done, for the thread that does it.
struct Request {
    output: PathBuf,
    base: Option<PathBuf>,
    compress: Compress,
    subject: Subject,
}

/// Layers and configuration of an image.
struct Image {
    layers: Vec<Descriptor>,
    config: Value,
}

impl Image {
    fn with(mut self, layer: &LayerBlob) -> Image {
        self.layers.push(layer.descriptor.clone());
        self.config = image::with_layer(self.config, &layer.diff_id);
        self
    }

    /// Writes its configuration and manifest.
    fn add_to(self, layout: &Layout, name: &str) -> Result<(Descriptor, ImageReport)> {
        let config = layout.add_json(MediaType::ImageConfig, &self.config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageManifest,
            "config": config,
            "layers": self.layers,
        });
        let manifest = layout.add_json(MediaType::ImageManifest, &manifest)?;
        let report = ImageReport {
            name: name.to_owned(),
            manifest: manifest.digest().to_string(),
            layers: self
                .layers
                .iter()
                .map(|layer| layer.digest().to_string())
                .collect(),
        };
        Ok((manifest, report))
    }
}

impl Request {
    fn carry_out(self) -> Result<Report> {
        let layout = Layout::create(&self.output)?;
        let subject = &self.subject;
        let (top, layer) = self.add_layer(&layout, &subject.top)?;
        let alone = Image {
            layers: Vec::new(),
            config: image::of_container(subject.config.as_ref()),
        };
        let mut images = vec![("layer", alone.with(&top))];
        if let Some(base) = self.below(&layout)? {
            images.push(("template", base.with(&top)));
        }
        let (mut named, mut reports) = (Vec::new(), Vec::new());
        for (name, image) in images {
            let (manifest, report) = image.add_to(&layout, name)?;
            named.push((name, manifest));
            reports.push(report);
        }
        layout.seal(&named)?;
        Ok(Report {
            images: reports,
            layer,
            deleted: subject
                .root
                .map(deleted::open_in_container)
                .unwrap_or_default(),
        })
    }

    /// The image below the writable layer; `None` if it is not known.
    fn below(&self, layout: &Layout) -> Result<Option<Image>> {
        if let Some(base) = &self.base {
            let (dir, name) = split_base(base);
            let base = Base::take(&dir, name.as_deref(), layout)?;
            return Ok(Some(Image {
                layers: base.layers,
                config: base.config,
            }));
        }
        let Some(below) = &self.subject.below else {
            tracing::warn!(
                "the layers below are not to be found: there is no template (--base names the container's image)"
            );
            return Ok(None);
        };
        let mut image = Image {
            layers: Vec::new(),
            config: image::of_container(self.subject.config.as_ref()),
        };
        for tree in below {
            let (layer, _) = self.add_layer(layout, tree)?;
            image = image.with(&layer);
        }
        Ok(Some(image))
    }

    fn add_layer(&self, layout: &Layout, tree: &Tree) -> Result<(LayerBlob, LayerReport)> {
        layout.add_layer(self.compress, |file| walk::write_layer(tree, file))
    }
}

/// A layout's directory and the name of an image in it.
fn split_base(text: &Path) -> (PathBuf, Option<String>) {
    // A directory of this very name is meant first.
    let shown = text.to_string_lossy();
    match shown.rsplit_once(':') {
        Some((dir, name)) if !text.is_dir() && !name.contains('/') => {
            (PathBuf::from(dir), Some(name.to_owned()))
        }
        _ => (text.to_owned(), None),
    }
}
