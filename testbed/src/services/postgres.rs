//! A PostgreSQL: clients insert rows, one by one and in a transaction that is open over the move, and count them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::client::ServiceClient;
use crate::net::NetNs;
use crate::process::run;
use crate::wait::{self, GENEROUS};

/// Clients that insert row by row.
const WRITERS: u64 = 3;

/// Rows of the table before anybody writes, each of about 200 bytes.
const FIRST_ROWS: u64 = 40_000;

/// Rows that the transaction adds at a time.
const BATCH: u64 = 100;

/// The capability without which CRIU cannot ask for the limits of processes of other users (prlimit), as a bit of
/// /proc/self/status.
const CAP_SYS_RESOURCE: u32 = 24;

/// A library that tells PostgreSQL, which refuses to be root, that it is somebody else.
const ANOTHER_USER: &str =
    "unsigned geteuid(void) { return 70; }\nunsigned getuid(void) { return 70; }\n";

/// Writes what it needs into `shared`, and tells the shell's commands that become it.
///
/// PostgreSQL makes a System V segment, which CRIU dumps in an IPC namespace of its own alone. What it maps from
/// /dev/shm would have to be at the destination: here it lies beside the data.
pub(super) fn prepare(shared: &Path, port: u16) -> Result<String> {
    let user = match has_capability()? {
        true => "setpriv --reuid=70 --regid=70 --clear-groups".to_owned(),
        false => another_user(shared)?,
    };
    Ok(format!(
        "bin=$(echo /usr/lib/postgresql/*/bin)\n\
         as='{user}'\n\
         mkdir -p /shared/pg/data; chown 70:70 /shared/pg /shared/pg/data; chmod 700 /shared/pg/data; cd /tmp\n\
         $as $bin/initdb -D /shared/pg/data -U service -A trust -E UTF8 --locale=C --no-sync >&2\n\
         cat >> /shared/pg/data/postgresql.conf <<END\n\
         listen_addresses = '*'\n\
         port = {port}\n\
         unix_socket_directories = ''\n\
         dynamic_shared_memory_type = mmap\n\
         shared_buffers = 48MB\n\
         logging_collector = off\n\
         END\n\
         echo 'host all all 10.213.8.0/24 trust' >> /shared/pg/data/pg_hba.conf\n\
         exec 2> /dev/null\n\
         exec setsid unshare --ipc $as $bin/postgres -D /shared/pg/data"
    ))
}

/// Whether this process, which is root, may do what CRIU does to processes of other users.
fn has_capability() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = u64::from_str_radix(line.context("no CapEff")?.trim(), 16)?;
    Ok(bits >> CAP_SYS_RESOURCE & 1 == 1)
}

/// Builds the library, and tells what starts a program with it.
fn another_user(shared: &Path) -> Result<String> {
    let (source, library) = (shared.join("user.c"), shared.join("user.so"));
    fs::write(&source, ANOTHER_USER)?;
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-nostdlib", "-o"]);
    run(compile.arg(&library).arg(&source))?;
    Ok("env LD_PRELOAD=/shared/user.so".to_owned())
}

pub(super) fn talks(
    net: &NetNs,
    at: SocketAddr,
    system: &Path,
) -> Result<Vec<Box<dyn ServiceClient>>> {
    let mut first = Psql::connect(net, at, system)?;
    first.ask(
        "create table rows(writer int, number bigint, filler text, primary key(writer, number))",
    )?;
    first.ask(&format!(
        "insert into rows select 0, n, repeat(md5(n::text), 6) from generate_series(1, {FIRST_ROWS}) n"
    ))?;
    let mut talks: Vec<Box<dyn ServiceClient>> = Vec::new();
    for writer in 1..=WRITERS {
        talks.push(Box::new(Writer {
            psql: Psql::connect(net, at, system)?,
            writer,
            rows: 0,
        }));
    }
    first.ask("begin")?;
    talks.push(Box::new(Transaction {
        psql: first,
        reader: Psql::connect(net, at, system)?,
        rows: 0,
    }));
    Ok(talks)
}

/// PostgreSQL's own client, with one connection.
struct Psql {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Psql {
    fn connect(net: &NetNs, at: SocketAddr, system: &Path) -> Result<Psql> {
        let bin = fs::read_dir(system.join("usr/lib/postgresql"))?;
        let version = bin.flatten().next().context("no PostgreSQL")?.file_name();
        let psql = format!("/usr/lib/postgresql/{}/bin/psql", version.to_string_lossy());
        let target = format!(
            "host={} port={} user=service dbname=postgres connect_timeout=60",
            at.ip(),
            at.port()
        );
        let command = || {
            let mut command = net.command("chroot");
            // No error waits for ever.
            command
                .arg(system)
                .args(["timeout", "300", &psql, "-X", "-q", "-A", "-t"]);
            command.args(["-v", "ON_ERROR_STOP=1", "-d", &target]);
            command
        };
        wait::until("PostgreSQL to listen", GENEROUS, || {
            Ok(run(command().args(["-c", "select 1"])).ok())
        })?;
        let mut child = command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let questions = child.stdin.take().context("psql's input")?;
        let answers = BufReader::new(child.stdout.take().context("psql's output")?);
        Ok(Psql {
            child,
            questions,
            answers,
        })
    }

    /// Runs a statement that returns nothing, and waits for its end.
    fn ask(&mut self, statement: &str) -> Result<()> {
        let said = self.select(&format!("{statement};\nselect 'done'"))?;
        ensure!(said == "done", "{statement}: {said:?}");
        Ok(())
    }

    /// The line that a query answers.
    fn select(&mut self, query: &str) -> Result<String> {
        writeln!(self.questions, "{query};").with_context(|| query.to_owned())?;
        self.questions.flush()?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "psql has ended: {query}");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Psql {
    fn drop(&mut self) {
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            eprintln!("ending psql: {error}");
        }
    }
}

/// Inserts row by row, each committed when it is answered.
struct Writer {
    psql: Psql,
    writer: u64,
    rows: u64,
}

impl ServiceClient for Writer {
    fn ask(&mut self) -> Result<bool> {
        self.rows += 1;
        let (writer, row) = (self.writer, self.rows);
        let insert = format!(
            "insert into rows values ({writer}, {row}, repeat(md5('{row}'), 6)) returning number"
        );
        let said = self.psql.select(&insert)?;
        ensure!(said == row.to_string(), "row {row} was answered by {said}");
        Ok(true)
    }

    fn finish(&mut self) -> Result<()> {
        expect_rows(&mut self.psql, self.writer, self.rows)
    }
}

/// Inserts in one transaction, which ends at the end; nobody else sees its rows before.
struct Transaction {
    psql: Psql,
    reader: Psql,
    rows: u64,
}

/// The number that stands for the transaction's rows.
const TRANSACTION: u64 = 99;

impl ServiceClient for Transaction {
    fn ask(&mut self) -> Result<bool> {
        let (first, last) = (self.rows + 1, self.rows + BATCH);
        self.psql.ask(&format!(
            "insert into rows select {TRANSACTION}, n, repeat(md5(n::text), 6) \
             from generate_series({first}, {last}) n"
        ))?;
        self.rows = last;
        let count = format!("select count(*) from rows where writer = {TRANSACTION}");
        let (inside, outside) = (self.psql.select(&count)?, self.reader.select(&count)?);
        ensure!(
            inside == last.to_string() && outside == "0",
            "{inside} rows inside of the transaction, {outside} outside, of {last}"
        );
        Ok(true)
    }

    fn finish(&mut self) -> Result<()> {
        self.psql.ask("commit")?;
        expect_rows(&mut self.reader, TRANSACTION, self.rows)?;
        expect_rows(&mut self.reader, 0, FIRST_ROWS)
    }
}

/// All rows of a writer are there, once, with their contents.
fn expect_rows(psql: &mut Psql, writer: u64, rows: u64) -> Result<()> {
    let said = psql.select(&format!(
        "select count(*), count(distinct number), coalesce(sum(number), 0), \
         count(*) filter (where filler <> repeat(md5(number::text), 6)) from rows where writer = {writer}"
    ))?;
    let wanted = format!("{rows}|{rows}|{}|0", rows * (rows + 1) / 2);
    ensure!(
        said == wanted,
        "rows of writer {writer}: {said}, not {wanted}"
    );
    Ok(())
}
