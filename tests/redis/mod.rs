//! Redis of Debian's, and a client that asks it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use testbed::debian::{self, Suite};
use testbed::wait::GENEROUS;

/// Redis, and what asks it.
pub(crate) struct Programs {
    pub(crate) server: PathBuf,
    pub(crate) client: PathBuf,
}

impl Programs {
    /// Fetched, unless they are here.
    pub(crate) fn fetched() -> Result<Programs> {
        let of = |program: &str| debian::program(Suite::Trixie, "redis-server", program);
        Ok(Programs {
            server: of("bin/redis-server")?,
            client: of("bin/redis-cli")?,
        })
    }
}

/// One client's connection.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(crate) fn connect(port: u16) -> Result<Client> {
        Client::of(TcpStream::connect(("127.0.0.1", port))?)
    }

    /// Connects from the network in which this is called.
    #[allow(dead_code, reason = "one of the tests has other networks")]
    pub(crate) fn connect_to(at: SocketAddr) -> Result<Client> {
        Client::of(TcpStream::connect(at)?)
    }

    fn of(stream: TcpStream) -> Result<Client> {
        stream.set_read_timeout(Some(GENEROUS))?;
        stream.set_nodelay(true)?;
        Ok(Client {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a command, and reads the answer: its values, one after another.
    pub(crate) fn ask(&mut self, command: &str) -> Result<Vec<String>> {
        self.send(command)?;
        let mut values = Vec::new();
        self.answer(&mut values)?;
        Ok(values)
    }

    /// Sends a command, and reads no answer.
    pub(crate) fn send(&mut self, command: &str) -> Result<()> {
        let line = format!("{command}\r\n");
        Ok(self.stream.get_mut().write_all(line.as_bytes())?)
    }

    fn answer(&mut self, values: &mut Vec<String>) -> Result<()> {
        let mut line = String::new();
        ensure!(
            self.stream.read_line(&mut line)? > 0,
            "the connection has ended"
        );
        let line = line.trim_end();
        let (kind, rest) = line.split_at(1);
        match kind {
            "+" | ":" => values.push(rest.to_owned()),
            "$" => {
                let length: usize = rest.parse()?;
                let mut bytes = vec![0; length + 2];
                self.stream.read_exact(&mut bytes)?;
                values.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
            }
            "*" => {
                for _ in 0..rest.parse::<usize>()? {
                    self.answer(values)?;
                }
            }
            _ => bail!("{line}"),
        }
        Ok(())
    }
}

/// The command that tells the state.
pub(crate) fn digest(programs: &Programs) -> String {
    let client = programs.client.display();
    format!("'{client}' -h $PAGEFERRY_HOST -p $PAGEFERRY_PORT debug digest")
}
