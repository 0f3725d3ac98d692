use std::collections::BTreeSet;

use serde_json::json;

use super::*;

/// A report with something in each field.
pub(crate) fn sample() -> Report {
    let host = json!({"pageferry": "0", "criu": "4.2.1", "kernel": "6", "machine": "x86_64",
        "available_bytes": 1});
    let span =
        |row, name, start, end| json!({"row": row, "name": name, "start_ms": start, "end_ms": end});
    let sample = json!({
        "id": "a", "mode": "hybrid", "result": "moved", "problem": null, "warnings": ["w"],
        "processes": 2, "memory_bytes": 1 << 30, "copied_bytes": 1 << 20, "preparation_ms": 3000.0, "downtime_ms": 200.0,
        "resume_ms": 230.0, "switch_ms": 3150.0, "answer_ms": 3230.0, "predicted_downtime_ms": 210.0, "complete_ms": 4000.0, "total_ms": 4100.0,
        "rounds": [{"pages": 1, "bytes": 2, "ms": 3}], "wire_bytes": 5, "bytes_by_kind": {"zero": 1}, "track": "hash",
        "faults": {"count": 3, "p50_us": 1, "p99_us": 2, "blocked_ms": 1.5,
            "times": [{"start_ms": 3200.0, "end_ms": 3300.0, "count": 3, "waited_ms": 1.5}]},
        "phases_ms": {"dump": 100.0},
        "files": {"rounds": [{"files": 5, "bytes": 6, "ms": 7.0}], "freeze": {"files": 1, "bytes": 2, "ms": 3.0},
            "layers": [{"digest": "0", "holds_bytes": 8, "bytes": 7, "ms": 1.0}],
            "deleted": [{"pid": 1, "fd": 3, "path": "/tmp/x", "bytes": 9}], "mounts": ["/etc/hosts"]},
        "log": {"bytes": 1, "most_lag_bytes": 2, "holds": 3},
        "timeline": [span("rounds", "round 1", 100.0, 2500.0), span("freeze", "dump", 3000.0, 3100.0),
            span("freeze", "<restore>", 3100.0, 3200.0), span("memory", "memory follows", 3200.0, 4000.0)],
        "source": host, "destination": host,
    });
    serde_json::from_value(sample).unwrap()
}

/// What stands in code spans of the documented table, and the names of the fields.
#[test]
fn docs_define_each_figure_and_no_other() {
    let docs = include_str!("../../../../docs/migration.md");
    let section = docs.split("## What a report says").nth(1).unwrap();
    let table = section.split("\n## ").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let spans = |text: &str| -> Vec<String> {
        text.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    };
    let rows: Vec<(Vec<String>, String)> = rows
        .map(|line| (spans(line.split('|').nth(1).unwrap()), line.to_owned()))
        .collect();
    let documented: BTreeSet<String> = rows.iter().flat_map(|(names, _)| names.clone()).collect();
    let report = serde_json::to_value(sample()).unwrap();
    let fields: BTreeSet<String> = report.as_object().unwrap().keys().cloned().collect();
    assert_eq!(documented, fields);
    let inner = [
        ("rounds", &report["rounds"][0]),
        ("faults", &report["faults"]),
        ("faults", &report["faults"]["times"][0]),
        ("timeline", &report["timeline"][0]),
        ("files", &report["files"]),
        ("files", &report["files"]["rounds"][0]),
        ("files", &report["files"]["deleted"][0]),
        ("files", &report["files"]["layers"][0]),
        ("log", &report["log"]),
        ("source", &report["source"]),
    ];
    for (field, value) in inner {
        let (_, line) = rows
            .iter()
            .find(|(names, _)| names.contains(&field.to_owned()))
            .unwrap();
        for name in value.as_object().unwrap().keys() {
            assert!(line.contains(&format!("`{name}`")), "{name} of {field}");
        }
    }
}
