//! The committed corpora, and the seeds that they began with, by the plain compiler.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use fuzz_targets::TARGETS;

#[test]
fn no_committed_input_breaks_a_promise() {
    for target in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        let mut inputs = 0;
        for entry in fs::read_dir(&corpus).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            (target.run)(&fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{} has a corpus", target.name);
    }
}

#[test]
fn no_seed_breaks_a_promise() {
    let broken: Vec<&str> = TARGETS
        .iter()
        .filter(|target| std::thread::spawn(|| seeds_of(target)).join().is_err())
        .map(|target| target.name)
        .collect();
    assert!(broken.is_empty(), "{broken:?}");
}

fn seeds_of(target: &fuzz_targets::Target) {
    for (number, seed) in (target.seeds)().iter().enumerate() {
        println!("{} {number}", target.name);
        (target.run)(seed);
        // What is cut short, and what a bit of noise has been through.
        for cut in 0..seed.len().min(200) {
            (target.run)(&seed[..cut]);
            let mut noisy = seed.clone();
            noisy[cut] ^= 0x91;
            (target.run)(&noisy);
        }
    }
}

#[test]
fn each_corpus_has_a_target() {
    let mut found: Vec<String> = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    names.sort_unstable();
    assert_eq!(found, names);
}

/// What a corpus begins with.
#[test]
#[ignore = "writes into the source tree: cargo test -p fuzz-targets -- --ignored"]
fn seeds_are_written_into_the_corpora() {
    for target in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        fs::create_dir_all(&corpus).unwrap();
        for (number, seed) in (target.seeds)().iter().enumerate() {
            let short = &seed[..seed.len().min(8 << 10)];
            fs::write(corpus.join(format!("seed-{number}")), short).unwrap();
        }
    }
}
