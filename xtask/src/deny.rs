//! `cargo xtask deny`: what may be built in, by `deny.toml`, the configuration of cargo-deny.
//!
//! cargo-deny itself takes minutes to build, and its list of advisories is on the network. This checks by `cargo metadata`
//! what needs neither: licences, sources, duplicates and crates that are not wanted. Only the keys that stand in
//! `deny.toml` are known here; others are an error, so that nothing in it goes unheeded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use spdx::{Expression, LicenseReq, Licensee, ParseMode};
use testbed::workspace;

/// The configuration.
const FILE: &str = "deny.toml";

#[derive(clap::Args)]
pub(crate) struct Args {}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Config {
    graph: Graph,
    #[allow(dead_code, reason = "for cargo-deny alone: it needs the network")]
    advisories: toml::Table,
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Licenses {
    #[allow(dead_code, reason = "for cargo-deny alone")]
    version: u32,
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Bans {
    multiple_versions: Level,
    wildcards: Level,
    #[allow(
        dead_code,
        reason = "for cargo-deny alone: paths have versions or none here"
    )]
    allow_wildcard_paths: bool,
    skip: Vec<Spec>,
    deny: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Sources {
    unknown_registry: Level,
    unknown_git: Level,
    allow_registry: Vec<String>,
    allow_git: Vec<String>,
}

/// All that stands in the file is denied; nothing else is understood.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    Deny,
}

/// A crate, perhaps `NAME@VERSION` with the first parts of its version, and why it is named.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    #[serde(rename = "crate")]
    package: String,
    reason: String,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Clone, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Clone, Deserialize)]
struct Dependency {
    name: String,
    req: String,
    path: Option<String>,
}

/// Checks the workspace.
pub(crate) fn run(_args: &Args) -> Result<()> {
    let root = workspace::root();
    let text = fs::read_to_string(root.join(FILE)).context(FILE)?;
    let config: Config = toml::from_str(&text).context(FILE)?;
    let mut packages = BTreeMap::new();
    for target in &config.graph.targets {
        for package in packages_of(root, target)? {
            packages.insert((package.name.clone(), package.version.clone()), package);
        }
    }
    let packages: Vec<Package> = packages.into_values().collect();
    let problems = problems(&config, &packages)?;
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    println!("{} crates are as {FILE} allows", packages.len());
    Ok(())
}

fn packages_of(root: &Path, target: &str) -> Result<Vec<Package>> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(root)
        // The fuzzer is behind a feature.
        .args(["metadata", "--locked", "--all-features"])
        .args(["--format-version", "1", "--filter-platform", target]);
    let output = testbed::process::run(&mut command)?;
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    Ok(metadata.packages)
}

fn problems(config: &Config, packages: &[Package]) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    problems.extend(wrong_licenses(&config.licenses, packages)?);
    problems.extend(wrong_sources(&config.sources, packages));
    problems.extend(wrong_crates(&config.bans, packages));
    Ok(problems)
}

fn licensees(names: &[String]) -> Result<Vec<Licensee>> {
    let parsed = names.iter().map(|name| {
        Licensee::parse(name).map_err(|error| anyhow::anyhow!("{FILE}: license {name}: {error}"))
    });
    parsed.collect()
}

fn wrong_licenses(config: &Licenses, packages: &[Package]) -> Result<Vec<String>> {
    let allowed = licensees(&config.allow)?;
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    for package in packages {
        let Package { name, version, .. } = package;
        let mut own = allowed.clone();
        for exception in config
            .exceptions
            .iter()
            .filter(|exception| exception.name == *name)
        {
            own.extend(licensees(&exception.allow)?);
            used.insert(&exception.name);
        }
        let Some(license) = &package.license else {
            problems.push(format!("{name} {version} names no license"));
            continue;
        };
        let expression = match Expression::parse_mode(license, ParseMode::LAX) {
            Ok(expression) => expression,
            Err(error) => bail!("the license of {name} {version}: {error}"),
        };
        let is_allowed =
            |wanted: &LicenseReq| own.iter().any(|licensee| licensee.satisfies(wanted));
        if !expression.evaluate(is_allowed) {
            problems.push(format!(
                "{name} {version} has the license {license}, which {FILE} does not allow"
            ));
        }
    }
    let unused = config
        .exceptions
        .iter()
        .filter(|exception| !used.contains(&exception.name));
    problems
        .extend(unused.map(|exception| {
            format!("{FILE}: nothing needs the exception for {}", exception.name)
        }));
    Ok(problems)
}

fn wrong_sources(config: &Sources, packages: &[Package]) -> Vec<String> {
    let Sources {
        unknown_registry: Level::Deny,
        unknown_git: Level::Deny,
        allow_registry,
        allow_git,
    } = config;
    let is_allowed = |source: &str| match source.split_once('+') {
        Some(("registry" | "sparse", url)) => allow_registry.iter().any(|allowed| allowed == url),
        Some(("git", url)) => allow_git
            .iter()
            .any(|allowed| url.starts_with(allowed.as_str())),
        _ => false,
    };
    let sources = packages
        .iter()
        .filter_map(|package| Some((package, package.source.as_deref()?)));
    let wrong = sources.filter(|(_, source)| !is_allowed(source));
    wrong
        .map(|(package, source)| {
            format!("{} {} comes from {source}", package.name, package.version)
        })
        .collect()
}

impl Spec {
    fn names(&self, package: &Package) -> bool {
        let (name, version) = self.package.split_once('@').unwrap_or((&self.package, ""));
        let begins = package.version.strip_prefix(version);
        name == package.name
            && begins
                .is_some_and(|rest| version.is_empty() || rest.is_empty() || rest.starts_with('.'))
    }
}

fn wrong_crates(config: &Bans, packages: &[Package]) -> Vec<String> {
    let Bans {
        multiple_versions: Level::Deny,
        wildcards: Level::Deny,
        skip,
        deny,
        ..
    } = config;
    let mut problems = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&Package>> = BTreeMap::new();
    for package in packages {
        if let Some(spec) = deny.iter().find(|spec| spec.names(package)) {
            problems.push(format!("{} is not wanted: {}", package.name, spec.reason));
        }
        let any = |dependency: &&Dependency| dependency.req == "*" && dependency.path.is_none();
        // Others' own tests may say so.
        if package.source.is_none()
            && let Some(dependency) = package.dependencies.iter().find(any)
        {
            problems.push(format!(
                "{} takes any version of {}",
                package.name, dependency.name
            ));
        }
        versions.entry(&package.name).or_default().push(package);
    }
    for (name, versions) in &versions {
        let counted = versions
            .iter()
            .filter(|package| !skip.iter().any(|spec| spec.names(package)));
        let counted: Vec<_> = counted.map(|package| package.version.as_str()).collect();
        if counted.len() > 1 {
            problems.push(format!("{name} is in versions {}", counted.join(", ")));
        }
    }
    for spec in skip {
        let several = packages
            .iter()
            .any(|package| spec.names(package) && versions[package.name.as_str()].len() > 1);
        if !several {
            problems.push(format!(
                "{FILE}: {} is in one version: {} is no reason any more",
                spec.package, spec.reason
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, license: &str, source: Option<&str>) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
            license: Some(license.to_owned()),
            source: source.map(str::to_owned),
            dependencies: Vec::new(),
        }
    }

    fn config(skip: &str) -> Config {
        let text = format!(
            r#"
            graph.targets = []
            advisories.version = 2
            licenses = {{ version = 2, allow = ["MIT", "Apache-2.0"], exceptions = [] }}
            sources = {{ unknown-registry = "deny", unknown-git = "deny", allow-registry = ["https://here"], allow-git = [] }}
            [bans]
            multiple-versions = "deny"
            wildcards = "deny"
            allow-wildcard-paths = true
            skip = [{skip}]
            deny = [{{ crate = "bad", reason = "it is bad" }}]
            "#
        );
        toml::from_str(&text).unwrap()
    }

    const HERE: Option<&str> = Some("registry+https://here");

    fn found(skip: &str, packages: &[Package]) -> String {
        problems(&config(skip), packages).unwrap().join("\n")
    }

    #[test]
    fn what_is_allowed_is_no_problem() {
        let packages = [
            package("own", "0.1.0", "MIT OR Apache-2.0", None),
            package("choice", "1.0.0", "GPL-3.0-only OR MIT", HERE),
            package("old", "1.0.0", "MIT/Apache-2.0", HERE),
            package("two", "1.0.0", "MIT", HERE),
            package("two", "2.0.0", "MIT", HERE),
        ];
        let skip = r#"{ crate = "two@1", reason = "old" }"#;
        assert_eq!(found(skip, &packages), "");
    }

    #[test]
    fn each_kind_of_problem_is_found() {
        for (package, problem) in [
            (
                package("a", "1.0.0", "GPL-3.0-only", HERE),
                "does not allow",
            ),
            (
                package("a", "1.0.0", "MIT AND GPL-3.0-only", HERE),
                "does not allow",
            ),
            (
                package("a", "1.0.0", "MIT", Some("registry+https://there")),
                "comes from",
            ),
            (
                package("a", "1.0.0", "MIT", Some("git+https://here")),
                "comes from",
            ),
            (package("bad", "1.0.0", "MIT", HERE), "it is bad"),
        ] {
            let found = found("", std::slice::from_ref(&package));
            assert!(found.contains(problem), "{found}");
        }
        let two = [
            package("a", "1.0.0", "MIT", HERE),
            package("a", "10.0.0", "MIT", HERE),
        ];
        assert!(found("", &two).contains("a is in versions 1.0.0, 10.0.0"));
        let skip = r#"{ crate = "a@1", reason = "old" }"#;
        assert!(found(skip, &two[1..]).contains("no reason any more"));
        let mut any = package("a", "1.0.0", "MIT", None);
        any.dependencies.push(Dependency {
            name: "b".to_owned(),
            req: "*".to_owned(),
            path: None,
        });
        assert!(found("", &[any]).contains("any version of b"));
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let text = fs::read_to_string(workspace::root().join(FILE)).unwrap();
        assert!(toml::from_str::<Config>(&text).is_ok());
        assert!(toml::from_str::<Config>(&format!("{text}\n[output]\n")).is_err());
    }
}
