//! One file is three programs: which one, its name tells.

use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::Result;

/// What the program under this name prints for `option`: the first line of its standard output and of its standard error.
fn first_lines(name: &str, option: &str) -> Result<(bool, String, String)> {
    let dir = tempfile::tempdir()?;
    let link = dir.path().join(name);
    symlink(env!("CARGO_BIN_EXE_pageferry"), &link)?;
    let output = Command::new(&link).arg(option).output()?;
    let first = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.lines().next().unwrap_or_default().to_owned()
    };
    let ended_well = output.status.success();
    Ok((ended_well, first(&output.stdout), first(&output.stderr)))
}

#[test]
fn a_link_names_the_program() -> Result<()> {
    for (link, program) in [
        ("page-server", "page-server "),
        ("lazy-client", "lazy-client "),
        ("pageferry", "pageferry "),
        ("another-name", "pageferry "),
    ] {
        let (ended_well, version, _) = first_lines(link, "--version")?;
        assert!(
            ended_well && version.starts_with(program),
            "{link}: {version}"
        );
    }
    Ok(())
}

#[test]
fn a_wrong_option_is_refused_under_every_name() -> Result<()> {
    for name in ["page-server", "lazy-client", "pageferry"] {
        let (ended_well, _, said) = first_lines(name, "--no-such-option")?;
        assert!(!ended_well && said.starts_with("error: "), "{name}: {said}");
    }
    Ok(())
}
