//! A slow download from nginx, over one connection.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::client::{ServiceClient, connect, send};
use crate::net::NetNs;

/// Length of the file, words of 8 bytes.
const WORDS: u64 = 6 << 20;

/// Words that a client reads at a time.
const PIECE_WORDS: u64 = 8 << 10;

/// A master and a worker. Logs go nowhere: files that grow differ between hosts.
const SETTINGS: &str = "daemon off; master_process on; worker_processes 1; user root;\n\
    pid /tmp/nginx.pid; error_log /dev/null;\n\
    events { worker_connections 64; }\n\
    http { access_log off; server { listen PORT; root /shared/www;\n\
    location / { limit_rate 6m; } } }\n";

pub(super) fn prepare(shared: &Path, port: u16) -> Result<String> {
    let www = shared.join("www");
    fs::create_dir_all(&www)?;
    let mut file = BufWriter::new(File::create(www.join("file"))?);
    for number in 0..WORDS {
        file.write_all(&word(number).to_le_bytes())?;
    }
    file.flush()?;
    let settings = SETTINGS.replace("PORT", &port.to_string());
    fs::write(shared.join("nginx.conf"), settings)?;
    Ok(
        "mkdir -p /var/lib/nginx; exec setsid nginx -c /shared/nginx.conf -e /dev/null -p /tmp"
            .to_owned(),
    )
}

pub(super) fn talks(net: &NetNs, at: SocketAddr) -> Result<Vec<Box<dyn ServiceClient>>> {
    let mut stream = connect(net, at)?;
    let question = "GET /file HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n";
    send(&mut stream, question.as_bytes())?;
    let mut headers = String::new();
    while !headers.ends_with("\r\n\r\n") {
        ensure!(
            stream.read_line(&mut headers)? > 0,
            "no headers: {headers:?}"
        );
    }
    let length = format!("Content-Length: {}\r\n", WORDS * 8);
    ensure!(
        headers.starts_with("HTTP/1.1 200 ") && headers.contains(&length),
        "{headers}"
    );
    Ok(vec![Box::new(Download {
        stream,
        received: 0,
    })])
}

/// The file's content at a word: no two are equal, so that each is told apart from all others.
fn word(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// One client.
struct Download {
    stream: BufReader<TcpStream>,
    /// Words.
    received: u64,
}

impl ServiceClient for Download {
    fn ask(&mut self) -> Result<bool> {
        let mut piece = vec![0; usize::try_from(PIECE_WORDS * 8)?];
        self.stream
            .read_exact(&mut piece)
            .with_context(|| format!("at byte {}", self.received * 8))?;
        for (bytes, number) in piece.chunks_exact(8).zip(self.received..) {
            ensure!(
                bytes == word(number).to_le_bytes(),
                "byte {} is wrong",
                number * 8
            );
        }
        self.received += PIECE_WORDS;
        Ok(self.received < WORDS)
    }

    fn finish(&mut self) -> Result<()> {
        while self.received < WORDS {
            self.ask()?;
        }
        let mut more = Vec::new();
        self.stream.read_to_end(&mut more)?;
        ensure!(more.is_empty(), "{} bytes too much", more.len());
        Ok(())
    }
}
