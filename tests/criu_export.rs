//! `pageferry export`: what umoci, skopeo and podman unpack is what the overlay showed, byte for byte, with everything
//! that files have beside contents.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use serde_json::Value;
use testbed::criu::{Criu, Suite};
use testbed::documents::HostPair;
use testbed::process::run;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{debian, gate, workspace};

#[test]
fn tools_unpack_what_the_overlay_showed() {
    with_criu(Suite::Sid, |test_dir, criu| {
        unpacked_by_tools(test_dir, criu, "")
    });
}

#[test]
fn tools_unpack_what_an_overlay_with_user_attributes_showed() {
    with_criu(Suite::Sid, |test_dir, criu| {
        unpacked_by_tools(test_dir, criu, "userxattr,")
    });
}

/// Contents of what was renamed, or given other permissions, stay in the layers below.
#[test]
fn tools_unpack_what_an_overlay_with_redirects_showed() {
    with_criu(Suite::Sid, |test_dir, criu| {
        unpacked_by_tools(test_dir, criu, REDIRECTS)
    });
}

#[test]
fn containers_are_exported_while_they_run() {
    with_criu(Suite::Sid, running_containers);
}

/// Options of an overlay that keeps contents in the layers below where it can.
const REDIRECTS: &str = "redirect_dir=on,metacopy=on,";

/// A file's attributes and contents; equal descriptions are equal files.
#[derive(PartialEq, Eq, Debug)]
struct Described {
    kind: String,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same file.
    same_as: PathBuf,
    contents: Contents,
}

/// Bytes of a file, or a link's target.
#[derive(PartialEq, Eq)]
struct Contents(Vec<u8>);

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// All files of a tree, but for sockets.
fn describe(root: &Path) -> Result<BTreeMap<PathBuf, Described>> {
    let (mut found, mut first) = (BTreeMap::new(), BTreeMap::new());
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let at = root.join(&path);
        let meta = fs::symlink_metadata(&at).with_context(|| at.display().to_string())?;
        if meta.is_dir() {
            let names = fs::read_dir(&at)?.map(|entry| Ok(path.join(entry?.file_name())));
            let mut names = names.collect::<Result<Vec<_>>>()?;
            names.sort();
            left.extend(names.into_iter().rev());
        }
        if meta.file_type().is_socket() {
            continue;
        }
        let contents = match meta.file_type() {
            kind if kind.is_file() => fs::read(&at)?,
            kind if kind.is_symlink() => fs::read_link(&at)?.as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let mut xattrs = BTreeMap::new();
        for name in xattr::list(&at)? {
            let value = xattr::get(&at, &name)?.unwrap_or_default();
            xattrs.insert(name.as_bytes().to_vec(), value);
        }
        let key = (meta.dev(), meta.ino());
        let same_as = match meta.is_dir() {
            true => path.clone(),
            false => first.entry(key).or_insert_with(|| path.clone()).clone(),
        };
        let described = Described {
            kind: format!("{:o} {:x}", meta.mode(), meta.rdev()),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            xattrs,
            same_as,
            contents: Contents(contents),
        };
        found.insert(path, described);
    }
    Ok(found)
}

fn expect_same(what: &str, root: &Path, wanted: &BTreeMap<PathBuf, Described>) -> Result<()> {
    let found = describe(root)?;
    let mut wrong = String::new();
    for (path, wanted) in wanted {
        let found = found.get(path);
        if found != Some(wanted) {
            let path = path.display();
            wrong += &format!("{path:.60}\nwanted {wanted:.80?}\nfound {found:.80?}\n");
        }
    }
    let mut more = found.keys().filter(|path| !wanted.contains_key(*path));
    ensure!(wrong.is_empty(), "{what}: {wrong}");
    ensure!(more.next().is_none(), "{what} has more: {found:?}");
    Ok(())
}

/// A file system in memory at `dir`, seen by this thread and what it starts.
fn in_memory(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), none)?;
    Ok(())
}

fn mount_overlay(dir: &Path, options: &str) -> Result<()> {
    for part in ["upper", "work", "merged"] {
        fs::create_dir_all(dir.join(part))?;
    }
    let dirs = format!(
        "{options}lowerdir={0}/lower2:{0}/lower1,upperdir={0}/upper,workdir={0}/work",
        dir.display()
    );
    let overlay = Some("overlay");
    mount(
        overlay,
        &dir.join("merged"),
        overlay,
        MsFlags::empty(),
        Some(&*dirs),
    )
    .context("overlay")
}

/// What lies below: directories to be replaced, files to be deleted or changed.
fn fill_lower(dir: &Path) -> Result<()> {
    for path in ["replaced/inner", "kept/deep", "gone/with", "moved/deep"] {
        fs::create_dir_all(dir.join("lower1").join(path))?;
    }
    for path in [
        "replaced/old",
        "replaced/inner/old",
        "kept/deleted",
        "kept/deep/stays",
        "gone/with/all",
        "top",
        "moved/deep/file",
    ] {
        fs::write(dir.join("lower1").join(path), format!("first {path}"))?;
    }
    fs::write(dir.join("lower1/kept/large"), vec![7; 300_000])?;
    fs::create_dir_all(dir.join("lower2/kept"))?;
    fs::write(dir.join("lower2/kept/second"), "of the second layer")?;
    // A layer below hides files of the one below it.
    let whiteout = dir.join("lower2/kept/deleted_in_second");
    fs::write(dir.join("lower1/kept/deleted_in_second"), "first")?;
    mknod(&whiteout, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?;
    Ok(())
}

/// The value of `security.capability` (version 2) with CAP_NET_BIND_SERVICE.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Changes everything that can be changed.
fn change(root: &Path) -> Result<()> {
    fs::remove_file(root.join("kept/deleted"))?;
    fs::remove_dir_all(root.join("gone"))?;
    fs::remove_dir_all(root.join("replaced"))?;
    fs::create_dir_all(root.join("replaced/new"))?;
    fs::write(root.join("replaced/new/file"), "new")?;
    let mut large = OpenOptions::new()
        .write(true)
        .open(root.join("kept/large"))?;
    large.seek(SeekFrom::Start(1000))?;
    large.write_all(b"changed")?;
    fs::set_permissions(root.join("top"), fs::Permissions::from_mode(0o6751))?;

    fs::write(root.join("first name"), "linked")?;
    fs::hard_link(root.join("first name"), root.join("kept/second name"))?;
    fs::hard_link(root.join("first name"), root.join("a name before"))?;
    symlink("/nowhere//../x", root.join("link"))?;
    symlink("t".repeat(300), root.join("long link"))?;
    lchown(root.join("link"), Some(5), Some(6))?;
    mkfifo(&root.join("fifo"), Mode::from_bits_truncate(0o640))?;
    mknod(
        &root.join("null"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )?;
    mknod(
        &root.join("disk"),
        SFlag::S_IFBLK,
        Mode::from_bits_truncate(0o600),
        makedev(259, 300),
    )?;
    drop(UnixListener::bind(root.join("socket"))?);

    let sparse = File::create(root.join("sparse"))?;
    sparse.set_len(4 << 20)?;
    sparse.write_all_at(b"in the middle", 2 << 20)?;

    fs::write(root.join(OsStr::from_bytes(b"not \xff\xfe UTF-8")), "bytes")?;
    fs::write(root.join(OsStr::from_bytes(&[b'l'; 255])), "long")?;
    let deep = root.join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep)?;
    fs::write(
        deep.join(OsStr::from_bytes(&[0xfd; 120])),
        "long and not UTF-8",
    )?;

    let marked = root.join("marked");
    fs::write(&marked, "attributes")?;
    chown(&marked, Some(70_000), Some(3_000_000))?;
    xattr::set(&marked, "security.capability", &CAPABILITY)?;
    xattr::set(&marked, "user.bytes", b"\0=\n\xff")?;
    xattr::set(root.join("kept"), "user.directory", b"value")?;
    for (path, time) in [
        (
            "marked",
            SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789),
        ),
        (
            "sparse",
            SystemTime::UNIX_EPOCH - Duration::new(5, 500_000_000),
        ),
        (
            "kept/deep",
            SystemTime::UNIX_EPOCH + Duration::new(9_200_000_000, 1),
        ),
    ] {
        let file = File::open(root.join(path))?;
        file.set_times(FileTimes::new().set_modified(time))?;
    }
    Ok(())
}

/// Exports the overlay into an image layout in the same directory.
fn export(dir: &Path, more: &[&OsStr], (name, compress): (&str, &str)) -> Result<Value> {
    let [upper, lower1, lower2, output] =
        ["upper", "lower1", "lower2", name].map(|part| dir.join(part));
    let mut command = Command::new(workspace::binary("pageferry")?);
    command.args(["export", "--json", "--compress", compress]);
    command.arg("--upper").arg(upper);
    command
        .arg("--lower")
        .arg(lower2)
        .arg("--lower")
        .arg(lower1);
    command.arg("-o").arg(output).args(more);
    let report = serde_json::from_slice(&run(&mut command)?.stdout)?;
    testbed::schema::expect("export-report", &report)?;
    Ok(report)
}

/// Renames a directory, of which the overlay keeps nothing but its old place.
fn rename(dir: &Path, merged: &Path) -> Result<()> {
    fs::rename(merged.join("moved"), merged.join("renamed"))?;
    fs::write(merged.join("renamed/deep/added"), "later")?;
    let has = |path: &str, mark: &str| xattr::get(dir.join("upper").join(path), mark);
    let redirect = has("renamed", "trusted.overlay.redirect")?;
    let metacopy = has("top", "trusted.overlay.metacopy")?;
    ensure!(
        redirect.is_some() && metacopy.is_some(),
        "this kernel keeps no contents below"
    );
    Ok(())
}

fn unpacked_by_tools(test_dir: &TestDir, criu: &Criu, options: &str) -> Result<()> {
    let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
        return Ok(());
    };
    let dir = test_dir.path("shared");
    in_memory(&dir)?;
    fill_lower(&dir)?;
    mount_overlay(&dir, options)?;
    let merged = dir.join("merged");
    change(&merged)?;
    let mut more = Vec::new();
    if options == REDIRECTS {
        rename(&dir, &merged)?;
        more.extend([OsStr::new("--merged"), merged.as_os_str()]);
    }
    let wanted = describe(&merged)?;
    let report = export(&dir, &more, ("image", "gzip"))?;
    let layer = &report["layer"];
    let length = |field: &str| layer[field].as_array().map_or(0, Vec::len);
    let is_right = layer["sockets"][0] == "/socket"
        && layer["sparse"][0] == "/sparse"
        && layer["hard_links"] == 2
        && layer["opaque"].as_u64() > Some(0)
        && (length("from_mount") > 0) == (options == REDIRECTS);
    ensure!(is_right, "{report}");
    let again = export(&dir, &more, ("again", "gzip"))?;
    ensure!(
        again["images"] == report["images"],
        "another image of the same tree"
    );
    export(&dir, &more, ("zstd", "zstd"))?;
    export(&dir, &more, ("plain", "none"))?;
    let pair = HostPair::new(test_dir, &system, criu, "shared")?;
    read_back(&pair, &dir, wanted)
}

/// Unpacks the images with each tool.
fn read_back(pair: &HostPair, dir: &Path, mut wanted: BTreeMap<PathBuf, Described>) -> Result<()> {
    let host = &pair.machines[0];
    for name in ["image", "zstd", "plain"] {
        host.script(&format!(
            "umoci unpack --image /shared/{name}:template /shared/umoci-{name}"
        ))?;
        expect_same("umoci", &dir.join(format!("umoci-{name}/rootfs")), &wanted)?;
    }
    host.script(
        "echo '{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}' > /tmp/policy.json\n\
         skopeo --policy /tmp/policy.json copy oci:/shared/image:template oci:/shared/copied:template\n\
         umoci unpack --image /shared/copied:template /shared/skopeo",
    )?;
    expect_same("skopeo", &dir.join("skopeo/rootfs"), &wanted)?;
    let mounted = host.output(
        "podman() { command podman --root /shared/podman --runroot /tmp/run --storage-driver vfs \"$@\"; }\n\
         podman pull --quiet --signature-policy /tmp/policy.json oci:/shared/image:template > id\n\
         podman image mount $(cat id)",
    )?;
    let mounted = Path::new(&mounted)
        .strip_prefix("/shared")
        .context("podman's storage")?;
    // podman makes the root directory itself, and its time is that of the unpacking. Times before 1970 become 1970.
    let root = dir.join(mounted);
    let found = fs::metadata(&root)?;
    for (path, described) in &mut wanted {
        if path.as_os_str().is_empty() {
            described.mtime = (found.mtime(), found.mtime_nsec());
        } else if described.mtime.0 < 0 {
            described.mtime = (0, 0);
        }
    }
    expect_same("podman", &root, &wanted)
}

/// A bundle whose root is an overlay, and a container that deletes a file and keeps another open that it has deleted.
const RUN: &str = r#"
cd /shared/$RUNTIME
mkdir -p lower/bin lower/etc upper work rootfs
cp /usr/bin/busybox lower/bin/
ln -s busybox lower/bin/sh
echo old > lower/etc/old
mount -t overlay overlay -o "lowerdir=$PWD/lower,upperdir=$PWD/upper,workdir=$PWD/work" rootfs
$RUNTIME run -d --bundle $PWD c1 < /dev/null > /dev/null 2>&1
until [ -e upper/ready ]; do sleep 0.05; done
pageferry export c1 --runtime $RUNTIME --pause -o image --report report.json
$RUNTIME state c1 > state.json
pageferry export c1 --runtime $RUNTIME -o based --base image:template
$RUNTIME kill c1 KILL
umoci unpack --image image:template unpacked
umoci unpack --image based:template based-unpacked
"#;

/// What the container does.
const WORK: &str = "exec 3>/gone; echo open >&3; busybox rm /gone /etc/old; echo new > /etc/new; \
                    echo > /ready; while :; do busybox sleep 1000; done";

fn running_containers(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(system) = gate::need("a system with runtimes", debian::runtimes()) else {
        return Ok(());
    };
    let dir = test_dir.path("shared");
    in_memory(&dir)?;
    let mut pair = HostPair::new(test_dir, &system, criu, "shared")?;
    for runtime in ["runc", "crun"] {
        let dir = dir.join(runtime);
        fs::create_dir_all(&dir)?;
        let mut config = testbed::runc::config("");
        config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", WORK]);
        fs::write(dir.join("config.json"), config.to_string())?;
        pair.set("RUNTIME", runtime);
        pair.machines[0].script(RUN)?;
        let read = |name: &str| -> Result<Value> {
            Ok(serde_json::from_slice(&fs::read(dir.join(name))?)?)
        };
        ensure!(
            read("state.json")?["status"] == "running",
            "it does not run any more"
        );
        let report = read("report.json")?;
        let deleted = &report["deleted"][0];
        ensure!(
            deleted["path"] == "/gone" && deleted["fd"] == 3 && deleted["bytes"] == 5,
            "{report}"
        );
        for unpacked in ["unpacked", "based-unpacked"] {
            let root = dir.join(unpacked).join("rootfs");
            ensure!(!root.join("etc/old").exists() && !root.join("gone").exists());
            let mut text = String::new();
            File::open(root.join("etc/new"))?.read_to_string(&mut text)?;
            ensure!(text == "new\n" && root.join("bin/busybox").is_file());
        }
        let config = read("unpacked/config.json")?;
        ensure!(config["process"]["args"][0] == "/bin/sh", "{config}");
    }
    Ok(())
}
