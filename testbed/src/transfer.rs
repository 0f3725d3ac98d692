//! Copies the files of a directory from one host to the other, over the link between them: what an
//! operator does with scp or rsync for the images that are not memory.
//!
//! ```text
//!   for each file:  u32 length of the name, name, u64 length, content        then the end
//! ```

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::net::TwoHosts;
use crate::wait::{self, GENEROUS};

/// Longest file name that is taken.
const NAME_BYTES_MAX: u32 = 255;

/// What was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Copied {
    /// Files.
    pub files: u64,
    /// Their content, bytes.
    pub bytes: u64,
}

/// Copies the files of the directory `from` on the source to `to` on the destination.
///
/// # Errors
/// A file or the connection fails.
pub fn copy_files(hosts: &TwoHosts, from: &Path, to: &Path) -> Result<Copied> {
    let (tell_address, address) = mpsc::channel();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            hosts.destination.net.enter(|| {
                let listener = TcpListener::bind(hosts.destination.at(0))?;
                tell_address.send(listener.local_addr()?)?;
                listener.set_nonblocking(true)?;
                let stream = wait::until("the sender", GENEROUS, || match listener.accept() {
                    Ok((stream, _)) => Ok(Some(stream)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
                    Err(error) => Err(error.into()),
                })?;
                stream.set_nonblocking(false)?;
                receive(BufReader::new(stream), to)
            })
        });
        let sent = match address.recv() {
            Ok(address) => hosts
                .source
                .net
                .enter(|| send(TcpStream::connect(address)?, from)),
            Err(_) => Err(anyhow::anyhow!("the receiver did not come up")),
        };
        let received = receiver
            .join()
            .unwrap_or_else(|_| bail!("the receiver panicked"));
        let copied = received.with_context(|| format!("receiving into {}", to.display()))?;
        sent.with_context(|| format!("sending {}", from.display()))?;
        Ok(copied)
    })
}

fn send(stream: TcpStream, from: &Path) -> Result<()> {
    let mut stream = BufWriter::new(stream);
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if !entry.file_type()?.is_file() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut file = File::open(entry.path())?;
        let bytes = file.metadata()?.len();
        stream.write_all(&u32::try_from(name.len())?.to_le_bytes())?;
        stream.write_all(name.as_bytes())?;
        stream.write_all(&bytes.to_le_bytes())?;
        let sent = io::copy(&mut (&mut file).take(bytes), &mut stream)?;
        ensure!(sent == bytes, "{name} has become shorter");
    }
    Ok(stream.flush()?)
}

fn receive(mut stream: impl Read, to: &Path) -> Result<Copied> {
    fs::create_dir_all(to)?;
    let mut copied = Copied::default();
    loop {
        let mut length = [0; 4];
        if stream.read(&mut length[..1])? == 0 {
            return Ok(copied);
        }
        stream.read_exact(&mut length[1..])?;
        let length = u32::from_le_bytes(length);
        ensure!(length <= NAME_BYTES_MAX, "a name of {length} bytes");
        let mut name = vec![0; length as usize];
        stream.read_exact(&mut name)?;
        let name = String::from_utf8(name)?;
        ensure!(!name.contains('/'), "{name} leads out of the directory");
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes)?;
        let bytes = u64::from_le_bytes(bytes);
        let mut file = File::create(to.join(&name))?;
        let got = io::copy(&mut (&mut stream).take(bytes), &mut file)?;
        ensure!(got == bytes, "{name} was cut short");
        copied.files += 1;
        copied.bytes += bytes;
    }
}
