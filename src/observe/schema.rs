//! Schemas of the JSON that programs write, made from the types that are written.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

/// What a program writes for other programs.
#[derive(Clone, Debug)]
pub struct Output {
    /// Names it, and the file of its schema: `verify`.
    pub name: &'static str,
    /// The command line that writes it.
    pub written_by: &'static str,
    /// Its form, as JSON Schema 2020-12.
    pub schema: Schema,
}

impl Output {
    /// A `T`, written by a program as JSON.
    pub fn of<T: JsonSchema>(name: &'static str, written_by: &'static str) -> Output {
        // As it is written and not as it may be read: a field that is always there is required.
        let settings = SchemaSettings::draft2020_12().for_serialize();
        let mut schema = settings.into_generator().into_root_schema_for::<T>();
        schema.insert("title".to_owned(), name.into());
        Output {
            name,
            written_by,
            schema,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;

    /// An output.
    #[derive(Serialize, JsonSchema)]
    struct Example {
        /// Written as null if there is none.
        some: Option<u64>,
    }

    #[test]
    fn a_field_that_may_be_null_is_written_all_the_same() {
        let output = Output::of::<Example>("example", "a test");
        let schema = output.schema.to_value();
        assert_eq!(schema["title"], "example");
        assert_eq!(schema["required"], serde_json::json!(["some"]));
        assert_eq!(schema["properties"]["some"]["type"][1], "null");
    }
}
