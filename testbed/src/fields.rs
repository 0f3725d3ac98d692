//! Documented fields of JSON that programs print: what is printed must be just what is documented.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::workspace::root;

/// Which types each field may have, by its path: `directories[].path`.
#[derive(Clone, Debug)]
pub struct Fields(BTreeMap<String, BTreeSet<String>>);

impl Fields {
    /// The table behind the line `<!-- fields of WHAT -->` in a document of this repository.
    ///
    /// # Errors
    /// There is no such table.
    pub fn documented(document: &str, what: &str) -> Result<Fields> {
        let text =
            fs::read_to_string(root().join(document)).with_context(|| document.to_owned())?;
        let begin = format!("<!-- fields of {what} -->\n");
        let (_, rest) = text
            .split_once(&begin)
            .with_context(|| format!("{document} has no {begin}"))?;
        let (table, _) = rest
            .split_once("<!-- end of fields -->")
            .context("no end of the fields")?;
        let mut fields = BTreeMap::new();
        for line in table.lines().filter(|line| line.starts_with("| `")) {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let path = cells
                .next()
                .unwrap_or_default()
                .trim_matches('`')
                .to_owned();
            let types = cells.next().unwrap_or_default().split(" or ");
            fields.insert(path, types.map(str::to_owned).collect());
        }
        ensure!(
            !fields.is_empty(),
            "{document} documents no field of {what}"
        );
        Ok(Fields(fields))
    }

    /// Fails unless each object in `value` has just the documented fields, with their types.
    ///
    /// # Errors
    /// A field is missing, not documented, or of another type.
    pub fn expect(&self, value: &Value) -> Result<()> {
        self.object("", value)
    }

    fn object(&self, prefix: &str, value: &Value) -> Result<()> {
        let Value::Object(object) = value else {
            bail!("{prefix:?} is no object: {value}");
        };
        for (name, value) in object {
            let plain = format!("{prefix}{name}");
            match value {
                Value::Array(list) => {
                    let path = format!("{plain}[]");
                    ensure!(self.0.contains_key(&path), "{path} is not documented");
                    for value in list {
                        self.value(&path, value)?;
                    }
                }
                value => self.value(&plain, value)?,
            }
        }
        let missing = self.0.keys().find(|path| {
            let name = path
                .strip_prefix(prefix)
                .map(|rest| rest.trim_end_matches("[]"));
            name.is_some_and(|name| !name.contains(['.', '[']) && !object.contains_key(name))
        });
        match missing {
            Some(path) => bail!("{path} is documented and not printed"),
            None => Ok(()),
        }
    }

    fn value(&self, path: &str, value: &Value) -> Result<()> {
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let types = self
            .0
            .get(path)
            .with_context(|| format!("{path} is not documented"))?;
        ensure!(
            types.contains(found),
            "{path} is {found}, and documented as {types:?}"
        );
        match value {
            Value::Object(_) => self.object(&format!("{path}."), value),
            _ => Ok(()),
        }
    }
}
