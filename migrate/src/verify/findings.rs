//! What is wrong with images, in words and in codes that stay the same.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

/// Findings of one kind in one file that are told one by one; the others are counted.
const LISTED_EACH: u64 = 8;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Severity {
    /// A restore fails, or the restored memory is wrong.
    Fault,
    /// Worth knowing; a restore succeeds.
    Remark,
}

/// One thing that was found.
#[derive(Clone, Serialize, Debug, JsonSchema)]
pub(crate) struct Finding {
    /// How bad it is.
    pub(crate) severity: Severity,
    /// What kind of thing: docs/reference/commands.md lists them.
    pub(crate) code: &'static str,
    /// Absolute path of the file concerned.
    pub(crate) file: String,
    /// What is wrong, in words.
    pub(crate) text: String,
}

/// All that was found, in the order in which it was.
#[derive(Default, Debug)]
pub(crate) struct Findings {
    listed: Vec<Finding>,
    counts: BTreeMap<(&'static str, String), (Severity, u64)>,
}

impl Findings {
    /// A restore fails because of it, or what is restored is wrong.
    pub(crate) fn fault(&mut self, code: &'static str, file: &Path, text: impl Into<String>) {
        self.add(Severity::Fault, code, file, text.into());
    }

    /// A restore succeeds all the same.
    pub(crate) fn remark(&mut self, code: &'static str, file: &Path, text: impl Into<String>) {
        self.add(Severity::Remark, code, file, text.into());
    }

    /// A fault if `is_fault`, else a remark.
    pub(crate) fn either(
        &mut self,
        is_fault: bool,
        code: &'static str,
        file: &Path,
        text: impl Into<String>,
    ) {
        let severity = match is_fault {
            true => Severity::Fault,
            false => Severity::Remark,
        };
        self.add(severity, code, file, text.into());
    }

    fn add(&mut self, severity: Severity, code: &'static str, file: &Path, text: String) {
        let file = file.display().to_string();
        let (worst, count) = self
            .counts
            .entry((code, file.clone()))
            .or_insert((severity, 0));
        if severity == Severity::Fault {
            *worst = severity;
        }
        *count += 1;
        if *count <= LISTED_EACH {
            self.listed.push(Finding {
                severity,
                code,
                file,
                text,
            });
        }
    }

    /// Whether there is a fault among them.
    pub(crate) fn any_fault(&self) -> bool {
        let mut severities = self.counts.values().map(|(severity, _)| severity);
        severities.any(|severity| *severity == Severity::Fault)
    }

    /// All of them; those beyond the first few of a kind as a number.
    pub(crate) fn into_list(self) -> Vec<Finding> {
        let mut list = self.listed;
        for ((code, file), (severity, count)) in self.counts {
            if count > LISTED_EACH {
                list.push(Finding {
                    severity,
                    code,
                    file,
                    text: format!("and {} more of this kind", count - LISTED_EACH),
                });
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_of_a_kind_are_counted_and_none_is_forgotten() {
        let mut findings = Findings::default();
        for at in 0..20 {
            findings.remark("entry-empty", Path::new("a"), at.to_string());
        }
        findings.remark("entry-empty", Path::new("b"), "one");
        assert!(!findings.any_fault());
        for _ in 0..20 {
            findings.remark("mixed", Path::new("c"), "a remark");
        }
        // Beyond those that are told, and still a fault.
        findings.fault("mixed", Path::new("c"), "a fault");
        assert!(findings.any_fault());
        let list = findings.into_list();
        let more = |text: &str| list.iter().filter(|one| one.text.starts_with(text)).count();
        assert_eq!(
            (list.len(), more("and 12 more"), more("and 13 more")),
            (19, 1, 1)
        );
    }
}
