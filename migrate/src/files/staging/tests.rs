use super::*;

const STRICT: Permitted = Permitted {
    replace: false,
    unused: true,
};

fn arrived(staging: &StagingDir, permitted: Permitted, contents: &str) -> Installed {
    staging.prepare("m-1", permitted).unwrap();
    fs::write(staging.tree().join("file"), contents).unwrap();
    let installed = staging.installed().unwrap();
    staging.install().unwrap();
    installed
}

fn contents(staging: &StagingDir) -> String {
    fs::read_to_string(staging.target.join("file")).unwrap_or_default()
}

#[test]
fn a_tree_is_there_whole_or_not_at_all() {
    let tmp = tempfile::tempdir().unwrap();
    let staging = StagingDir::of(&tmp.path().join("a/rootfs"));
    let installed = arrived(&staging, STRICT, "new");
    assert_eq!(contents(&staging), "new");
    staging.give_up(Some(&installed), false).unwrap();
    assert!(!staging.target.exists() && !staging.dir.exists());
    // Before it was installed there is nothing to be taken back.
    assert!(!staging.prepare("m-1", STRICT).unwrap());
    let planned = staging.installed().unwrap();
    staging.give_up(Some(&planned), true).unwrap();
    assert!(!staging.target.exists() && staging.prepare("m-2", STRICT).unwrap());
}

#[test]
fn what_a_migration_did_not_make_is_not_replaced_without_a_word() {
    let tmp = tempfile::tempdir().unwrap();
    let staging = StagingDir::of(&tmp.path().join("data"));
    fs::create_dir(&staging.target).unwrap();
    assert_eq!(staging.problem(STRICT), None, "it is empty");
    fs::write(staging.target.join("file"), "precious").unwrap();
    assert!(staging.problem(STRICT).unwrap().contains("--files replace"));
    staging.prepare("m-1", STRICT).unwrap_err();
    let replace = Permitted {
        replace: true,
        ..STRICT
    };
    let installed = arrived(&staging, replace, "new");
    assert_eq!(contents(&staging), "new");
    staging.give_up(Some(&installed), false).unwrap();
    assert_eq!(contents(&staging), "precious");
    arrived(&staging, replace, "new");
    staging.settle("m-1").unwrap();
    assert_eq!(contents(&staging), "new");
    assert!(!staging.tree().exists());
}

#[test]
fn what_moved_away_is_where_the_next_tree_begins() {
    let tmp = tempfile::tempdir().unwrap();
    let staging = StagingDir::of(&tmp.path().join("data"));
    fs::create_dir(&staging.target).unwrap();
    fs::write(staging.target.join("file"), "old").unwrap();
    staging.moved_away("m-1").unwrap();
    assert!(staging.prepare("m-2", STRICT).unwrap());
    assert!(!staging.target.exists());
    staging.install().unwrap();
    staging.settle("m-2").unwrap();
    // In use: only who knows better may have it.
    let used = Permitted {
        unused: false,
        ..STRICT
    };
    assert!(staging.problem(used).is_some() && staging.problem(STRICT).is_none());
}

#[test]
fn links_and_files_are_in_the_way() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", tmp.path().join("link")).unwrap();
    fs::write(tmp.path().join("file"), "").unwrap();
    for name in ["link", "file"] {
        let problem = StagingDir::of(&tmp.path().join(name))
            .problem(STRICT)
            .unwrap();
        assert!(problem.contains("not a directory"), "{problem}");
    }
    assert!(is_mount_point(Path::new("/proc")) && !is_mount_point(tmp.path()));
}
