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

/// `criu VERB` with the images in a directory, which also holds its log, `VERB.log`.
pub(crate) fn criu(programs: &Programs, place: (&str, &Path), tcp: TcpConnections) -> Command {
    let (verb, images) = place;
    let mut command = Command::new(&programs.criu);
    command
        .args([verb, "-o", &format!("{verb}.log"), "-v4", "-D"])
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
