//! CRIU's own image tool, which also compresses and decompresses images: the judge of ours where no
//! CRIU is built with LZ4, as none of Debian's is.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Suite;
use crate::debian::{PrivateApt, wrapped};

/// Image version of directories that hold compressed pages, `CRTOOLS_IMAGES_V1_2`.
const VERSION_COMPRESSED: u32 = 3;

/// Image version of all others, `CRTOOLS_IMAGES_V1_1`.
const VERSION_PLAIN: u32 = 2;

/// `crit` of CRIU 4.3, the first that knows compressed pages.
#[derive(Clone, Debug)]
pub struct Crit {
    python: PathBuf,
}

impl Crit {
    /// Fetches it, with a Python and the libraries that it needs, unless it is here.
    ///
    /// # Errors
    /// No Debian archive, no network, or no such packages.
    pub fn fetched() -> Result<Crit> {
        let python = wrapped("crit", "bin/python3", |work, root| {
            // A stable suite's libraries for Python fit together at any time.
            let libraries = PrivateApt::new(&work.join("libraries"), Suite::Trixie)?;
            libraries.download(&["python3-protobuf", "python3-lz4"])?;
            libraries.unpack(root)?;
            let crit = PrivateApt::new(&work.join("crit"), Suite::Experimental)?;
            crit.download_alone("python3-pycriu")?;
            crit.unpack(root)
        });
        let python = python.context("fetching crit")?;
        Ok(Crit { python })
    }

    /// Compresses a finished dump, in place.
    ///
    /// # Errors
    /// crit refuses it; the error tells what it says.
    pub fn compress(&self, images: &Path) -> Result<()> {
        self.run("compress", images)
    }

    /// Decompresses images whose pages a page server has compressed, in place. The inventory, which
    /// the dump wrote and the page server never saw, is told of it before.
    ///
    /// # Errors
    /// crit finds something wrong with them; the error tells what.
    pub fn decompress(&self, images: &Path) -> Result<()> {
        self.edit_inventory(images, |entry| {
            ensure!(
                entry["img_version"] == VERSION_PLAIN,
                "another version: {entry}"
            );
            entry["img_version"] = json!(VERSION_COMPRESSED);
            // COMPRESS_BLOCK
            entry["compress"] = json!(1);
            Ok(())
        })?;
        self.run("decompress", images)
    }

    /// What `crit x DIR rss` tells of the resident memory: a line for each entry of each pagemap.
    ///
    /// # Errors
    /// crit cannot read the images; the error tells what it says.
    pub fn resident(&self, images: &Path) -> Result<String> {
        let mut crit = self.command();
        crit.arg("x").arg(images).arg("rss");
        succeed(&mut crit)
    }

    /// An image file as crit decodes it.
    ///
    /// # Errors
    /// crit cannot read it; the error tells what it says.
    pub fn decode(&self, image: &Path) -> Result<Value> {
        let mut crit = self.command();
        crit.args(["decode", "-i"]).arg(image);
        Ok(serde_json::from_str(&succeed(&mut crit)?)?)
    }

    fn edit_inventory(
        &self,
        images: &Path,
        edit: impl FnOnce(&mut Value) -> Result<()>,
    ) -> Result<()> {
        let binary = images.join("inventory.img");
        let text = images.join("inventory.json");
        let convert = |what: &str, from: &Path, to: &Path| {
            let mut crit = self.command();
            crit.args([what, "-i"]).arg(from).arg("-o").arg(to);
            succeed(&mut crit).map(drop)
        };
        convert("decode", &binary, &text)?;
        let mut inventory: Value = serde_json::from_slice(&std::fs::read(&text)?)?;
        edit(&mut inventory["entries"][0])?;
        std::fs::write(&text, inventory.to_string())?;
        convert("encode", &text, &binary)?;
        Ok(std::fs::remove_file(&text)?)
    }

    fn run(&self, what: &str, images: &Path) -> Result<()> {
        let mut crit = self.command();
        crit.args([what, "--in-place"]).arg(images);
        let output = succeed(&mut crit)?;
        // It also says so of what it takes for compressed, or decompressed, already.
        ensure!(output.contains("Done"), "crit {what}: {output}");
        Ok(())
    }

    fn command(&self) -> Command {
        let home = self.python.with_file_name("root").join("usr");
        let mut command = Command::new(&self.python);
        command
            .env("PYTHONPATH", home.join("lib/python3/dist-packages"))
            .env("PYTHONHOME", home)
            .args(["-m", "crit"])
            .stdin(Stdio::null());
        command
    }
}

/// Runs a command and returns what it prints.
fn succeed(command: &mut Command) -> Result<String> {
    let output = command.output().context("running crit")?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "crit: {}, {stdout}{complained}",
        output.status
    );
    Ok(stdout)
}
