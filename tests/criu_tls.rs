//! TLS with a real CRIU, which uses GnuTLS, at the other end.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::pki::{Authority, Credentials, Host};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::process::Spawned;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(
    a_dump_is_received,
    our_client_fetches_from_the_dump,
    our_client_fetches_from_criu_page_server,
    criu_client_fetches_from_our_page_server,
    our_client_fetches_from_our_page_server,
    a_bad_dumper_is_refused,
    a_server_of_another_name_is_refused,
    our_refused_client_says_why,
    one_side_without_tls_is_told,
);

const MIB: u32 = 64;

fn authority(test_dir: &TestDir) -> Result<Authority> {
    let dir = test_dir.path("pki");
    fs::create_dir_all(&dir)?;
    Authority::new(&dir, "ca")
}

fn loopback(test_dir: &TestDir) -> Result<Credentials> {
    authority(test_dir)?.issue(&Host::LOOPBACK)
}

fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

fn a_dump_is_received(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let tls = loopback(test_dir)?.options();
    let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB / 2, 3), None)?;
    let images = test_dir.path("images");
    let server = PageServer::receiving(Make::Ours, &Options::new(&images).with(&strs(&tls)))?;
    let dump = Dump::new(criu, load.pid(), &images).to(server.address());
    dump.with(&strs(&tls)).run()?;
    server.finish(GENEROUS)?;
    load.wait_until_gone()?;
    let _restored = Restore::new(criu, &images).run()?;
    load.expect_first_memory().map(drop)
}

/// A post-copy whose processes read everything at random while it is on its way.
fn fetch(test_dir: &TestDir, criu: &Criu, source: Source<'_>, client: Make<'_>) -> Result<()> {
    let tls = loopback(test_dir)?.options();
    let plan = Plan::new(criu, source, client).with(&tls).over(slow_link());
    let load = LoadSpec::mixed(test_dir.path("load"), MIB);
    let mut moved = PostCopy::start(test_dir, &plan, load, &reading())?;
    moved.reports()?;
    moved.finish()
}

fn our_client_fetches_from_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    fetch(test_dir, criu, Source::Dump, Make::Ours)
}

fn our_client_fetches_from_criu_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    fetch(
        test_dir,
        criu,
        Source::PageServer(Make::Criu(criu)),
        Make::Ours,
    )
}

fn criu_client_fetches_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    fetch(
        test_dir,
        criu,
        Source::PageServer(Make::Ours),
        Make::Criu(criu),
    )
}

fn our_client_fetches_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    fetch(test_dir, criu, Source::PageServer(Make::Ours), Make::Ours)
}

fn log_of(process: &Spawned) -> Result<String> {
    let path = process.log().context("it has no log")?;
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn expect(log: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(log.contains(word), "{word:?} is not in the log:\n{log}");
    }
    Ok(())
}

/// A dump with `dumper`'s certificate into a server of ours with `server`'s, which fails: what the two
/// logs say. The process lives on.
fn refused_dump(
    test_dir: &TestDir,
    criu: &Criu,
    load: &mut Load,
    dumper: &[String],
    server: &[String],
) -> Result<(String, String)> {
    let options = Options::new(test_dir.path("images")).with(&strs(server));
    let mut server = PageServer::receiving(Make::Ours, &options)?;
    let dump = Dump::new(criu, load.pid(), test_dir.path("dump")).to(server.address());
    let mut dump = dump.with(&strs(dumper)).start()?;
    // CRIU 4.1.1 and 4.2.1 are killed by their C library (double free) when a handshake fails.
    let ended = dump.wait(GENEROUS)?;
    ensure!(!ended.status.success(), "the dump succeeded");
    server.process().fail(GENEROUS)?;
    load.expect_running()?;
    Ok((log_of(&dump)?, log_of(server.process())?))
}

fn a_bad_dumper_is_refused(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let authority = authority(test_dir)?;
    let other = Authority::new(&test_dir.path("pki"), "foreign-ca")?;
    let good = authority.issue(&Host::LOOPBACK)?;
    let of = |name, serial| Host {
        name,
        serial,
        ..Host::LOOPBACK
    };
    let expired = authority.issue(&Host {
        expired: true,
        ..of("expired", 8)
    })?;
    let revoked = authority.issue(&of("revoked", 9))?;
    let foreign = Credentials {
        cacert: authority.cacert(),
        ..other.issue(&of("foreign", 10))?
    };
    let list = authority.revoke(&[9], 2099)?.display().to_string();
    let mut server = good.options();
    server.extend(["--tls-cacrl".to_owned(), list]);
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 4), None)?;
    let cases = [
        (&expired, ["CN=expired", "has expired"]),
        (&revoked, ["CN=revoked", "was revoked"]),
        (&foreign, ["CN=foreign", "--tls-cacert"]),
    ];
    for (dumper, words) in cases {
        let (theirs, ours) = refused_dump(test_dir, criu, &mut load, &dumper.options(), &server)?;
        expect(&ours, &words)?;
        expect(&theirs, &["tls: "])?;
    }
    Ok(())
}

fn a_server_of_another_name_is_refused(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let authority = authority(test_dir)?;
    let good = authority.issue(&Host::LOOPBACK)?;
    let elsewhere = authority.issue(&Host {
        name: "elsewhere",
        alternative_names: &["elsewhere.example"],
        ..Host::LOOPBACK
    })?;
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 4), None)?;
    let (theirs, _) = refused_dump(
        test_dir,
        criu,
        &mut load,
        &good.options(),
        &elsewhere.options(),
    )?;
    expect(&theirs, &["tls: Invalid certificate"])?;

    // CRIU serves with that certificate, and asks it of its client as well: it is told not to.
    let mut server = elsewhere.options();
    server.push("--tls-no-cn-verify".to_owned());
    let (images, log) = lazy_dump_refuses(test_dir, criu, &mut load, &server, &good.options())?;
    expect(&log, &["CN=elsewhere", "is not for 127.0.0.1"])?;

    // So told, our client takes it too.
    fs::remove_dir_all(images)?;
    let mut client = good.options();
    client.push("--tls-no-cn-verify".to_owned());
    let plan = Plan::new(criu, Source::Dump, Make::Ours);
    let plan = Plan {
        client_options: client,
        source_options: server,
        ..plan
    };
    let load = LoadSpec::mixed(test_dir.path("second-load"), 4);
    let mut moved = PostCopy::start(test_dir, &plan, load, &reading())?;
    moved.reports()?;
    moved.finish()
}

/// A client of ours that cannot fetch from a lazy dump: the images and the client's log. The process
/// lives on.
fn lazy_dump_refuses(
    test_dir: &TestDir,
    criu: &Criu,
    load: &mut Load,
    server: &[String],
    client: &[String],
) -> Result<(PathBuf, String)> {
    let images = test_dir.path("lazy");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
    let dump = Dump::new(criu, load.pid(), &images).with(&strs(server));
    let mut dump = dump.serve_lazily(address)?;
    let log = failed_client(&images, client, address)?;
    dump.fail(GENEROUS)?;
    load.expect_running()?;
    Ok((images, log))
}

/// The log of a lazy-client that comes to nothing.
fn failed_client(images: &Path, options: &[String], source: SocketAddr) -> Result<String> {
    let log = images.join("lazy.log");
    let options = Options::new(images).with(&strs(options)).log_to("lazy.log");
    match LazyDaemon::start(Make::Ours, &options, Some(source)) {
        Ok(mut daemon) => drop(daemon.process().fail(GENEROUS)?),
        Err(_) => ensure!(log.exists(), "lazy-client did not even begin"),
    }
    Ok(fs::read_to_string(log)?)
}

fn our_refused_client_says_why(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let authority = authority(test_dir)?;
    let other = Authority::new(&test_dir.path("pki"), "foreign-ca")?;
    let good = authority.issue(&Host::LOOPBACK)?.options();
    let foreign = Host {
        name: "foreign",
        ..Host::LOOPBACK
    };
    let foreign = Credentials {
        cacert: authority.cacert(),
        ..other.issue(&foreign)?
    };
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 4), None)?;
    let (_, log) = lazy_dump_refuses(test_dir, criu, &mut load, &good, &foreign.options())?;
    expect(&log, &["CN=foreign", "refuse our certificate"])
}

fn one_side_without_tls_is_told(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let tls = loopback(test_dir)?.options();
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), 4), None)?;
    for (dumper, server) in [(&tls[..], &[][..]), (&[][..], &tls[..])] {
        let (_, ours) = refused_dump(test_dir, criu, &mut load, dumper, server)?;
        expect(&ours, &["--tls"])?;
    }
    Ok(())
}
