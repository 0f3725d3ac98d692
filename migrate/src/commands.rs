//! What the command lines of the agent's and the source's programs share.

use std::path::Path;

use pageferry::migration::messages::TcpConnections;
use pageferry::tls::TlsArgs;
use tokio::process::Command;

use crate::programs::Programs;

/// Passes this program's TLS options on.
pub(crate) fn with_tls(command: &mut Command, tls: &TlsArgs) {
    if !tls.tls {
        return;
    }
    command.arg("--tls");
    let files = [
        ("--tls-cacert", &tls.tls_cacert),
        ("--tls-cacrl", &tls.tls_cacrl),
        ("--tls-cert", &tls.tls_cert),
        ("--tls-key", &tls.tls_key),
    ];
    for (option, file) in files {
        if let Some(file) = file {
            // The programs look for relative names in their own directories.
            let file = std::path::absolute(file).unwrap_or_else(|_| file.clone());
            command.arg(option).arg(file);
        }
    }
    if tls.tls_no_cn_verify {
        command.arg("--tls-no-cn-verify");
    }
}

/// How much of what CRIU does its log tells: all, and warnings and errors alone. A restore that reads memory from images of
/// several rounds tells up to three lines for each piece of it, a system call each: at 1 GiB most of its time.
pub(crate) const LOG_ALL: i32 = 4;
pub(crate) const LOG_WARNINGS: i32 = 2;

/// `criu VERB` with the images in a directory, which also holds its log, `VERB.log`, as verbose as `level` says.
pub(crate) fn criu(
    programs: &Programs,
    (verb, images): (&str, &Path),
    level: i32,
    tcp: TcpConnections,
) -> Command {
    let mut command = Command::new(&programs.criu);
    command
        .args([
            verb,
            "-o",
            &format!("{verb}.log"),
            &format!("-v{level}"),
            "-D",
        ])
        .arg(images);
    match tcp {
        TcpConnections::Refuse => {}
        TcpConnections::Established => {
            command.arg("--tcp-established");
        }
        TcpConnections::Close => {
            command.arg("--tcp-close");
        }
    }
    command
}
