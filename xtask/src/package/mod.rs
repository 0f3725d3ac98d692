//! Packages: two .deb files, static programs, and a list of what they are built from.
//!
//! ```text
//! dist build    -> stage/{bin,lib,man,completions}, stage/sbom.cdx.json -> cargo-deb -> *.deb
//! static build  -> static/pageferry
//! --try:        a clean root, the .deb in it, a dump and a restore (attempt.rs)
//! ```

mod attempt;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::wait::retried;
use testbed::workspace::{root, target_dir};

use crate::setup::{cargo, run};
use crate::{assets, tracked};

/// The versions of the tools that make packages.
const TOOLS: [(&str, &str); 2] = [("cargo-deb", "3.8.0"), ("cargo-cyclonedx", "0.5.9")];

/// What the standard library of the GNU target is linked with for a static build. Debian's own Rust has it too;
/// the standard library of the musl target comes by rustup alone.
const STATIC: &str = "-C target-feature=+crt-static";

/// Where static programs are, below the packages.
const STATIC_DIR: &str = "static";

/// What the programs of all packages may take together, bytes.
const PROGRAMS_MAX_BYTES: u64 = 16_000_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also install the .deb in a clean root, and dump and restore a process there
    #[arg(long = "try")]
    attempt: bool,

    /// Leave the static programs out
    #[arg(long)]
    no_static: bool,

    /// Package the pageferry that is in DIR, instead of building it
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

/// Builds the packages into target/package.
pub(crate) fn run_package(args: &Args) -> Result<()> {
    let place = target_dir().join("package");
    let stage = place.join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage).with_context(|| stage.display().to_string())?;
    }
    let tools = tools()?;
    let built = match &args.programs {
        Some(dir) => dir.clone(),
        None => {
            println!("building the program");
            run(cargo().args(BUILD))?;
            target_dir().join("dist")
        }
    };
    stage_programs(&built, &stage)?;
    println!("writing man pages, completions and the list of what is inside");
    stage_assets(&stage)?;
    list_parts(&tools, &stage)?;
    let mut made = Vec::new();
    for package in ["pageferry-cli", "criu-shim"] {
        made.push(deb(&tools, package, &place)?);
    }
    let mut static_dir = None;
    if !args.no_static {
        println!("building the static program");
        made.push(static_program(&place)?);
        static_dir = Some(place.join(STATIC_DIR));
    }
    for path in &made {
        let bytes = fs::metadata(path).with_context(|| path.display().to_string())?;
        println!("{}\t{} KiB", path.display(), bytes.len().div_ceil(1024));
    }
    if args.attempt {
        attempt::install_and_use(&made[..2], static_dir.as_deref(), &place)?;
    }
    Ok(())
}

/// One file for `pageferry`, `page-server`, `lazy-client` and `criu`.
const BUILD: [&str; 5] = [
    "build",
    "--profile=dist",
    "--locked",
    "--package=pageferry-cli",
    "--bins",
];

/// The tools, built into the target directory unless they are there.
fn tools() -> Result<PathBuf> {
    let tools = target_dir().join("tools");
    for (name, version) in TOOLS {
        let program = tools.join("bin").join(name);
        if has_version(&program, version) {
            continue;
        }
        println!("building {name} {version}, once");
        retried("cargo install", || {
            run(cargo()
                .args(["install", name, "--version", version, "--locked", "--root"])
                .arg(&tools))
        })?;
    }
    Ok(tools)
}

fn has_version(program: &Path, version: &str) -> bool {
    let subcommand = match program.ends_with("cargo-cyclonedx") {
        true => &["cyclonedx", "--version"][..],
        false => &["--version"],
    };
    let output = Command::new(program).args(subcommand).output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(version))
}

/// Puts the program of `built` into `stage`: one file under four names, in directories as below /usr.
fn stage_programs(built: &Path, stage: &Path) -> Result<()> {
    let (bin, shim) = (stage.join("bin"), stage.join("lib/pageferry/criu"));
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&shim)?;
    let from = built.join("pageferry");
    let copied = fs::copy(&from, bin.join("pageferry"));
    let bytes = copied.with_context(|| from.display().to_string())?;
    for name in ["page-server", "lazy-client"] {
        symlink("pageferry", bin.join(name))?;
    }
    // Not in PATH's directories: the real CRIU is there, and an alternative names this one.
    symlink("../../../bin/pageferry", shim.join("criu"))?;
    check_size(bytes)
}

fn check_size(bytes: u64) -> Result<()> {
    ensure!(
        bytes <= PROGRAMS_MAX_BYTES,
        "the program takes {bytes} bytes, more than {PROGRAMS_MAX_BYTES}"
    );
    Ok(())
}

/// Man pages and completions, by shell.
fn stage_assets(stage: &Path) -> Result<()> {
    let all = stage.join("assets");
    assets::write_all(&all)?;
    let man = stage.join("man");
    fs::rename(all.join("man"), &man)?;
    let completions = all.join("completions");
    for program in ["pageferry", "page-server", "lazy-client"] {
        for (shell, from, to) in [
            ("bash", format!("{program}.bash"), program.to_owned()),
            ("zsh", format!("_{program}"), format!("_{program}")),
            ("fish", format!("{program}.fish"), format!("{program}.fish")),
        ] {
            let dir = stage.join("completions").join(shell);
            fs::create_dir_all(&dir)?;
            let from = completions.join(from);
            fs::copy(&from, dir.join(to)).with_context(|| from.display().to_string())?;
        }
    }
    Ok(())
}

/// Writes the crates that the programs are built from, as CycloneDX.
fn list_parts(tools: &Path, stage: &Path) -> Result<()> {
    let mut command = Command::new(tools.join("bin/cargo-cyclonedx"));
    run(command
        .current_dir(root())
        .args([
            "cyclonedx",
            "--format=json",
            "--spec-version=1.5",
            "--quiet",
        ])
        .args(["--manifest-path=migrate/Cargo.toml", "--no-build-deps"])
        .arg("--override-filename=sbom.cdx"))?;
    // It writes one beside the manifest of each member of the workspace.
    let name = "sbom.cdx.json";
    let list = root().join("migrate").join(name);
    let text = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    // Of the machine that builds nothing is told.
    let text = text.replace(&root().display().to_string(), "");
    fs::write(stage.join(name), text)?;
    for manifest in tracked::files(root(), "*Cargo.toml")? {
        let path = root().join(manifest).with_file_name(name);
        if path.exists() {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Makes the .deb of a package and tells its path.
fn deb(tools: &Path, package: &str, place: &Path) -> Result<PathBuf> {
    let mut command = Command::new(tools.join("bin/cargo-deb"));
    let output = command
        .current_dir(root())
        .args(["--no-build", "--no-strip", "--package", package, "--output"])
        .arg(place)
        .output()
        .context("cargo-deb")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo-deb: {stderr}");
    let path = String::from_utf8_lossy(&output.stdout);
    let path = path.lines().last().context("cargo-deb names no file")?;
    Ok(path.trim().into())
}

/// The program that needs no library of the system.
fn static_program(place: &Path) -> Result<PathBuf> {
    let target = target_dir().join("static");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    run(cargo()
        .env("RUSTFLAGS", format!("{flags} {STATIC}"))
        // With a target named, what runs during the build is not static: procedural macros could not be.
        .args(BUILD)
        .args(["--target", &triple, "--target-dir"])
        .arg(&target))?;
    let dir = place.join(STATIC_DIR);
    fs::create_dir_all(&dir)?;
    let to = dir.join("pageferry");
    check_size(fs::copy(target.join(&triple).join("dist/pageferry"), &to)?)?;
    Ok(to)
}
