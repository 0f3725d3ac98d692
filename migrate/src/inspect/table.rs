//! The report for people.

use super::report::{Directory, Memory, PagesFile, Report};

/// Prints tables: directories, files, memory.
pub(super) fn print(report: &Report) {
    for (depth, dir) in report.directories.iter().enumerate() {
        directory(depth, dir);
    }
    memory(report);
    totals(report);
}

fn directory(depth: usize, dir: &Directory) {
    let role = match depth {
        0 => "images".to_owned(),
        depth => format!("parent {depth}"),
    };
    let processes = match (dir.processes, dir.complete) {
        (Some(count), true) => format!("{count} processes"),
        (Some(count), false) => format!("{count} processes, no inventory.img"),
        (None, _) => "memory alone".to_owned(),
    };
    println!("{role:<10} {}  ({processes})", dir.path);
    println!(
        "  {:<26}{:>8}{:>10}{:>10}{:>10}{:>10}{:>12}  layout, file",
        "pagemap", "entries", "pages", "here", "parent", "source", "compressed"
    );
    for map in &dir.pagemaps {
        let pages_file = match map.pages_id {
            Some(id) => format!("pages-{id}.img"),
            None => "?".to_owned(),
        };
        println!(
            "  {:<26}{:>8}{:>10}{:>10}{:>10}{:>10}{:>12}  {} {pages_file}",
            map.file,
            map.entries,
            map.pages,
            map.here_pages,
            map.in_parent_pages,
            map.with_source_pages,
            map.compressed_pages,
            map.layout.unwrap_or("--"),
        );
        if let Some(damage) = &map.damage {
            println!("  {:<26}{damage}", "");
        }
    }
    for file in &dir.pages_files {
        pages_file(file);
    }
    println!("  {:<26}{:>12}\n", "other files", bytes(dir.other_bytes));
}

fn pages_file(file: &PagesFile) {
    let mut notes = Vec::new();
    if file.room_bytes < file.bytes {
        notes.push(format!("{} on disk: it has holes", bytes(file.room_bytes)));
    }
    match file.used_by.len() {
        0 => notes.push("named by no pagemap".to_owned()),
        1 => {}
        _ => notes.push(format!("shared by {}", file.used_by.join(", "))),
    }
    if !file.used_by.is_empty() && file.bytes != file.named_bytes {
        notes.push(format!("pagemaps name {}", bytes(file.named_bytes)));
    }
    println!(
        "  {:<26}{:>12}  {}",
        file.file,
        bytes(file.bytes),
        notes.join("; ")
    );
}

fn memory(report: &Report) {
    println!(
        "{:<28}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
        "memory", "pages", "here", "parents", "source", "lost", "zero", "duplicate", "stored"
    );
    for memory in &report.memory {
        let here = memory.pages_by_directory.first().copied().unwrap_or(0);
        let parents: u64 = memory.pages_by_directory.iter().skip(1).sum();
        println!(
            "{:<28}{:>10}{here:>10}{parents:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
            title(memory),
            memory.pages,
            memory.with_source_pages,
            memory.lost_pages,
            counted(memory.zero_pages),
            counted(memory.duplicate_pages),
            bytes(memory.stored_bytes),
        );
        if let Some(damage) = &memory.damage {
            println!("  {damage}");
        }
    }
}

fn totals(report: &Report) {
    let totals = &report.totals;
    println!(
        "{:<28}{:>10}{:>40}{:>10}{:>10}{:>12}",
        "all",
        totals.pages,
        totals.lost_pages,
        counted(totals.zero_pages),
        counted(totals.duplicate_pages),
        bytes(totals.stored_bytes),
    );
    println!(
        "\n{} of memory; pages files have {}, {} on disk",
        bytes(totals.pages * report.page_bytes),
        bytes(totals.stored_bytes),
        bytes(totals.room_bytes)
    );
}

fn title(memory: &Memory) -> String {
    let name = memory.name.as_deref().unwrap_or_default();
    match memory.kind {
        "process" => format!("pid {} {name}", memory.id),
        _ => format!("shared {}", memory.id),
    }
}

fn counted(pages: Option<u64>) -> String {
    pages.map_or_else(|| "--".to_owned(), |pages| pages.to_string())
}

/// With a unit, to a tenth.
#[allow(clippy::cast_precision_loss)]
fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", count as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", count as f64 / 1_073_741_824.0),
    }
}
