//! What programs write for other programs, against the schemas in docs/reference/schemas.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::root;

/// Fails unless `value` has the form of the output `name`, and no field beyond it: a schema lets readers accept fields
/// of later versions, but a field of this version must be in it.
///
/// # Errors
/// It has another form, or there is no such output.
pub fn expect(name: &str, value: &Value) -> Result<()> {
    let path = root().join(format!("docs/reference/schemas/{name}.schema.json"));
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut schema: Value = serde_json::from_str(&text)?;
    close(&mut schema);
    let validator = jsonschema::validator_for(&schema).context("a schema")?;
    let problems = validator.iter_errors(value);
    let problems: Vec<String> = problems
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    ensure!(
        problems.is_empty(),
        "{name}: {}\n{value:#}",
        problems.join("\n")
    );
    Ok(())
}

/// Lets no object have fields that are not named.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.contains_key("properties") {
                object
                    .entry("additionalProperties")
                    .or_insert(Value::Bool(false));
            }
            object.values_mut().for_each(close);
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrong_document_is_refused() {
        let good = json!({
            "schema": "pageferry-verify-1", "directory": "/d", "good": true, "directories": 1, "memories": 1,
            "pages": 2, "compressed_pages": 0,
            "findings": [{"severity": "remark", "code": "c", "file": "/f", "text": "t"}],
        });
        expect("verify", &good).unwrap();
        let changes: [(&str, Value); 6] = [
            ("/schema", json!("pageferry-verify-2")),
            ("/pages", json!(-1)),
            ("/pages", json!(1.5)),
            ("/good", json!("yes")),
            ("/findings/0/severity", json!("worse")),
            ("/findings/0", json!({"severity": "fault"})),
        ];
        for (path, value) in changes {
            let mut wrong = good.clone();
            *wrong.pointer_mut(path).unwrap() = value;
            assert!(expect("verify", &wrong).is_err(), "{path}");
        }
        let mut more = good.clone();
        more["more"] = json!(1);
        let mut less = good;
        less.as_object_mut().unwrap().remove("good");
        assert!(expect("verify", &more).is_err() && expect("verify", &less).is_err());
    }

    #[test]
    fn a_session_is_of_one_kind() {
        let served = json!({"role": "serve", "peer": "p", "served": true, "error": null, "seconds": 0.5,
            "requests": 1, "short_answers": 0, "pages": 1, "bytes": 4096});
        expect("page-server-summary", &served).unwrap();
        let mut other = served;
        other["role"] = json!("receive");
        assert!(expect("page-server-summary", &other).is_err());
        assert!(expect("no-such-output", &other).is_err());
    }
}
