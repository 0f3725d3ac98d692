//! Hands out metrics over HTTP: `GET /metrics`, one client at a time, nothing else.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::limits::HTTP_REQUEST_BYTES_MAX;

/// How long a client may take to ask, and to take its answer: others wait for it.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long to wait when no client can be accepted: what is missing, mostly descriptors, is not there
/// sooner for being asked for again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Where metrics are handed out, before that begins.
#[derive(Debug)]
pub struct MetricsListener(TcpListener);

impl MetricsListener {
    /// Listens at `address`, `HOST:PORT`; without a host on all addresses.
    pub fn bind(address: &str) -> Result<MetricsListener> {
        let failed = |error: io::Error| {
            let text = format!("--metrics: cannot listen at {address}");
            Error::wrap(Kind::Usage, text, error)
        };
        let with_host = match address.strip_prefix(':') {
            Some(port) => format!("0.0.0.0:{port}"),
            None => address.to_owned(),
        };
        let addresses: Vec<SocketAddr> = with_host.to_socket_addrs().map_err(failed)?.collect();
        TcpListener::bind(addresses.as_slice())
            .map(MetricsListener)
            .map_err(failed)
    }

    /// Where it listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.0.local_addr().ok()
    }

    /// Answers what `render` says, in a thread of its own, as long as this process lives.
    pub fn serve(self, render: impl Fn() -> String + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name("metrics".to_owned());
        let started = thread.spawn(move || {
            for client in self.0.incoming() {
                match client {
                    // Clients come and go as they like; the next one asks anew.
                    Ok(client) => drop(answer(client, &render, TIMEOUT)),
                    Err(_) => std::thread::sleep(PAUSE),
                }
            }
        });
        let failed = |error| Error::wrap(Kind::Io, "cannot start the thread of --metrics", error);
        started.map(|_| ()).map_err(failed)
    }
}

fn answer(client: TcpStream, render: &impl Fn() -> String, timeout: Duration) -> io::Result<()> {
    let mut client = DeadlineStream {
        client,
        deadline: Instant::now() + timeout,
    };
    let (status, body) = match request_line(&mut client)?.as_str() {
        "GET /metrics" => ("200 OK", render()),
        _ => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    client.write_all((head + &body).as_bytes())
}

/// A client whose time is limited however it divides it up.
struct DeadlineStream {
    client: TcpStream,
    deadline: Instant,
}

impl DeadlineStream {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left),
        }
    }
}

impl Read for DeadlineStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.client.set_read_timeout(Some(self.left()?))?;
        self.client.read(out)
    }
}

impl Write for DeadlineStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.client.set_write_timeout(Some(self.left()?))?;
        self.client.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.client.flush()
    }
}

/// Reads a whole request and returns its method and path.
fn request_line(client: &mut impl Read) -> io::Result<String> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut piece = [0; 512];
        let bytes = client.read(&mut piece)?;
        if bytes == 0 || request.len() + bytes > HTTP_REQUEST_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        request.extend_from_slice(&piece[..bytes]);
    }
    let text = String::from_utf8_lossy(&request);
    let mut words = text.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    Ok(format!("{method} {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request).unwrap();
        let mut answer = String::new();
        // A server that refuses may reset the connection.
        let _ = client.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn metrics_are_at_their_path_and_nothing_else_is_anywhere() {
        let listener = MetricsListener::bind("127.0.0.1:0").unwrap();
        let address = listener.address().unwrap();
        listener.serve(|| "pages 7\n".to_owned()).unwrap();
        let good = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\npages 7\n"));
        for bad in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"POST /metrics HTTP/1.1\r\n\r\n",
            b"\r\n\r\n",
        ] {
            assert!(ask(address, bad).starts_with("HTTP/1.1 404"));
        }
        assert_eq!(ask(address, &[b'x'; HTTP_REQUEST_BYTES_MAX + 1]), "");
        assert!(MetricsListener::bind("nowhere").is_err());
    }

    #[test]
    fn a_client_that_takes_its_time_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // All of a request but its end.
        client.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let error = answer(accepted, &String::new, Duration::from_millis(20)).unwrap_err();
        let late = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(late.contains(&error.kind()), "{error}");

        // However much is there: the time counts, and not whether something comes within it.
        client.write_all(b"Host: x\r\n\r\n").unwrap();
        let mut limited = DeadlineStream {
            client,
            deadline: Instant::now(),
        };
        for error in [
            limited.read(&mut [0; 8]).unwrap_err(),
            limited.write(b"x").unwrap_err(),
        ] {
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
    }
}
