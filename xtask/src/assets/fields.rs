//! The fields of outputs as a page, read off their schemas.

use std::fmt::Write;

use pageferry::observe::schema::Output;
use serde_json::{Map, Value};

/// What stands above the tables.
const HEAD: &str = "\
# Fields of outputs

`cargo xtask assets --docs -o DIR` writes this page from the types that programs write. Tests compare the outputs of all
programs with it. Later versions may add fields, so ignore fields that you do not know.

`a[].b` is the field `b` of each object in the list `a`. `a.*` is the value of any name in `a`. A field is always there,
unless its meaning begins with \"Optional\".
";

/// One field.
pub(super) struct Field {
    /// Where it is: `directories[].path`.
    pub(super) path: String,
    /// Its JSON types: `integer or null`.
    pub(super) kind: String,
    /// What it says.
    pub(super) meaning: String,
}

/// The page.
pub(super) fn page(outputs: &[Output]) -> String {
    let mut page = HEAD.to_owned();
    page += "\n| output | written by | schema |\n|---|---|---|\n";
    for Output {
        name, written_by, ..
    } in outputs
    {
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            page,
            "| [{name}](#{name}) | `{written_by}` | [{name}.schema.json](schemas/{name}.schema.json) |"
        );
    }
    for output in outputs {
        let _ = writeln!(page, "\n## {}\n", output.name);
        let root = output.schema.as_value();
        let kinds = root["anyOf"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        table(&mut page, root, root);
        for kind in kinds {
            let kind = resolved(root, kind);
            let _ = writeln!(page);
            table(&mut page, root, kind);
        }
    }
    page
}

fn table(page: &mut String, root: &Value, node: &Value) {
    if let Some(text) = node["description"].as_str() {
        let _ = writeln!(page, "{}", sentence(text));
    }
    let mut fields = Vec::new();
    children(root, node, "", &mut fields);
    if fields.is_empty() {
        return;
    }
    let _ = writeln!(page, "\n| field | type | meaning |\n|---|---|---|");
    for Field {
        path,
        kind,
        meaning,
    } in fields
    {
        let meaning = meaning.replace('|', "\\|");
        let _ = writeln!(page, "| `{path}` | {kind} | {meaning} |");
    }
}

/// All fields, those of each kind one behind the other where there are kinds.
#[cfg(test)]
pub(super) fn fields_of(schema: &schemars::Schema) -> Vec<Field> {
    let root = schema.as_value();
    let mut fields = Vec::new();
    children(root, root, "", &mut fields);
    for kind in root["anyOf"].as_array().into_iter().flatten() {
        children(root, resolved(root, kind), "", &mut fields);
    }
    fields
}

/// What a schema says, by the definition that it names and without `null`.
fn resolved<'a>(root: &'a Value, node: &'a Value) -> &'a Value {
    if let Some(name) = node["$ref"].as_str() {
        let name = name.trim_start_matches("#/$defs/");
        return resolved(root, &root["$defs"][name]);
    }
    let mut choices = node["anyOf"].as_array().into_iter().flatten();
    match choices.find(|choice| choice["type"] != "null") {
        Some(choice) if is_nullable(node) => resolved(root, choice),
        _ => node,
    }
}

fn is_nullable(node: &Value) -> bool {
    let choices = node["anyOf"].as_array().into_iter().flatten();
    let types = node["type"].as_array().into_iter().flatten();
    choices.chain([node]).any(|choice| choice["type"] == "null")
        || types.into_iter().any(|kind| kind == "null")
}

/// Adds what is below a node: `prefix` is its path.
fn children(root: &Value, node: &Value, prefix: &str, fields: &mut Vec<Field>) {
    let node = resolved(root, node);
    let dot = if prefix.is_empty() || prefix.ends_with('.') {
        ""
    } else {
        "."
    };
    if let Some(properties) = node["properties"].as_object() {
        for (name, is_required) in in_order(node, properties) {
            let path = format!("{prefix}{dot}{name}");
            add(root, &properties[name], &path, is_required, fields);
        }
    }
    if node["additionalProperties"].is_object() {
        children(
            root,
            &node["additionalProperties"],
            &format!("{prefix}{dot}*"),
            fields,
        );
    }
    if node["items"].is_object() {
        children(root, &node["items"], &format!("{prefix}[]"), fields);
    }
}

/// The names of fields in the order in which they are written: schemas sort them, but not those that are required.
fn in_order<'a>(
    node: &'a Value,
    properties: &'a Map<String, Value>,
) -> impl Iterator<Item = (&'a str, bool)> {
    let required = node["required"].as_array().into_iter().flatten();
    let required: Vec<&str> = required.filter_map(Value::as_str).collect();
    let others = properties.keys().map(String::as_str);
    let others: Vec<&str> = others.filter(|name| !required.contains(name)).collect();
    let required = required.into_iter().map(|name| (name, true));
    required.chain(others.into_iter().map(|name| (name, false)))
}

fn add(root: &Value, node: &Value, path: &str, is_required: bool, fields: &mut Vec<Field>) {
    let inner = resolved(root, node);
    let described = node["description"]
        .as_str()
        .or(inner["description"].as_str());
    let mut meaning = sentence(described.unwrap_or_default());
    if let Some(constant) = inner.get("const") {
        meaning = format!(
            "{meaning} Always `{}`.",
            constant.as_str().unwrap_or_default()
        );
    }
    let item = resolved(root, &inner["items"]);
    for choices in [inner, item] {
        meaning += &values(choices);
    }
    if !is_required {
        meaning = format!("Optional. {meaning}");
    }
    fields.push(Field {
        kind: kind(root, node),
        meaning,
        path: path.to_owned(),
    });
    children(root, node, path, fields);
}

/// The values of an enumeration, each with what it means.
fn values(node: &Value) -> String {
    let described = node["oneOf"].as_array().into_iter().flatten();
    let described = described.filter_map(|choice| {
        let name = choice["const"].as_str()?;
        let text = choice["description"].as_str().unwrap_or_default();
        Some(format!(
            "`{name}`: {}",
            text.trim_end_matches('.').replace('\n', " ")
        ))
    });
    let values: Vec<String> = described.collect();
    match values.is_empty() {
        true => String::new(),
        false => format!(" Values: {}.", values.join("; ")),
    }
}

/// The types of a node in words.
fn kind(root: &Value, node: &Value) -> String {
    let inner = resolved(root, node);
    let types = match &inner["type"] {
        Value::String(kind) => kind.as_str(),
        Value::Array(kinds) => kinds
            .iter()
            .filter_map(Value::as_str)
            .find(|kind| *kind != "null")
            .unwrap_or("any"),
        _ if inner["oneOf"].is_array() => "string",
        _ => "any",
    };
    let kind = match types {
        "array" => format!("list of {}", kind_of_many(&kind(root, &inner["items"]))),
        "object" if inner["additionalProperties"].is_object() => {
            let each = kind(root, &inner["additionalProperties"]);
            format!("object of {} by name", kind_of_many(&each))
        }
        other => other.to_owned(),
    };
    match is_nullable(node) {
        true => format!("{kind} or null"),
        false => kind,
    }
}

/// `integers` for `integer`.
fn kind_of_many(kind: &str) -> String {
    match kind.split_once(" or ") {
        Some((kind, other)) => format!("{} or {other}", kind_of_many(kind)),
        None if kind.starts_with("list") => kind.replacen("list", "lists", 1),
        None => format!("{kind}s"),
    }
}

/// One line that ends as a sentence does.
fn sentence(text: &str) -> String {
    let text = text.replace('\n', " ");
    match text.is_empty() || text.ends_with(['.', ':', '?']) {
        true => text,
        false => text + ".",
    }
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::Serialize;

    use super::*;

    /// What is told.
    #[derive(Serialize, JsonSchema)]
    #[allow(dead_code)]
    struct Told {
        /// Parts.
        parts: Vec<Part>,
        /// By name | each.
        by_name: std::collections::BTreeMap<String, u64>,
        /// One, maybe.
        one: Option<Part>,
    }

    /// A part.
    #[derive(Serialize, JsonSchema)]
    struct Part {
        /// Its state
        state: State,
    }

    #[derive(Serialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    #[allow(dead_code)]
    enum State {
        /// It is good.
        Good,
        /// It is not.
        NotGood,
    }

    #[test]
    fn lists_of_lists_have_one_plural() {
        assert_eq!(
            kind_of_many("list of objects or null"),
            "lists of objects or null"
        );
        assert_eq!(kind_of_many("integer or null"), "integers or null");
    }

    #[test]
    fn fields_are_told_with_their_places_types_and_values() {
        let page = page(&[Output::of::<Told>("told", "tell --json")]);
        for line in [
            "| [told](#told) | `tell --json` | [told.schema.json](schemas/told.schema.json) |",
            "What is told.",
            "| `parts` | list of objects | Parts. |",
            "| `parts[].state` | string | Its state. Values: `good`: It is good; `not-good`: It is not. |",
            "| `by_name` | object of integers by name | By name \\| each. |",
            "| `one` | object or null | One, maybe. |",
            "| `one.state` | string | Its state. Values: `good`: It is good; `not-good`: It is not. |",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} in {page}");
        }
    }
}
