//! What can be wrong with a command line, and how the user is told.

use thiserror::Error;

/// A command line that cannot be used, or that asks for help.
#[derive(Debug, Error)]
pub enum CommandLineError {
    /// No such option in this program nor in CRIU.
    #[error("unknown option {given:?}{}", meant(.similar))]
    Unknown {
        /// What was given.
        given: String,
        /// An option that is spelled much like it.
        similar: Option<String>,
    },
    /// A shortened name that several options have in common.
    #[error("option {given:?} is ambiguous: {candidates}")]
    Ambiguous {
        /// What was given.
        given: String,
        /// What it may mean.
        candidates: String,
    },
    /// An option whose value is missing.
    #[error("option {0:?} needs a value")]
    ValueMissing(String),
    /// A switch with a value.
    #[error("option {0:?} takes no value")]
    ValueTooMuch(String),
    /// A verbosity that is no number.
    #[error("verbosity {0:?} is neither a number nor a row of v's")]
    Verbosity(String),
    /// A word that is no action of this program.
    #[error("unexpected word {0:?}")]
    Word(String),
    /// An action of another program.
    #[error("{word:?} is not what this program does: that is for {program}")]
    OtherProgram {
        /// The action.
        word: String,
        /// Who does it.
        program: &'static str,
    },
    /// A port in a configuration file that is none.
    #[error(
        "the port is not a number from 1 on (a free one is taken with --port 0 on the command line)"
    )]
    PortInFile,
    /// Two dashes in a configuration file.
    #[error(
        "a word of two dashes: CRIU would skip the rest of the file, whatever it says; take it out"
    )]
    EndInFile,
    /// A value that configures security and that CRIU reads otherwise than it is written.
    #[error(
        "CRIU would take {obeyed:?} for the value {written:?}: write it so that both are the same"
    )]
    Doubtful {
        /// What CRIU obeys.
        obeyed: String,
        /// What stands there.
        written: String,
    },
    /// A configuration file that cannot be used.
    #[error("configuration file {place}: {error}")]
    File {
        /// The file, with a line if it is one.
        place: String,
        /// What is wrong.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What our own parser says, also the text of `--help`.
    #[error(transparent)]
    Parser(#[from] clap::Error),
}

impl CommandLineError {
    /// Prints the error (or the help that was asked for) and returns the exit code, which is 1 for
    /// every mistake, as CRIU's is.
    pub fn report(&self) -> u8 {
        match self {
            CommandLineError::Parser(error) => {
                // With the terminal gone there is nobody left to tell.
                let _ = error.print();
                u8::from(error.use_stderr())
            }
            other => {
                eprintln!("error: {other}\n\nFor more information, try '--help'.");
                1
            }
        }
    }
}

fn meant(similar: &Option<String>) -> String {
    match similar {
        Some(similar) => format!(": did you mean {similar}?"),
        None => String::new(),
    }
}
