//! ssh from the source to the destination of a pair of hosts: a real sshd with keys of its own, in the destination's network.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::debian;
use crate::documents::HostPair;

/// Makes keys, and lets the destination know the source's.
const PREPARE: &str = r#"
mkdir -p -m 700 ~/.ssh /shared/destination/.ssh
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
ssh-keygen -q -t ed25519 -N '' -f /shared/destination/.ssh/host_key
cp ~/.ssh/id_ed25519.pub /shared/destination/.ssh/authorized_keys
echo "$DESTINATION $(cut -d ' ' -f 1,2 /shared/destination/.ssh/host_key.pub)" > ~/.ssh/known_hosts
"#;

/// Starts the daemon. It writes its pid once it listens.
const SERVE: &str = r#"
mkdir -p /run/sshd
grep -q ^sshd: /etc/passwd || echo 'sshd:x:71:71::/run/sshd:/usr/sbin/nologin' >> /etc/passwd
echo "
HostKey /root/.ssh/host_key
AuthorizedKeysFile /root/.ssh/authorized_keys
PidFile /root/.ssh/pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
" > ~/.ssh/sshd_config
/usr/sbin/sshd -f ~/.ssh/sshd_config -E ~/.ssh/log
until [ -s ~/.ssh/pid ]; do sleep 0.05; done
"#;

/// The directory of a system with ssh and its daemon, fetched unless it is here.
///
/// # Errors
/// No Debian archive, no network, or not root.
pub fn system() -> Result<PathBuf> {
    debian::system("system-ssh", &["openssh-client", "openssh-server"])
}

/// From now on the source of a pair of hosts with [`system`] reaches the destination by `ssh $DESTINATION`.
///
/// # Errors
/// The daemon does not start.
pub fn connect(pair: &HostPair) -> Result<()> {
    let [source, destination] = &pair.machines;
    source.script(PREPARE).context("keys for ssh")?;
    destination.script(SERVE).context("sshd")
}
