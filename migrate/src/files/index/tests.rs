use super::*;

fn hash(data: &[u8]) -> BlockHash {
    let mut hash = [0; 16];
    hash[0] = data.iter().fold(1, |sum, byte| sum ^ byte);
    BlockHash(hash)
}

fn make(path: &str, made: Made) -> Operation {
    let path = path.into();
    Operation::Make { path, made }
}

#[test]
fn operations_that_cannot_be_change_nothing() {
    let mut index = Index::empty();
    for operation in [make("d", Made::Directory), make("d/f", Made::File)] {
        index.apply(&operation, &hash).unwrap();
    }
    let path = |text: &str| text.as_bytes().to_vec();
    let bad = [
        make("d/f", Made::File),
        make("gone/f", Made::File),
        make("d/f/g", Made::File),
        make("../d", Made::Directory),
        make("", Made::Directory),
        Operation::Remove { path: path("d") },
        Operation::Remove { path: path("") },
        Operation::Park {
            path: path("d"),
            slot: 1,
        },
        Operation::Place {
            path: path("p"),
            slot: 1,
        },
        Operation::Link {
            from: path("d"),
            path: path("e"),
        },
        Operation::Size {
            path: path("d"),
            size: 1,
        },
        Operation::Size {
            path: path("d/f"),
            size: u64::MAX,
        },
        Operation::Data {
            path: path("d/f"),
            first: 0,
            data: vec![1],
        },
        Operation::Zeros {
            path: path("d/f"),
            first: u64::MAX,
            blocks: u64::MAX,
        },
    ];
    let before = format!("{:?}", (&index.names, &index.nodes));
    for operation in bad {
        index.apply(&operation, &hash).unwrap_err();
        assert_eq!(
            format!("{:?}", (&index.names, &index.nodes)),
            before,
            "{operation:?}"
        );
    }
}

#[test]
fn a_file_that_is_cut_within_a_block_has_an_unknown_one() {
    let mut index = Index::empty();
    let path = b"f".to_vec();
    let size = |size| Operation::Size {
        path: b"f".to_vec(),
        size,
    };
    index.apply(&make("f", Made::File), &hash).unwrap();
    index.apply(&size(2 * BLOCK_BYTES + 5), &hash).unwrap();
    assert_eq!(index.blocks(&path).unwrap(), [BlockHash::ZEROS; 3]);
    let data = Operation::Data {
        path: path.clone(),
        first: 1,
        data: vec![7; 16384 + 5],
    };
    index.apply(&data, &hash).unwrap();
    let whole = index.blocks(&path).unwrap()[1];
    index.apply(&size(2 * BLOCK_BYTES), &hash).unwrap();
    assert_eq!(index.blocks(&path).unwrap(), [BlockHash::ZEROS, whole]);
    index.apply(&size(BLOCK_BYTES + 1), &hash).unwrap();
    assert_eq!(
        index.blocks(&path).unwrap(),
        [BlockHash::ZEROS, BlockHash::UNKNOWN]
    );
    index.apply(&size(10), &hash).unwrap();
    assert_eq!(index.blocks(&path).unwrap(), [BlockHash::ZEROS]);
}
