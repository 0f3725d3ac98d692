//! What every benchmark writes with `--json`: one form, which `bench report` reads. Its schema is
//! docs/reference/schemas/bench.schema.json.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bars::Bar;
use super::stats::Sample;

/// Of this form; it changes when a reader of the one before would misread it.
pub(crate) const FORM: u32 = 1;

/// One run of a benchmark.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Document {
    /// The number of this form: 1.
    pub(crate) form: u32,
    /// Which benchmark, such as `post-copy`.
    pub(crate) bench: String,
    /// The commit that was built, with `+` behind it if the work tree had changes.
    pub(crate) commit: String,
    /// When it began, by UTC, as RFC 3339 has it.
    pub(crate) date: String,
    /// The words of the command line.
    pub(crate) command: Vec<String>,
    /// What else a result depends on.
    pub(crate) machine: Machine,
    /// After how many seconds a run was ended, if at all. Its samples are bounds then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limit_s: Option<u64>,
    /// What was measured, in the order in which it was.
    pub(crate) cases: Vec<Case>,
    /// Promises and whether they are kept.
    pub(crate) bars: Vec<Bar>,
}

/// The machine and the programs.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The CPU's model.
    pub(crate) cpu: String,
    /// How many CPUs the benchmark may use.
    pub(crate) cpus: usize,
    /// Memory, MiB.
    pub(crate) memory_mib: u64,
    /// The version of the CRIU that competed, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) criu: Option<String>,
    /// The kernel's clock source, and what a reading of it takes: where single calls are measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) clock: Option<String>,
    /// The version of pageferry.
    pub(crate) pageferry: String,
}

/// Contenders under the same conditions, in rounds.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    /// The conditions, in words.
    pub(crate) name: String,
    /// The conditions, as the benchmark has them: by name, numbers and words.
    pub(crate) conditions: serde_json::Value,
    /// Names of the programs that were compared.
    pub(crate) contenders: Vec<String>,
    /// What was measured.
    pub(crate) metrics: Vec<Metric>,
    /// Contenders without samples: what this machine lacks for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) lacking: Vec<Unsupported>,
}

/// A contender that could not be measured.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Unsupported {
    /// Its name.
    pub(crate) contender: String,
    /// What is missing.
    pub(crate) why: String,
}

/// One figure of all runs of a case.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Metric {
    /// Its name with the unit behind it, such as `drained s`.
    pub(crate) name: String,
    /// For each contender, in their order: its sample of each round, null where the run had none.
    pub(crate) samples: Vec<Vec<Option<Sample>>>,
}
