//! Every command block of README.md and docs/ is run as it stands, in order, with real CRIUs and runtimes, on two
//! hosts (`testbed::documents`).
//!
//! A block in Go is a program that uses go-criu, in PATH as `move`. `$PID` is a process at the source, `$SOURCE` and `$DESTINATION` are the hosts' addresses. In the home directories are
//! `ca.pem`, `host.pem` and `host.key`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::documents::{Block, HostPair, blocks, documents};
use testbed::pki::{Authority, Host};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::workspace::root;
use testbed::{debian, gate, gocriu, ssh};

/// Blocks that are not run, by a word of theirs, and why.
const NOT_RUN: &[(&str, &str)] = &[
    (
        "cargo xtask",
        "it builds and runs for minutes, this test among others",
    ),
    ("cargo build", "it builds for minutes"),
    ("cargo test", "it builds for minutes"),
    ("systemctl ", "it needs systemd"),
    ("apt-get ", "it changes the machine"),
    (
        "openssl ",
        "the hosts have none: the test makes these files",
    ),
    (
        "pageferry record ",
        "it needs two Redis: tests/redis_replay.rs takes these steps",
    ),
];

/// Programs whose lines are commands: an unmarked block that begins with one has escaped the test.
const PROGRAMS: &[&str] = &[
    "criu ",
    "page-server ",
    "lazy-client ",
    "pageferry ",
    "cargo ",
    "runc ",
    "podman ",
    "crun ",
    "sudo ",
];

/// Documents with a test of their own, of those below docs/guides.
const GUIDES: &[&str] = &["runc.md", "crun.md", "podman.md", "go-criu.md"];

/// The guide that makes the container of other documents' sections on runc.
const OF_RUNC: &str = "docs/guides/runc.md";

/// The first pid of the process that moves: nobody has it at the destination.
const FIRST_PID: u32 = 20_000;

/// Starts the process that moves, with no file open, and tells its pid.
const START_PROCESS: &str = r#"
for fd in $(ls /proc/$$/fd); do [ $fd -lt 3 ] || eval "exec $fd<&-"; done
setsid sleep 100000 <&- >&- 2>&- &
echo $! > pid
"#;

#[test]
fn command_blocks_run_as_they_stand() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let mut run = 0;
        for document in documents()? {
            let guide = document.parent().is_some_and(|dir| dir.ends_with("guides"));
            let own = |name: &&str| guide && document.ends_with(name);
            if !GUIDES.iter().any(own) {
                let Some(blocks) = run_document(test_dir, criu, &document)? else {
                    return Ok(());
                };
                run += blocks;
            }
        }
        ensure!(run >= 5, "only {run} blocks were found");
        Ok(())
    });
}

#[test]
fn the_guide_on_runc_runs_as_it_stands() {
    run_guide("runc.md");
}

#[test]
fn the_guide_on_crun_runs_as_it_stands() {
    run_guide("crun.md");
}

#[test]
fn the_guide_on_podman_runs_as_it_stands() {
    run_guide("podman.md");
}

#[test]
fn the_guide_on_go_criu_runs_as_it_stands() {
    run_guide("go-criu.md");
}

fn run_guide(name: &str) {
    // The CRIU that the runtimes' own suite has.
    with_criu(Suite::Sid, |test_dir, criu| {
        let run = run_document(test_dir, criu, &root().join("docs/guides").join(name))?;
        ensure!(
            run.is_none_or(|run| run >= 5),
            "only {run:?} blocks were found"
        );
        Ok(())
    });
}

/// Runs the blocks of a document, and tells how many; nothing where what they need is missing.
fn run_document(test_dir: &TestDir, criu: &Criu, document: &Path) -> Result<Option<usize>> {
    let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
        return Ok(None);
    };
    let mut sections: BTreeMap<usize, Vec<Block>> = BTreeMap::new();
    let (mut setup, mut program) = (Vec::new(), None);
    for block in blocks(document)? {
        if block.language == "sh setup" {
            setup.push(block);
            continue;
        }
        if block.language == "go" {
            program = gate::need("Go", gocriu::program(&block.text));
            if program.is_none() {
                return Ok(None);
            }
            continue;
        }
        if block.language != "sh" {
            let first = block.text.lines().next().unwrap_or_default();
            let escaped = PROGRAMS.iter().any(|program| first.starts_with(program));
            let place = &block.place;
            ensure!(!escaped, "{place}: commands that are not marked as sh");
            continue;
        }
        match NOT_RUN.iter().find(|(word, _)| block.text.contains(word)) {
            Some((_, why)) => println!("not run: {}: {why}", block.place),
            None => sections.entry(block.section).or_default().push(block),
        }
    }
    let name = document.file_stem().unwrap_or_default().to_string_lossy();
    let mut run = 0;
    for (number, blocks) in sections {
        let only = std::env::var("PAGEFERRY_SECTION").ok();
        if only.is_some_and(|only| only != number.to_string()) {
            continue;
        }
        let says = |word: &str| blocks.iter().any(|block| block.text.contains(word));
        // A copy to another host is made by a real ssh.
        let by_ssh = says("copy-lazy ") && says(" $DESTINATION:");
        let system = match by_ssh {
            true => gate::need("a system with ssh", ssh::system()),
            false => Some(system.clone()),
        };
        let Some(system) = system else {
            return Ok(None);
        };
        let mut pair = HostPair::new(test_dir, &system, criu, &format!("{name}-{number}"))?;
        write_credentials(&pair)?;
        if by_ssh {
            ssh::connect(&pair)?;
        }
        if let Some(program) = &program {
            fs::copy(program, pair.tools().join("move"))?;
        }
        if says("runc ") && setup.is_empty() {
            setup_of_runc(&pair)?;
        }
        if says("$PID") {
            start_process(&mut pair)?;
        }
        for block in setup.iter().chain(&blocks) {
            println!("running {}", block.place);
            pair.run(block)?;
        }
        run += blocks.len();
        if says("criu restore") && says("$PID") {
            let arrived = pair.machines[1].script("kill -0 $PID");
            arrived.with_context(|| format!("section {number}: the process has not arrived"))?;
        }
    }
    Ok(Some(run))
}

fn setup_of_runc(pair: &HostPair) -> Result<()> {
    let blocks = blocks(&root().join(OF_RUNC))?;
    let mut setup = blocks.iter().filter(|block| block.language == "sh setup");
    setup.try_for_each(|block| pair.run(block))
}

fn start_process(pair: &mut HostPair) -> Result<()> {
    let source = &pair.machines[0];
    source.script(&format!(
        "echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid\n{START_PROCESS}"
    ))?;
    let file = source.home().join("pid");
    let pid = fs::read_to_string(&file)?;
    fs::remove_file(file)?;
    pair.set("PID", pid.trim());
    Ok(())
}

fn write_credentials(pair: &HostPair) -> Result<()> {
    let dir = pair.machines[0].home().to_owned();
    let authority = Authority::new(&dir, "ca")?;
    let names: Vec<String> = ["SOURCE", "DESTINATION"]
        .iter()
        .map(|side| pair.machines[0].output(&format!("echo ${side}")))
        .collect::<Result<_>>()?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let issued = authority.issue(&Host {
        name: "host",
        alternative_names: &names,
        serial: 1,
        expired: false,
    })?;
    for machine in &pair.machines {
        for (from, name) in [
            (&issued.cacert, "ca.pem"),
            (&issued.cert, "host.pem"),
            (&issued.key, "host.key"),
        ] {
            let to = machine.home().join(name);
            if from != &to {
                fs::copy(from, to)?;
            }
        }
    }
    Ok(())
}
