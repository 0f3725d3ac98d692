//! An element of a map of nftables, by which packets of new connections find their destination.
//!
//! ```text
//! nft:FAMILY/TABLE/MAP/KEY=OLD->NEW      nft:inet/nat/services/80=10.0.0.1:8080->10.0.0.2:8080
//! ```
//!
//! Both changes, the old element off and the new one on, are one transaction: each packet sees one or the other. A
//! connection that is there keeps the destination of its first packet (conntrack).

use std::fmt;
use std::process::Stdio;
use std::str::FromStr;

use pageferry::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Families of tables whose rules can rewrite destinations.
const FAMILIES: [&str; 3] = ["ip", "ip6", "inet"];

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct NftMap {
    family: String,
    table: String,
    map: String,
    /// As nft writes it: parts with dots between them.
    key: String,
    old: String,
    new: String,
}

/// Where the element leads at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leads {
    Here,
    There,
    /// There is no element.
    Nowhere,
    Elsewhere,
}

/// What gives an element back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Undo {
    Nothing,
    Replace,
    Add,
    /// Somebody else has changed it: it is theirs.
    Refuse,
}

impl Leads {
    fn undo(self) -> Undo {
        match self {
            Leads::Here => Undo::Nothing,
            Leads::There => Undo::Replace,
            Leads::Nowhere => Undo::Add,
            Leads::Elsewhere => Undo::Refuse,
        }
    }
}

/// Whether a word can be a name of nft's: a command line or a script would read others as something else.
fn is_name(text: &str) -> bool {
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    begins
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
}

/// A key or a destination as nft writes it. `ADDR:PORT` becomes two parts.
fn element(text: &str) -> Option<String> {
    let pair = |address: &str, port: &str| {
        let port: u16 = port.parse().ok()?;
        let address: std::net::IpAddr = address.parse().ok()?;
        Some(format!("{address} . {port}"))
    };
    if let Some((address, port)) = text
        .strip_prefix('[')
        .and_then(|text| text.split_once("]:"))
    {
        return pair(address, port);
    }
    if let Some((address, port)) = text.split_once(':')
        && let Some(both) = pair(address, port)
    {
        return Some(both);
    }
    let parts: Vec<&str> = text.split(" . ").map(str::trim).collect();
    let plain = |part: &&str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-.:/".contains(c))
            && !part.starts_with('-')
    };
    parts.iter().all(plain).then(|| parts.join(" . "))
}

impl FromStr for NftMap {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<NftMap, String> {
        let wrong = || {
            format!(
                "{text:?} is not an element of a map: FAMILY/TABLE/MAP/KEY=OLD->NEW, as \
                 inet/nat/services/80=10.0.0.1:8080->10.0.0.2:8080"
            )
        };
        let mut parts = text.splitn(4, '/');
        let mut next = || parts.next().ok_or_else(wrong);
        let (family, table, map, rest) = (next()?, next()?, next()?, next()?);
        let (key, both) = rest.split_once('=').ok_or_else(wrong)?;
        let (old, new) = both.split_once("->").ok_or_else(wrong)?;
        let element = |text: &str| element(text).ok_or_else(wrong);
        let route = NftMap {
            family: family.to_owned(),
            table: table.to_owned(),
            map: map.to_owned(),
            key: element(key)?,
            old: element(old)?,
            new: element(new)?,
        };
        let named = is_name(table) && is_name(map) && FAMILIES.contains(&family);
        match named && route.old != route.new {
            true => Ok(route),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for NftMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NftMap {
            family,
            table,
            map,
            key,
            old,
            new,
        } = self;
        write!(f, "{family}/{table}/{map}/{key}={old}->{new}")
    }
}

impl NftMap {
    /// Fails unless the element leads to the old destination.
    pub(super) async fn expect_old(&self) -> Result<()> {
        let found = self.found().await?;
        if self.leads(found.as_deref()) == Leads::Here {
            return Ok(());
        }
        let leads = found.map_or_else(|| "to nothing".to_owned(), |to| format!("to {to}"));
        let text = format!(
            "the route nft:{self}: in map {} of table {} {} the key {} leads {leads}, not to {}",
            self.map, self.family, self.table, self.key, self.old
        );
        Err(Error::new(Kind::Usage, text))
    }

    /// Replaces the element.
    pub(super) async fn switch(&self) -> Result<()> {
        run_script(&self.replacing(&self.old, &self.new)).await
    }

    /// Puts the element back.
    pub(super) async fn give_back(&self) -> Result<()> {
        let found = self.found().await?;
        match self.leads(found.as_deref()).undo() {
            Undo::Nothing => Ok(()),
            Undo::Replace => run_script(&self.replacing(&self.new, &self.old)).await,
            Undo::Add => run_script(&self.adding(&self.old)).await,
            Undo::Refuse => {
                let text = format!(
                    "somebody else has led the key {} to {}",
                    self.key,
                    found.unwrap_or_default()
                );
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    fn leads(&self, found: Option<&str>) -> Leads {
        match found {
            None => Leads::Nowhere,
            Some(to) if to == self.old => Leads::Here,
            Some(to) if to == self.new => Leads::There,
            Some(_) => Leads::Elsewhere,
        }
    }

    fn place(&self) -> String {
        format!("{} {} {}", self.family, self.table, self.map)
    }

    fn adding(&self, to: &str) -> String {
        format!("add element {} {{ {} : {to} }}\n", self.place(), self.key)
    }

    fn replacing(&self, from: &str, to: &str) -> String {
        let place = self.place();
        format!("delete element {place} {{ {} : {from} }}\n", self.key) + &self.adding(to)
    }

    /// The destination of the key; `None` if the map has no such key.
    async fn found(&self) -> Result<Option<String>> {
        let output = Command::new("nft")
            .args(["-n", "-j", "list", "map"])
            .args([&self.family, &self.table, &self.map])
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(cannot_start)?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let text = format!("the route nft:{self}: {}", stderr.trim());
            return Err(Error::new(Kind::Usage, text));
        }
        let listed: Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| Error::wrap(Kind::Protocol, "what nft lists", error))?;
        Ok(destination(&listed, &self.key))
    }
}

/// The destination of `key` in what `nft -j list map` says.
fn destination(listed: &Value, key: &str) -> Option<String> {
    let objects = listed["nftables"].as_array()?;
    let map = objects
        .iter()
        .find(|object| object.get("map").is_some())?
        .get("map")?;
    let mut elements = map["elem"].as_array()?.iter();
    elements.find_map(|pair| {
        let (found, to) = (pair.get(0)?, pair.get(1)?);
        (written(found)? == key).then(|| written(to))?
    })
}

/// A value of nft's JSON as nft reads it.
fn written(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(object) => {
            if let Some(parts) = object.get("concat") {
                let parts: Option<Vec<String>> = parts.as_array()?.iter().map(written).collect();
                return Some(parts?.join(" . "));
            }
            if let Some(prefix) = object.get("prefix") {
                let address = written(&prefix["addr"])?;
                return Some(format!("{address}/{}", prefix["len"]));
            }
            // An element with a comment or a timeout.
            written(&object.get("elem")?["val"])
        }
        _ => None,
    }
}

async fn run_script(script: &str) -> Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot_start)?;
    let failed = |error| Error::wrap(Kind::Io, "nft", error);
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(script.as_bytes()).await.map_err(failed)?;
    }
    let output = nft.wait_with_output().await.map_err(failed)?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(Error::new(Kind::Io, format!("nft: {}", stderr.trim())))
        }
    }
}

fn cannot_start(error: std::io::Error) -> Error {
    Error::wrap(
        Kind::Usage,
        "nft cannot be started (install nftables)",
        error,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_with_ports_are_two_parts() {
        let route: NftMap = "ip6/nat/m/[fd00::9]:80=[fd00::1]:8080->[fd00::2]:8080"
            .parse()
            .unwrap();
        assert_eq!(route.key, "fd00::9 . 80");
        assert_eq!(
            route.replacing(&route.old, &route.new),
            "delete element ip6 nat m { fd00::9 . 80 : fd00::1 . 8080 }\n\
             add element ip6 nat m { fd00::9 . 80 : fd00::2 . 8080 }\n"
        );
        let plain: NftMap = "ip/nat/m/10.0.0.0/24=10.0.0.1->10.0.0.2".parse().unwrap();
        assert_eq!((&*plain.key, &*plain.new), ("10.0.0.0/24", "10.0.0.2"));
    }

    #[test]
    fn a_destination_is_found_by_its_key_however_it_is_written() {
        let listed = json!({"nftables": [{"metainfo": {}}, {"map": {"elem": [
            [80, {"concat": ["10.0.0.1", 8080]}],
            [{"elem": {"val": 81, "comment": "x"}}, "10.0.0.3"],
            [{"prefix": {"addr": "10.1.0.0", "len": 16}}, "10.0.0.4"],
        ]}}]});
        let of = |key| destination(&listed, key);
        assert_eq!(of("80").as_deref(), Some("10.0.0.1 . 8080"));
        assert_eq!(of("81").as_deref(), Some("10.0.0.3"));
        assert_eq!(of("10.1.0.0/16").as_deref(), Some("10.0.0.4"));
        assert_eq!(of("82"), None);
        assert_eq!(destination(&json!({"nftables": [{"map": {}}]}), "80"), None);
    }

    #[test]
    fn what_others_have_changed_is_left_to_them() {
        let route: NftMap = "ip/nat/m/80=10.0.0.1->10.0.0.2".parse().unwrap();
        let of = |found| route.leads(found).undo();
        assert_eq!(of(Some("10.0.0.1")), Undo::Nothing);
        assert_eq!(of(Some("10.0.0.2")), Undo::Replace);
        assert_eq!(of(None), Undo::Add);
        assert_eq!(of(Some("10.0.0.3")), Undo::Refuse);
    }
}
