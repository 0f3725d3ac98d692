//! A process that changes files all the time and knows what each of them must hold.
//!
//! It obeys what stands in the file `command` of its control directory, a number and a word: `pause`, `go`, `verify`. The
//! answer is in the file `answer-NUMBER`: `right`, or what is wrong.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use testbed::sys::{self, Backing, WINDOW};

/// Bytes of the file that is written through a mapping.
const MAPPED_BYTES: usize = 1 << 20;

/// Between two changes: some thousand in a second would leave no time for anybody else.
const PAUSE: Duration = Duration::from_micros(300);

/// Changes files.
#[derive(Parser)]
struct Args {
    /// Directory of the files; made anew.
    dir: PathBuf,
    /// Directory for commands and answers.
    control: PathBuf,
}

/// What a file must hold; several names may lead to it.
#[derive(Default)]
struct Known {
    bytes: Vec<u8>,
    mode: u32,
}

struct Writer {
    dir: PathBuf,
    /// A seed that is stepped on: xorshift.
    random: u64,
    names: BTreeMap<String, usize>,
    files: Vec<Known>,
    links: BTreeMap<String, String>,
    words: Vec<u64>,
    /// Held open all the time.
    log: File,
    log_bytes: Vec<u8>,
    /// Without a name.
    deleted: File,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut writer = Writer::new(&args.dir)?;
    let (mut done, mut is_paused) = (0, false);
    loop {
        let text = fs::read_to_string(args.control.join("command")).unwrap_or_default();
        if let Some((number, word)) = text.trim().split_once(' ')
            && let Ok(number) = number.parse::<u64>()
            && number > done
        {
            let answer = match word {
                "pause" => {
                    is_paused = true;
                    "right".to_owned()
                }
                "go" => {
                    is_paused = false;
                    "right".to_owned()
                }
                _ => writer
                    .verify()
                    .map_or_else(|error| format!("{error:#}"), |()| "right".to_owned()),
            };
            // Whole or absent.
            let part = args.control.join("part");
            fs::write(&part, answer)?;
            fs::rename(&part, args.control.join(format!("answer-{number}")))?;
            done = number;
        }
        if !is_paused {
            writer.change()?;
        }
        sleep(PAUSE);
    }
}

impl Writer {
    fn new(dir: &Path) -> Result<Writer> {
        fs::create_dir_all(dir)?;
        for number in 0..4 {
            fs::create_dir_all(dir.join(format!("d{number}")))?;
        }
        let open = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            options.open(dir.join(name))
        };
        let mapped = open("mapped")?;
        mapped.set_len(MAPPED_BYTES as u64)?;
        sys::map(
            WINDOW.start,
            MAPPED_BYTES,
            Backing::SharedFile(mapped.as_fd()),
        )?;
        let mut deleted = open("deleted")?;
        deleted.write_all(b"nobody finds this by a name")?;
        fs::remove_file(dir.join("deleted"))?;
        Ok(Writer {
            dir: dir.to_owned(),
            random: 0x9e37_79b9_7f4a_7c15,
            names: BTreeMap::new(),
            files: Vec::new(),
            links: BTreeMap::new(),
            words: vec![0; MAPPED_BYTES / sys::WORD_BYTES],
            log: open("log")?,
            log_bytes: Vec::new(),
            deleted,
        })
    }

    /// A number below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 20).unwrap_or(0) % limit
    }

    fn name(&mut self) -> String {
        format!("d{}/f{}", self.below(4), self.below(12))
    }

    /// One change, and one through the mapping.
    fn change(&mut self) -> Result<()> {
        let at = self.below(self.words.len());
        let word = self.random;
        sys::write_words(WINDOW.start + at * sys::WORD_BYTES, &[word]);
        self.words[at] = word;
        let line = format!("{word:x}\n").into_bytes();
        if self.below(8) == 0 {
            self.log.write_all(&line)?;
            self.log_bytes.extend(line);
        }
        let (name, other) = (self.name(), self.name());
        let path = self.dir.join(&name);
        let Some(&id) = self.names.get(&name) else {
            return self.make(&name);
        };
        match self.below(10) {
            0 => {
                fs::remove_file(&path)?;
                self.names.remove(&name);
            }
            1 if name != other && self.names.get(&other) != Some(&id) => {
                fs::rename(&path, self.dir.join(&other))?;
                self.names.remove(&name);
                self.names.insert(other, id);
            }
            2 if !self.names.contains_key(&other) => {
                fs::hard_link(&path, self.dir.join(&other))?;
                self.names.insert(other, id);
            }
            3 => {
                let length = self.below(60_000);
                File::options()
                    .write(true)
                    .open(&path)?
                    .set_len(length as u64)?;
                self.files[id].bytes.resize(length, 0);
            }
            4 => {
                let mode = 0o600 + u32::try_from(self.below(0o200))?;
                fs::set_permissions(&path, Permissions::from_mode(mode))?;
                self.files[id].mode = mode;
            }
            5 => {
                let link = format!("link{}", self.below(5));
                let at = self.dir.join(&link);
                if self.links.remove(&link).is_some() {
                    fs::remove_file(&at)?;
                }
                symlink(&name, at)?;
                self.links.insert(link, name);
            }
            _ => {
                let (start, length) = (self.below(60_000), self.below(5_000));
                let byte = u8::try_from(self.below(256))?;
                let file = File::options().write(true).open(&path)?;
                file.write_all_at(&vec![byte; length], start as u64)?;
                let bytes = &mut self.files[id].bytes;
                if length > 0 && bytes.len() < start + length {
                    bytes.resize(start + length, 0);
                }
                if length > 0 {
                    bytes[start..start + length].fill(byte);
                }
            }
        }
        Ok(())
    }

    fn make(&mut self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        let length = self.below(20_000);
        let mut bytes = vec![0; length];
        for byte in &mut bytes {
            *byte = u8::try_from(self.below(256))?;
        }
        fs::write(&path, &bytes)?;
        fs::set_permissions(&path, Permissions::from_mode(0o644))?;
        self.names.insert(name.to_owned(), self.files.len());
        self.files.push(Known { bytes, mode: 0o644 });
        Ok(())
    }

    /// Compares all files with what they must hold.
    fn verify(&mut self) -> Result<()> {
        let mut found = Vec::new();
        for number in 0..4 {
            for entry in fs::read_dir(self.dir.join(format!("d{number}")))? {
                let name = entry?.file_name().into_string();
                found.push(format!("d{number}/{}", name.unwrap_or_default()));
            }
        }
        found.sort();
        let wanted: Vec<String> = self.names.keys().cloned().collect();
        ensure!(found == wanted, "names: {found:?} instead of {wanted:?}");
        let mut inodes = BTreeMap::new();
        for (name, id) in &self.names {
            let path = self.dir.join(name);
            let known = &self.files[*id];
            let bytes = fs::read(&path)?;
            if bytes != known.bytes {
                let at = bytes.iter().zip(&known.bytes).position(|(a, b)| a != b);
                bail!(
                    "{name}: {} bytes instead of {}, the first difference is at {at:?}",
                    bytes.len(),
                    known.bytes.len()
                );
            }
            let meta = fs::metadata(&path)?;
            ensure!(
                meta.mode() & 0o7777 == known.mode,
                "{name}: {:o}",
                meta.mode()
            );
            let inode = *inodes.entry(*id).or_insert(meta.ino());
            ensure!(inode == meta.ino(), "{name} is not a hard link any more");
        }
        for (link, target) in &self.links {
            let found = fs::read_link(self.dir.join(link)).context(link.clone())?;
            ensure!(found == Path::new(target), "{link}: {}", found.display());
        }
        let mapped: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        ensure!(
            fs::read(self.dir.join("mapped"))? == mapped,
            "the mapped file"
        );
        for (at, word) in self.words.iter().enumerate() {
            let found = sys::read_word(WINDOW.start + at * sys::WORD_BYTES);
            ensure!(found == *word, "word {at} of the mapping");
        }
        ensure!(fs::read(self.dir.join("log"))? == self.log_bytes, "the log");
        let mut text = String::new();
        self.deleted.seek(SeekFrom::Start(0))?;
        self.deleted.read_to_string(&mut text)?;
        ensure!(
            text == "nobody finds this by a name",
            "the deleted file: {text:?}"
        );
        Ok(())
    }
}
