//! What `--version` prints.

use crate::ferry::hello::VERSION;

/// The version with what two ends must agree on: `commit` and `rustls` come from the program's build.
///
/// The text lives as long as the program, as clap wants it.
pub fn long_version(version: &str, commit: &str, rustls: &str) -> &'static str {
    let text = format!(
        "{version} (commit {commit})\n\
         wire layouts: CRIU v1 (up to 4.1.1) and v2 (from 4.2), ferry {VERSION}\n\
         TLS: rustls {rustls} with AWS-LC"
    );
    Box::leak(text.into_boxed_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_names_its_commit_and_layouts() {
        let text = long_version("1.2.3", "abc", "0.23");
        assert!(text.starts_with("1.2.3 (commit abc)\n"), "{text}");
        assert!(
            text.contains("v1") && text.contains("rustls 0.23"),
            "{text}"
        );
    }
}
