//! Configurations of images. Pure.

use serde_json::{Value, json};

/// What stands in an image's history for a layer.
const CREATED_BY: &str = "pageferry export";

/// A configuration for a container with this one of its bundle, as yet without layers.
pub(super) fn of_container(bundle: Option<&Value>) -> Value {
    let mut config = serde_json::Map::new();
    let process = bundle.map_or(&Value::Null, |bundle| &bundle["process"]);
    for (from, to) in [("env", "Env"), ("args", "Cmd"), ("cwd", "WorkingDir")] {
        if !process[from].is_null() {
            config.insert(to.to_owned(), process[from].clone());
        }
    }
    let user = &process["user"];
    if let (Some(uid), Some(gid)) = (user["uid"].as_u64(), user["gid"].as_u64()) {
        config.insert("User".to_owned(), json!(format!("{uid}:{gid}")));
    }
    json!({
        "architecture": architecture(),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": []},
        "history": [],
    })
}

/// The configuration with one more layer on top.
pub(super) fn with_layer(mut config: Value, diff_id: &str) -> Value {
    if let Some(ids) = config["rootfs"]["diff_ids"].as_array_mut() {
        ids.push(json!(diff_id));
    }
    // An image need not have a history; one that has tells of all layers.
    let history = config.get_mut("history").and_then(Value::as_array_mut);
    if let Some(history) = history {
        history.push(json!({"created_by": CREATED_BY}));
    }
    config
}

/// This machine's, by the name that Go has for it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_s_command_becomes_the_image_s() {
        let bundle =
            json!({"process": {"args": ["/bin/a"], "env": ["A=b"], "user": {"uid": 5, "gid": 6}}});
        let config = with_layer(of_container(Some(&bundle)), "sha256:1");
        assert_eq!(
            config["config"],
            json!({"Cmd": ["/bin/a"], "Env": ["A=b"], "User": "5:6"})
        );
        assert_eq!(config["rootfs"]["diff_ids"], json!(["sha256:1"]));
        assert_eq!(config["history"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_base_without_history_gets_none() {
        let base =
            json!({"rootfs": {"type": "layers", "diff_ids": ["sha256:1"]}, "created": "then"});
        let config = with_layer(base, "sha256:2");
        assert_eq!(
            config["rootfs"]["diff_ids"],
            json!(["sha256:1", "sha256:2"])
        );
        assert!(config.get("history").is_none() && config["created"] == "then");
    }
}
