//! CRIU's configuration files mean the same to our daemons as to a real CRIU: both are started with the same
//! generated files in all the places where CRIU looks, and what they listen on, how, and which files
//! they write is compared.

mod config;

use std::fs;

use anyhow::{Result, ensure};
use config::{Outcome, Settings, TestNetwork, generated};
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::pki::{Authority, Host};
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace::binary;

for_each_criu!(
    generated_files_mean_what_they_mean_to_criu,
    one_file_secures_a_dump_and_its_page_server,
);

/// How many generated sets of files are compared.
const GENERATED: u64 = 16;

/// Every rule of the format and of the order of files, by hand.
#[test]
fn files_mean_what_they_mean_to_criu() {
    with_criu(Suite::Sid, |test_dir, criu| {
        compare(test_dir, criu, config::by_hand())
    });
}

fn generated_files_mean_what_they_mean_to_criu(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    // Others for each version.
    let seed = u64::from(criu.release()?.1) * GENERATED;
    compare(test_dir, criu, (seed..seed + GENERATED).map(generated))
}

/// The same for `criu lazy-pages` and lazy-client: what they connect to, and how.
#[test]
fn files_mean_to_lazy_client_what_they_mean_to_criu() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let load = Load::start(LoadSpec::mixed(test_dir.path("load"), 2), None)?;
        let images = test_dir.path("images");
        Dump::new(criu, load.pid(), &images).leave_running().run()?;
        let network = TestNetwork::new(test_dir)?;
        let mut differences = Vec::new();
        for settings in config::lazy::by_hand() {
            let theirs = network.lazy_pages(Make::Criu(criu), &settings, &images)?;
            let ours = network.lazy_pages(Make::Ours, &settings, &images)?;
            let stricter =
                matches!(&ours, config::lazy::Outcome::Refused(why) if is_documented(why));
            if !stricter && ours != theirs {
                differences.push(format!("{settings:#?}\nCRIU: {theirs:?}\nours: {ours:?}"));
            }
        }
        ensure!(differences.is_empty(), "{}", differences.join("\n\n"));
        Ok(())
    });
}

fn compare(test_dir: &TestDir, criu: &Criu, all: impl IntoIterator<Item = Settings>) -> Result<()> {
    let network = TestNetwork::new(test_dir)?;
    let mut differences = Vec::new();
    for settings in all {
        let theirs = network.page_server(Make::Criu(criu), &settings)?;
        let ours = network.page_server(Make::Ours, &settings)?;
        let stricter = match (&ours, &theirs) {
            (Outcome::Refused(why), Outcome::Listens { .. }) => is_documented(why),
            _ => false,
        };
        if !stricter && ours != theirs {
            differences.push(format!("{settings:#?}\nCRIU: {theirs:?}\nours: {ours:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n\n"));
    Ok(())
}

/// Refusals of what CRIU would take for something else than it says, or take half of.
fn is_documented(why: &str) -> bool {
    [
        "needs a value",
        "two dashes",
        "write it so that both are the same",
    ]
    .iter()
    .any(|reason| why.contains(reason))
}

/// `tls` in a file was lost, and memory travelled in plain text.
fn one_file_secures_a_dump_and_its_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let pki = test_dir.path("pki");
    fs::create_dir_all(&pki)?;
    let keys = Authority::new(&pki, "ca")?.issue(&Host::LOOPBACK)?;
    let config = test_dir.path("criu.conf");
    let port = free_port()?;
    let files = [
        ("tls-cacert", &keys.cacert),
        ("tls-cert", &keys.cert),
        ("tls-key", &keys.key),
    ];
    let files = files
        .map(|(name, path)| format!("{name} \"{}\"", path.display()))
        .join("\n");
    fs::write(
        &config,
        format!("# for both ends\ntls\n{files}\naddress 127.0.0.1\nport {port}\n"),
    )?;

    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 16), None)?;
    let images = test_dir.path("images");
    fs::create_dir_all(&images)?;
    let mut command = std::process::Command::new(binary("page-server")?);
    command
        .arg("-D")
        .arg(&images)
        .arg("--config")
        .arg(&config)
        .args(["-v4", "-o", "server.log"]);
    let log = images.join("server.log");
    let mut server = Spawned::start_ready("page-server", &mut command, log.clone())?;
    let config = config.to_string_lossy().into_owned();
    let dump = Dump::new(criu, load.pid(), &images).with(&["--page-server", "--config", &config]);
    dump.run()?;
    server.succeed(GENEROUS)?;
    let log_text = fs::read_to_string(&log)?;
    ensure!(log_text.contains("criu.conf"), "{log_text}");
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, &images).run()?;
    load.expect_first_memory().map(drop)
}

/// What our programs alone say of files.
#[test]
fn a_file_that_is_named_in_vain_is_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run = |program: &str, config: &str| -> Result<String> {
        let mut command = std::process::Command::new(binary(program)?);
        command
            .arg("-D")
            .arg(dir.path())
            .args(["--config", config, "--port", "not-a-port"]);
        let output = command.env_remove("CRIU_CONFIG_FILE").output()?;
        ensure!(!output.status.success());
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let config = dir.path().join("conf").display().to_string();
    for (text, reason) in [
        ("tsl\n", "line 1: unknown option"),
        ("\nport\n", "line 2: option \"--port\" needs a value"),
        (
            "tls-key \"/pki/a#b\"\n",
            "line 1: CRIU would take \"/pki/a\"",
        ),
        ("tls --\nport 7\n", "line 1: a word of two dashes"),
        ("port 70000\n", "line 1"),
        ("port many\n", "line 1: the port is not a number"),
    ] {
        fs::write(&config, text)?;
        for program in ["page-server", "lazy-client"] {
            let mut command = std::process::Command::new(binary(program)?);
            command
                .arg("-D")
                .arg(dir.path())
                .args(["--config", &config]);
            let output = command.output()?;
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(!output.status.success(), "{program} takes {text:?}");
            ensure!(
                error.contains(&config) && error.contains(reason),
                "{program}: {text:?}: {error}"
            );
        }
    }
    // A directory is no file, and whoever named it meant something.
    let error = run("page-server", &dir.path().display().to_string())?;
    ensure!(error.contains("configuration file"), "{error}");
    Ok(())
}
