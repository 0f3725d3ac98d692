//! `pageferry dump`, `restore` and `snapshot`: containers in archives that checkpointctl reads, and images of them.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::criu::{Criu, Suite};
use testbed::documents::HostPair;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{debian, gate};

/// A bundle whose root is an overlay on a file system in memory.
const START: &str = r#"
mkdir -p /tmp/$RUNTIME/lower/bin /tmp/$RUNTIME/lower/etc /tmp/$RUNTIME/lower/dir/kept
cd /tmp/$RUNTIME
mkdir -p upper work rootfs second/rootfs
cp /shared/config.json .
cp /usr/bin/busybox lower/bin/
ln -s busybox lower/bin/sh
echo old > lower/etc/old
echo old > lower/dir/old
echo old > lower/dir/kept/old
cp -a lower/. second/rootfs/
mount -t overlay overlay -o "lowerdir=$PWD/lower,upperdir=$PWD/upper,workdir=$PWD/work" rootfs
$RUNTIME run -d --bundle $PWD c1 < /dev/null > /dev/null 2>&1
until [ -e upper/ready ]; do sleep 0.05; done
"#;

/// What the container does: it deletes, replaces, adds, and counts.
const WORK: &str = "busybox rm -r /etc/old /dir; busybox mkdir -p /dir/kept; echo new > /dir/kept/new; \
                    busybox mkfifo /fifo; busybox ln /dir/kept/new /linked; echo > /ready; \
                    i=0; while :; do i=$((i+1)); echo $i > /count; busybox sleep 0.1; done";

/// The container ends with its dump, and goes on from the archive in another bundle with its files.
const MOVE: &str = r#"
cd /tmp/$RUNTIME
pageferry snapshot c1 --runtime $RUNTIME -o images --leave-running
pageferry verify images
before=$(cat upper/count)
until [ "$(cat upper/count)" -gt "${before:-0}" ]; do sleep 0.05; done
pageferry dump c1 --runtime $RUNTIME -o c1.tar.zst
if $RUNTIME state c1 > /dev/null 2>&1; then exit 1; fi
checkpointctl inspect --ps-tree --stats c1.tar.zst > /shared/inspected-$RUNTIME
before=$(cat upper/count)
pageferry restore c1.tar.zst --bundle second --runtime $RUNTIME
until [ "$(cat second/rootfs/count)" -gt "$before" ]; do sleep 0.05; done
test ! -e second/rootfs/etc/old
test ! -e second/rootfs/dir/old
test ! -e second/rootfs/dir/kept/old
test -p second/rootfs/fifo
test second/rootfs/linked -ef second/rootfs/dir/kept/new
test -z "$(ls -A | grep unfinished)"
$RUNTIME kill c1 KILL
"#;

#[test]
fn containers_go_on_from_archives() {
    with_criu(Suite::Sid, archives);
}

fn archives(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
        return Ok(());
    };
    let mut pair = HostPair::new(test_dir, &system, criu, "shared")?;
    let dir = test_dir.path("shared");
    let mut config = testbed::runc::config("");
    config["process"]["args"] = json!(["/bin/sh", "-c", WORK]);
    fs::write(dir.join("config.json"), config.to_string())?;
    pair.machines[0].script("echo manage-cgroups=ignore > /etc/criu/crun.conf")?;
    for runtime in ["runc", "crun"] {
        pair.set("RUNTIME", runtime);
        let host = &pair.machines[0];
        host.script(START)?;
        host.script(MOVE).context(runtime)?;
        let text = fs::read_to_string(dir.join(format!("inspected-{runtime}")))?;
        for word in ["c1", runtime, "Podman", "busybox", "sh"] {
            ensure!(
                text.contains(word),
                "{word} is not in what checkpointctl says:\n{text}"
            );
        }
    }
    Ok(())
}

/// podman goes on with a container of its own that `pageferry dump` has written, twice; and `pageferry restore` with that
/// and with one that podman has written.
const PODMAN: &str = r#"
mkdir -p rootfs/bin rootfs/etc
cp /usr/bin/busybox rootfs/bin/
ln -s busybox rootfs/bin/sh
tar -C rootfs -c . | podman import - tiny > /dev/null
podman run -d --name c1 tiny /bin/sh -c \
    'echo new > /etc/new; i=0; while :; do i=$((i+1)); echo $i > /count; /bin/busybox sleep 0.1; done' > /dev/null
count() { podman exec $1 /bin/busybox cat /count; }
until [ -n "$(count c1)" ]; do sleep 0.1; done
id=$(podman inspect -f '{{.Id}}' c1)
pageferry dump $id --runtime crun --runtime-root /run/crun -o c1.tar.zst --leave-running
before=$(count c1)
podman rm -f -t 0 c1 > /dev/null
podman container restore --import c1.tar.zst > /dev/null
until [ "$(count c1)" -ge 1 ]; do sleep 0.1; done
[ "$(podman exec c1 /bin/busybox cat /etc/new)" = new ]
podman container restore --import c1.tar.zst --name again > /dev/null
until [ "$(count again)" -ge 1 ]; do sleep 0.1; done
podman rm -f -t 0 again > /dev/null
# Without podman, from the archive of `pageferry dump` and from one of podman's.
pageferry restore c1.tar.zst --bundle "$(bundle one)" --runtime crun
goes_on one c1
podman run -d --name c2 --hostname named tiny /bin/sh -c \
    'echo new > /etc/new; echo shared > /dev/shm/file; exec 5< /dev/shm/file;
    i=0; while :; do i=$((i+1)); echo $i > /count; /bin/busybox sleep 0.1; done' > /dev/null
until [ -n "$(count c2)" ]; do sleep 0.1; done
podman container checkpoint --export c2.tar.zst c2 > /dev/null
podman rm -f -t 0 c2 > /dev/null
pageferry restore c2.tar.zst --bundle "$(bundle two)" --runtime crun --name two
goes_on two two
[ "$(crun exec two /bin/busybox cat /dev/shm/file)" = shared ]
[ "$(crun exec two /bin/busybox cat /etc/hostname)" = named ]
crun exec two /bin/sh -c '[ -e /proc/1/fd/5 ]'
crun delete --force c1
crun delete --force two
# A bundle that lacks what the container has mounted.
mkdir shared
podman run -d --name c3 -v /root/shared:/shared tiny /bin/sh -c 'while :; do /bin/busybox sleep 0.1; done' > /dev/null
podman container checkpoint --export c3.tar.zst c3 > /dev/null
rmdir shared
if pageferry restore c3.tar.zst --bundle "$(bundle three)" --runtime crun 2> refused; then exit 1; fi
grep -q "/root/shared, a mount of the container, does not exist on this host" refused
"#;

/// A bundle with the image's files, and whether a container goes on in it.
const BUNDLES: &str = r#"
# podman gives the root of a container mode 0555, and CRIU expects what it has dumped.
bundle() { mkdir -p $1; cp -a rootfs $1/; chmod 555 $1/rootfs; echo $1; }
goes_on() {
    before=$(cat $1/rootfs/count)
    until [ "$(cat $1/rootfs/count)" -gt "$before" ]; do sleep 0.05; done
    [ "$(cat $1/rootfs/etc/new)" = new ]
    [ "$(crun state $2 | grep -c running)" -ge 1 ]
}
"#;

#[test]
fn podmans_archives_are_written_and_read() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
            return Ok(());
        };
        let pair = HostPair::new(test_dir, &system, criu, "podman")?;
        let host = &pair.machines[0];
        host.script("echo manage-cgroups=ignore > /etc/criu/crun.conf")?;
        host.script(&format!("export PATH=/criu:$PATH\n{BUNDLES}{PODMAN}"))
    });
}
