use super::*;

const STRICT: Permitted = Permitted {
    replace: false,
    unused: true,
};

fn arrived(stage: &Stage, permitted: Permitted, contents: &str) -> Installed {
    stage.prepare("m-1", permitted).unwrap();
    fs::write(stage.tree().join("file"), contents).unwrap();
    let installed = stage.installed().unwrap();
    stage.install().unwrap();
    installed
}

fn contents(stage: &Stage) -> String {
    fs::read_to_string(stage.target.join("file")).unwrap_or_default()
}

#[test]
fn a_tree_is_there_whole_or_not_at_all() {
    let tmp = tempfile::tempdir().unwrap();
    let stage = Stage::of(&tmp.path().join("a/rootfs"));
    let installed = arrived(&stage, STRICT, "new");
    assert_eq!(contents(&stage), "new");
    stage.give_up(Some(&installed), false).unwrap();
    assert!(!stage.target.exists() && !stage.dir.exists());
    // Before it was installed there is nothing to be taken back.
    assert!(!stage.prepare("m-1", STRICT).unwrap());
    let planned = stage.installed().unwrap();
    stage.give_up(Some(&planned), true).unwrap();
    assert!(!stage.target.exists() && stage.prepare("m-2", STRICT).unwrap());
}

#[test]
fn what_a_migration_did_not_make_is_not_replaced_without_a_word() {
    let tmp = tempfile::tempdir().unwrap();
    let stage = Stage::of(&tmp.path().join("data"));
    fs::create_dir(&stage.target).unwrap();
    assert_eq!(stage.problem(STRICT), None, "it is empty");
    fs::write(stage.target.join("file"), "precious").unwrap();
    assert!(stage.problem(STRICT).unwrap().contains("--files replace"));
    stage.prepare("m-1", STRICT).unwrap_err();
    let replace = Permitted {
        replace: true,
        ..STRICT
    };
    let installed = arrived(&stage, replace, "new");
    assert_eq!(contents(&stage), "new");
    stage.give_up(Some(&installed), false).unwrap();
    assert_eq!(contents(&stage), "precious");
    arrived(&stage, replace, "new");
    stage.settle("m-1").unwrap();
    assert_eq!(contents(&stage), "new");
    assert!(!stage.tree().exists());
}

#[test]
fn what_moved_away_is_where_the_next_tree_begins() {
    let tmp = tempfile::tempdir().unwrap();
    let stage = Stage::of(&tmp.path().join("data"));
    fs::create_dir(&stage.target).unwrap();
    fs::write(stage.target.join("file"), "old").unwrap();
    stage.moved_away("m-1").unwrap();
    assert!(stage.prepare("m-2", STRICT).unwrap());
    assert!(!stage.target.exists());
    stage.install().unwrap();
    stage.settle("m-2").unwrap();
    // In use: only who knows better may have it.
    let used = Permitted {
        unused: false,
        ..STRICT
    };
    assert!(stage.problem(used).is_some() && stage.problem(STRICT).is_none());
}

#[test]
fn links_and_files_are_in_the_way() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", tmp.path().join("link")).unwrap();
    fs::write(tmp.path().join("file"), "").unwrap();
    for name in ["link", "file"] {
        let problem = Stage::of(&tmp.path().join(name)).problem(STRICT).unwrap();
        assert!(problem.contains("no directory"), "{problem}");
    }
    assert!(is_mount_point(Path::new("/proc")) && !is_mount_point(tmp.path()));
}
