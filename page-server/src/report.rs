//! What a page server tells of its sessions: in the log, in `--summary-json`, on the terminal and to
//! `--metrics`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::engine::serve::Summary;
use pageferry::error::{Error, Kind, Result};
use pageferry::observe::ferried::Forwarded;
use pageferry::observe::metrics::MetricsListener;
use pageferry::observe::progress::Display;
use pageferry::observe::received::Received;
use pageferry::observe::traffic::Traffic;
use pageferry::units::PageSize;
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
        self.write(received.json(error));
    }

    /// A peer did not come so far as to have a session: its handshake failed, or its first bytes did not
    /// come.
    pub(crate) fn turned_away(&self, peer: &str, page: PageSize, error: &Error) {
        if error.kind() == Kind::NothingCame {
            return;
        }
        drop(self.traffic.begin_session());
        self.write(Received::nothing(peer, page).json(Some(error)));
    }

    /// A forwarding session has ended.
    pub(crate) fn forwarded(&self, forwarded: &Forwarded, error: Option<&Error>) {
        tracing::info!("{forwarded}");
        self.write(forwarded.json(error));
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
        let line = Served {
            role: "serve",
            peer,
            served: error.is_none(),
            error: error.map(ToString::to_string),
            seconds,
            requests: served.requests,
            short_answers: served.short_answers,
            pages: served.pages,
            bytes: served.bytes,
        };
        // Numbers and strings alone: they always have a JSON form.
        self.write(serde_json::to_string(&line).unwrap_or_default());
    }

    fn write(&self, line: String) {
        if let Some(summaries) = &self.summaries
            && let Err(error) = summaries.write(line)
        {
            tracing::warn!("{error}");
        }
    }
}

/// See [`Report::served`].
#[derive(Serialize)]
struct Served<'a> {
    role: &'static str,
    peer: &'a str,
    served: bool,
    error: Option<String>,
    seconds: f64,
    requests: u64,
    short_answers: u64,
    pages: u64,
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

    fn write(&self, mut line: String) -> Result<()> {
        line.push('\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes())
            .map_err(|error| Error::file("write the summary to", &self.path, error))
    }
}
