//! Documents and recordings that others wrote: rules, OCI layouts, logs of what clients told a service.

use std::fs;

use arbitrary::{Arbitrary, Unstructured};
use pageferry::limits::WATCH_RULES_MAX;
use pageferry::replay::{Entry, Header, ReadEntry, decode, encode};
use pageferry_cli::fuzzing::{read_log, rules as count_rules, take_base};
use serde_json::{Value, json};

use crate::{byte, canary, scratch, take};

/// A file of rules.
pub(crate) fn rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match count_rules(text) {
        Ok(count) => {
            assert!((1..=WATCH_RULES_MAX).contains(&count));
            // The seeds' names have one letter.
            let named = text.split("name = \"").nth(1);
            let name = named.and_then(|rest| rest.split('"').next());
            canary(name.is_some_and(|name| name.len() > 1));
        }
        Err(mistake) => assert!(!mistake.is_empty()),
    }
}

/// Rules of each kind.
pub(crate) fn rule_seeds() -> Vec<Vec<u8>> {
    [
        "[[rule]]\nname = \"a\"\nwhen.load = { above = 8.0, clear = 6.5 }\nfor = \"5s\"\naction.exec.command = \"true\"\n",
        "[[rule]]\nname = \"b\"\nwhen.free-disk = { path = \"/var\", below = \"1G\" }\naction.stop = { unit = \"u\" }\n",
        "[[rule]]\nname = \"c\"\nwhen.psi = { resource = \"io\", stall = \"1ms\", window = \"1s\" }\ncool-down = \"1m\"\n\
         action.restart = { cgroup = \"/x\", start = \"y\" }\n",
        "[[rule]]\nname = \"d\"\nwhen.command.word = \"go\"\naction.migrate.args = [\"--to\", \"h\"]\n",
        "[[rule]]\nname = \"f\"\nwhen.command.word = \"on\"\naction.exec.command = \"x\"\n\
         [[rule]]\nname = \"g\"\nwhen.command.word = \"off\"\naction.exec.command = \"y\"\n",
        "[[rule]]\nname = \"e\"\nwhen.file.path = \"/x\"\naction.pause.cgroup = \"/c\"\ntarget = \"t\"\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// A layer of a layout, and what is wrong with it.
#[derive(Arbitrary, Debug)]
struct Layer {
    content: [u8; 4],
    wrong: u8,
}

/// An OCI layout: an index, a manifest, a configuration, layers.
#[derive(Arbitrary, Debug)]
struct Image {
    layers: Vec<Layer>,
    wrong: u8,
    /// Bytes of the index, the manifest or the configuration that are something else.
    damage: Option<(u8, u16, u8)>,
    /// A document that stands in place of one of them.
    instead: Option<(u8, Vec<u8>)>,
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn descriptor(kind: &str, bytes: &[u8], wrong: u8) -> Value {
    let length = bytes.len() as u64;
    let (digest, size) = match wrong % 10 {
        1 => (format!("sha256:{}", digest(b"other")), length),
        2 => (format!("sha256:{}", digest(bytes)), u64::MAX),
        3 => (format!("sha256:../../{}", digest(bytes)), length),
        4 => (format!("sha512:{}", digest(bytes).repeat(2)), length),
        5 => (format!("sha256:{}", digest(bytes)), length / 2),
        _ => (format!("sha256:{}", digest(bytes)), length),
    };
    json!({"mediaType": kind, "digest": digest, "size": size})
}

/// An OCI layout that an export builds on: what is taken over has the digests that the index leads to.
pub(crate) fn oci_layout(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(image) = Image::arbitrary(&mut input) else {
        return;
    };
    let place = scratch::directory();
    let dir = place.path().join("base");
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory is made");
    let put = |bytes: &[u8]| fs::write(blobs.join(digest(bytes)), bytes).expect("a blob");
    let mut layers = Vec::new();
    for layer in image.layers.iter().take(10) {
        put(&layer.content);
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        layers.push(descriptor(kind, &layer.content, layer.wrong));
    }
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
    let config = document(&image, 0, &config);
    let config_at = descriptor(
        "application/vnd.oci.image.config.v1+json",
        &config,
        image.wrong / 10,
    );
    let manifest = json!({"schemaVersion": 2, "config": config_at, "layers": layers});
    let manifest = document(&image, 1, &manifest);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let index =
        json!({"schemaVersion": 2, "manifests": [descriptor(kind, &manifest, image.wrong)]});
    put(&config);
    put(&manifest);
    fs::write(dir.join("index.json"), document(&image, 2, &index)).expect("a file is written");
    let to = place.path().join("to");
    let taken = take_base(&dir, &to);
    for entry in fs::read_dir(to.join("blobs/sha256")).into_iter().flatten() {
        let path = entry.expect("it is read").path();
        let bytes = fs::read(&path).expect("it is read");
        let is_its_digest = path.ends_with(digest(&bytes));
        assert!(
            is_its_digest || path.ends_with(".unfinished"),
            "{}",
            path.display()
        );
    }
    canary(taken.is_ok_and(|count| count > 2));
}

/// The text of a document: 0 the configuration, 1 the manifest, 2 the index.
fn document(image: &Image, number: u8, honest: &Value) -> Vec<u8> {
    if let Some((_, text)) = image
        .instead
        .as_ref()
        .filter(|(which, _)| which % 3 == number)
    {
        return text.clone();
    }
    let mut text = serde_json::to_vec(honest).expect("a document");
    if let Some((_, at, with)) = image.damage.filter(|(which, ..)| which % 3 == number) {
        let length = text.len();
        text[usize::from(at) % length] = with;
    }
    text
}

/// Layouts with one layer, and with others.
pub(crate) fn layout_seeds() -> Vec<Vec<u8>> {
    let of = |step: u8| {
        let byte = |number: u8| number.wrapping_mul(step) & 0xf7;
        (0..64).map(byte).collect()
    };
    let layer = |number: u8| [1, number, 2, 3, 4, 0];
    // Three layers, and nothing wrong.
    let honest = [layer(1), layer(2), layer(3), [0; 6]].concat();
    let mut seeds: Vec<_> = [0, 1, 6, 10, 41].into_iter().map(of).collect();
    seeds.push(honest);
    seeds
}

/// Entries as bytes: the kind, the connection, and what else it has.
fn entry(data: &mut &[u8]) -> Entry {
    let [kind, connection, one, two] = take(data);
    let connection = match connection {
        255 => u32::MAX,
        number => u32::from(number % 5),
    };
    let bytes = |data: &mut &[u8]| {
        let (bytes, rest) = data.split_at(data.len().min(usize::from(one % 16)));
        *data = rest;
        bytes.to_vec()
    };
    match kind % 10 {
        0 | 1 => Entry::Open { connection },
        2 => Entry::Piece {
            connection,
            bytes: bytes(data),
        },
        3 => Entry::Answers {
            connection,
            total: match two {
                255 => u64::MAX,
                number => u64::from(number),
            },
            checksum: u32::from(two),
            head: bytes(data),
        },
        4 => Entry::Settled,
        5 => Entry::Finish { connection },
        6 => Entry::Ended { connection },
        7 => Entry::Restart,
        8 => Entry::FileEnd,
        _ => Entry::End {
            digest: (one % 2 == 1).then(|| bytes(data)),
        },
    }
}

/// A log of one or two files: bytes as they are, or entries whose checksums hold.
pub(crate) fn service_log(mut data: &[u8]) {
    let place = scratch::directory();
    let mode = byte(&mut data);
    let header = |file: u32, first: u64| {
        let header = Header {
            file,
            connections: 0,
            first,
            wait_us: 1000,
        };
        header.encode().to_vec()
    };
    let mut files = vec![header(1, 0)];
    let mut count = 0;
    if mode.is_multiple_of(4) {
        files[0].extend_from_slice(data);
        if let ReadEntry::Whole(entry, length) = decode(data) {
            let mut again = Vec::new();
            encode(&entry, &mut again);
            assert!(again.len() <= length, "no more is written than was read");
        }
    } else {
        while !data.is_empty() {
            let entry = entry(&mut data);
            let file = files.last_mut().expect("there is one");
            encode(&entry, file);
            count += 1;
            if entry == Entry::FileEnd && files.len() < 4 {
                // What comes next need not be what was announced.
                let first = if mode & 4 == 0 {
                    count
                } else {
                    u64::from(mode)
                };
                files.push(header(u32::try_from(files.len()).expect("few") + 1, first));
            }
        }
        if mode & 8 != 0 {
            let last = files.last_mut().expect("there is one");
            last.pop();
        }
    }
    let mut bytes = 0;
    for (number, file) in (1..).zip(&files) {
        bytes += file.len() as u64;
        let path = place.path().join(format!("log-{number:06}"));
        fs::write(path, file).expect("a file is written");
    }
    if let Ok((entries, position)) = read_log(place.path()) {
        assert!(position <= bytes, "it ends within its files");
        canary(entries > 4 && files.len() > 1);
    }
}

/// Logs with connections, pieces, answers, and a second file.
pub(crate) fn log_seeds() -> Vec<Vec<u8>> {
    let honest = [
        [1, 1, 0, 0].as_slice(),
        &[2, 1, 3, 0, 7, 7, 7],
        &[3, 1, 2, 2, 9, 9],
        &[4, 0, 0, 0],
        &[5, 1, 0, 0],
        &[8, 0, 0, 0],
        &[6, 1, 0, 0],
        &[9, 0, 1, 0, 5],
    ]
    .concat();
    let mut raw = vec![0];
    encode(&Entry::Open { connection: 1 }, &mut raw);
    vec![
        raw,
        [&[1], &honest[..20]].concat(),
        [&[1], honest.as_slice()].concat(),
        [&[9], honest.as_slice()].concat(),
        [&[7], honest.as_slice()].concat(),
    ]
}
