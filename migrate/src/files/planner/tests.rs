use fastrand::Rng;

use super::super::attributes::Attributes;
use super::super::index::blocks_of;
use super::super::path::joined;
use super::super::table::digest;
use super::*;

fn attributes(rng: &mut Rng) -> Option<Arc<Attributes>> {
    Some(Arc::new(Attributes {
        mode: rng.u32(..0o777),
        mtime: (rng.i64(..4), 0),
        ..Attributes::default()
    }))
}

fn file(rng: &mut Rng) -> Kind {
    let size = rng.u64(..100_000);
    let hash = |_| BlockHash([rng.u8(..3); 16]);
    Kind::File(size, Arc::new((0..blocks_of(size)).map(hash).collect()))
}

/// Some names of a few, so that two trees have much in common.
fn tree(rng: &mut Rng) -> Index {
    let mut index = Index::empty();
    let mut dirs = vec![Vec::new()];
    let mut files = Vec::new();
    for _ in 0..rng.usize(..30) {
        let dir = rng.choice(&dirs).cloned().unwrap_or_default();
        let path = joined(&dir, &[b'a' + rng.u8(..5)]);
        if index.id(&path).is_some() {
            continue;
        }
        let kind = match rng.u8(..10) {
            0..3 => Kind::Directory,
            3..7 => file(rng),
            7 => Kind::Symlink(vec![b'0' + rng.u8(..2)]),
            8 => Kind::CharDevice(rng.u64(..2)),
            _ => {
                if let Some(id) = rng.choice(&files) {
                    index.add_name(path, *id);
                }
                continue;
            }
        };
        let is_directory = kind.is_directory();
        let attributes = attributes(rng);
        let id = index.add(path.clone(), kind, attributes);
        match is_directory {
            true => dirs.push(path),
            false => files.push(id),
        }
    }
    let root = index.id(b"").unwrap();
    let kind = Kind::Directory;
    let attributes = attributes(rng);
    index.add_as(root, Vec::new(), Node { kind, attributes });
    index
}

/// Gives files other names, as a container does between two looks.
fn renamed(index: &Index, rng: &mut Rng) -> Index {
    let mut other = Index::empty();
    let mut names: Vec<(Vec<u8>, Id)> = Vec::new();
    for (path, id) in index.names() {
        let is_file = index
            .node(id)
            .is_some_and(|node| matches!(node.kind, Kind::File(..)));
        let to = match is_file && rng.bool() {
            true => [path, &[b'a' + rng.u8(..5)]].concat(),
            false => path.to_vec(),
        };
        match names.iter().any(|(name, _)| *name == to) {
            true => names.push((path.to_vec(), id)),
            false => names.push((to, id)),
        }
    }
    names.sort();
    names.dedup_by(|a, b| a.0 == b.0);
    for (path, id) in names {
        if let Some(node) = index.node(id) {
            other.add_as(id, path, node.clone());
        }
    }
    other
}

fn carried_out(have: &Index, want: &Index, before: Option<&Index>) -> (Index, Vec<Step>) {
    let mut state = have.clone();
    let steps = plan(have, want, before).unwrap();
    for step in &steps {
        match step {
            Step::Do(operation) => {
                assert!(!matches!(operation, Operation::Data { .. }));
                state.apply(operation, &|_| BlockHash::UNKNOWN).unwrap();
            }
            Step::Send {
                path,
                first,
                blocks,
            } => {
                let at = usize::try_from(*first).unwrap();
                let end = at + usize::try_from(*blocks).unwrap();
                let hashes = &want.blocks(path).unwrap()[at..end];
                state.set_blocks(path, *first, hashes).unwrap();
            }
        }
    }
    (state, steps)
}

#[test]
fn any_tree_becomes_any_other() {
    for seed in 0..3_000 {
        let mut rng = Rng::with_seed(seed);
        let (have, want) = (tree(&mut rng), tree(&mut rng));
        let before = rng.bool().then(|| renamed(&want, &mut rng));
        let (state, _) = carried_out(&have, &want, before.as_ref());
        assert_eq!(digest(&state), digest(&want), "seed {seed}");
        assert!(state.is_same(&want), "seed {seed}");
        assert_eq!(have.is_same(&want), digest(&have) == digest(&want));
        let (_, steps) = carried_out(&state, &want, None);
        assert_eq!(steps, [], "seed {seed}");
    }
}

#[test]
fn a_plan_that_was_cut_is_made_up_by_the_next() {
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let (have, want) = (tree(&mut rng), tree(&mut rng));
        let steps = plan(&have, &want, None).unwrap();
        let mut state = have;
        for step in steps.iter().take(rng.usize(..=steps.len())) {
            if let Step::Do(operation) = step {
                state.apply(operation, &|_| BlockHash::UNKNOWN).unwrap();
            }
        }
        let (state, _) = carried_out(&state, &want, None);
        assert_eq!(digest(&state), digest(&want), "seed {seed}");
    }
}

#[test]
fn contents_of_renamed_files_do_not_travel() {
    let mut moved = 0;
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let before = tree(&mut rng);
        let want = renamed(&before, &mut rng);
        let (state, steps) = carried_out(&before, &want, Some(&before));
        assert_eq!(digest(&state), digest(&want), "seed {seed}");
        let is_park = |step: &&Step| matches!(step, Step::Do(Operation::Park { .. }));
        moved += steps.iter().filter(is_park).count();
        let sends = |step: &Step| matches!(step, Step::Send { .. });
        assert!(!steps.iter().any(sends), "seed {seed}: {steps:?}");
    }
    assert!(moved > 100, "{moved}");
}
