//! What a page server tells of its sessions: in the log, in `--summary-json`, on the terminal and to
//! `--metrics`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::engine::serve::Summary;
use pageferry::error::{Error, Kind, Result};
use pageferry::observe::ferried::{self, Forwarded};
use pageferry::observe::metrics::MetricsListener;
use pageferry::observe::progress::Display;
use pageferry::observe::received::{self, Received};
use pageferry::observe::traffic::Traffic;
use pageferry::units::PageSize;
use schemars::JsonSchema;
use serde::Serialize;

use crate::args::Args;

/// Where reports go, opened before the server listens.
pub(crate) struct Report {
    traffic: Arc<Traffic>,
    summaries: Option<Summaries>,
    metrics: Option<MetricsListener>,
}

/// The file of `--summary-json`: a line a session.
struct Summaries {
    path: PathBuf,
    file: Mutex<File>,
}

impl Report {
    pub(crate) fn open(args: &Args) -> Result<Report> {
        let summaries = args.summary_json.as_deref().map(Summaries::create);
        let metrics = args.metrics.as_deref().map(MetricsListener::bind);
        let metrics = metrics.transpose()?;
        if let Some(address) = metrics.as_ref().and_then(MetricsListener::address) {
            tracing::info!("metrics are at http://{address}/metrics");
        }
        Ok(Report {
            traffic: Arc::default(),
            summaries: summaries.transpose()?,
            metrics,
        })
    }

    /// What the sessions count in.
    pub(crate) fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.traffic)
    }

    /// Begins to show what is counted, from threads of its own, until the display is dropped.
    pub(crate) fn show(&mut self) -> Result<Display> {
        if let Some(metrics) = self.metrics.take() {
            let traffic = self.traffic();
            metrics.serve(move || traffic.prometheus())?;
        }
        let traffic = self.traffic();
        Ok(Display::start(move || traffic.snapshot()))
    }

    /// A receiving session has ended.
    pub(crate) fn received(&self, received: &Received, error: Option<&Error>) {
        tracing::info!("{received}");
        self.write(&Line::Receive(received.line(error)));
    }

    /// A peer did not come so far as to have a session: its handshake failed, or its first bytes did not
    /// come.
    pub(crate) fn rejected(&self, peer: &str, page: PageSize, error: &Error) {
        if error.kind() == Kind::NothingCame {
            return;
        }
        drop(self.traffic.begin_session());
        let nothing = Received::nothing(peer, page);
        self.write(&Line::Receive(nothing.line(Some(error))));
    }

    /// A forwarding session has ended.
    pub(crate) fn forwarded(&self, forwarded: &Forwarded, error: Option<&Error>) {
        tracing::info!("{forwarded}");
        self.write(&Line::Forward(forwarded.line(error)));
    }

    /// A serving session with `peer` has ended.
    pub(crate) fn served(&self, peer: &str, served: Option<&Summary>, error: Option<&Error>) {
        if error.is_some_and(|error| error.kind() == Kind::NothingCame) {
            return;
        }
        let served = served.cloned().unwrap_or_default();
        let seconds = served.elapsed.as_secs_f64();
        tracing::info!(
            "{} pages ({} bytes) in {} answers served to {peer} in {seconds:.3} s",
            served.pages,
            served.bytes,
            served.requests,
        );
        let line = Line::Serve(Served {
            role: "serve",
            peer,
            served: error.is_none(),
            error: error.map(ToString::to_string),
            seconds,
            requests: served.requests,
            short_answers: served.short_answers,
            pages: served.pages,
            bytes: served.bytes,
        });
        self.write(&line);
    }

    fn write(&self, line: &Line<'_>) {
        if let Some(summaries) = &self.summaries
            && let Err(error) = summaries.write(line)
        {
            tracing::warn!("{error}");
        }
    }
}

/// A finished session, successful or not. `role` is its kind.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum Line<'a> {
    Receive(received::Line<'a>),
    Forward(ferried::Line<'a>),
    Serve(Served<'a>),
}

/// A session that served pages to a lazy restore.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Serve")]
pub(crate) struct Served<'a> {
    /// Tells the kind of session.
    #[schemars(extend("const" = "serve"))]
    role: &'static str,
    /// Address of the client.
    peer: &'a str,
    /// Whether the client ended the session with CLOSE.
    served: bool,
    /// Why not; null if it did.
    error: Option<String>,
    /// How long the session took, seconds.
    seconds: f64,
    /// How many requests were answered.
    requests: u64,
    /// How many answers had fewer pages than were requested.
    short_answers: u64,
    /// How many pages were sent.
    pages: u64,
    /// Bytes of these pages.
    bytes: u64,
}

impl Summaries {
    fn create(path: &Path) -> Result<Summaries> {
        let file = File::create(path).map_err(|error| Error::file("create", path, error))?;
        Ok(Summaries {
            path: path.to_owned(),
            file: Mutex::new(file),
        })
    }

    fn write(&self, line: &Line<'_>) -> Result<()> {
        // Numbers and strings alone: they always have a JSON form.
        let line = serde_json::to_string(line).unwrap_or_default() + "\n";
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes())
            .map_err(|error| Error::file("write the summary to", &self.path, error))
    }
}
