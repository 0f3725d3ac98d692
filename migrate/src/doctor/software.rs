//! CRIU, these programs, and runtimes, with their configuration.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pageferry::daemon::settings::{Environment, found_files};
use tokio::process::Command;

use super::{Checks, Job};
use crate::programs::{ProgramArgs, all_on_path, problems_of, reads_compressed, version_of};

/// Runtimes that checkpoint by CRIU.
const RUNTIMES: [&str; 3] = ["runc", "crun", "podman"];

/// Fills `checks`.
pub(super) async fn check(checks: &mut Checks, args: &ProgramArgs) {
    checks.area("CRIU");
    criu(checks, args).await;
    for file in found_files(&Environment::of_process()) {
        let name = file.path.display().to_string();
        match file.options {
            Ok(options) if options.is_empty() => checks.works(name, "says nothing"),
            Ok(options) => checks.works(name, options.join(" ")),
            Err(error) => {
                let advice = "CRIU and these programs refuse to start: repair or remove it";
                let all = [Job::DumpAndRestore, Job::CarryMemory, Job::LazyRestore];
                checks.missing(name, error, advice, &all);
            }
        }
    }
    checks.area("pageferry");
    for (name, job) in [
        ("page-server", Job::CarryMemory),
        ("lazy-client", Job::LazyRestore),
    ] {
        match args.ours(name) {
            Ok(path) => checks.works(name, path.display().to_string()),
            Err(error) => checks.missing(name, error.to_string(), "install it", &[job]),
        }
    }
    checks.area("runtimes");
    for name in RUNTIMES {
        runtime(checks, name).await;
    }
}

/// Every CRIU on PATH, or the one that is named: the first one counts.
async fn criu(checks: &mut Checks, args: &ProgramArgs) {
    let mut seen = BTreeSet::new();
    let mut paths: Vec<PathBuf> = match args.criu() {
        Some(path) => vec![path.to_owned()],
        None => all_on_path("criu"),
    };
    paths.retain(|path| seen.insert(path.canonicalize().unwrap_or_else(|_| path.clone())));
    if paths.is_empty() {
        let advice = "install CRIU 3.17 or later, or name one by --criu";
        return checks.missing("criu", "none on PATH", advice, &[Job::DumpAndRestore]);
    }
    for (rank, path) in paths.iter().enumerate() {
        let name = path.display().to_string();
        // Those behind the first one stop nothing.
        let stops: &[Job] = if rank == 0 {
            &[Job::DumpAndRestore]
        } else {
            &[]
        };
        let Some(version) = version_of(path).await else {
            checks.missing(name, "does not start", "reinstall it", stops);
            continue;
        };
        let lz4 = match reads_compressed(path).await {
            true => ", with compressed pages",
            false => ", without compressed pages",
        };
        let problems = problems_of(path).await;
        match problems.is_empty() {
            true => checks.works(name, format!("{version}{lz4}, `criu check` is content")),
            false => checks.missing(
                name,
                format!("{version}{lz4}, `criu check`: {}", one_line(&problems)),
                "see what it names; as another user than root it may lack permissions",
                stops,
            ),
        }
    }
}

async fn runtime(checks: &mut Checks, name: &'static str) {
    let Some(path) = all_on_path(name).into_iter().next() else {
        return checks.absent(name);
    };
    let printed = output_of(&path, "--version").await;
    let version = printed.lines().next().unwrap_or_default().to_owned();
    let mut value = format!("{}: {version}", path.display());
    if name == "podman"
        && let Some(runtime) = podman_runtime()
    {
        value = format!("{value}, with {runtime}");
    }
    // crun lists what it was built with.
    match name == "crun" && !printed.contains("+CRIU") {
        true => {
            let advice =
                "it cannot checkpoint: install one that is built with CRIU, and libcriu beside it";
            checks.limited(name, format!("{value}, without CRIU"), advice);
        }
        false => checks.works(name, value),
    }
}

/// What `containers.conf` names as the runtime; the user's before the system's.
fn podman_runtime() -> Option<String> {
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let files = [
        home.join(".config/containers/containers.conf"),
        "/etc/containers/containers.conf".into(),
        "/usr/share/containers/containers.conf".into(),
    ];
    files.iter().find_map(|path| {
        let text = super::kernel::read(path)?;
        text.lines().find_map(|line| {
            let (key, value) = line.split_once('=')?;
            let named = (key.trim() == "runtime").then(|| value.trim().trim_matches('"'));
            named.map(str::to_owned)
        })
    })
}

async fn output_of(program: &Path, option: &str) -> String {
    match Command::new(program).arg(option).output().await {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => format!("does not start: {error}"),
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}
