//! `pageferry migrate --preload`: sends files ahead and moves nothing.

use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::Mode;
use pageferry::migration::messages::{Begin, MigrationId, Status, TcpConnections};
use tokio::time::{Instant, timeout};

use super::args::Args;
use super::files::Files;
use super::report::Report;
use super::survey::Survey;

/// Sends the files of what `survey` looked at; they stay at the destination for a migration that comes later.
pub(super) async fn run(
    args: &Args,
    survey: Survey,
    mut files: Files,
    id: MigrationId,
    report: Report,
    started: Instant,
) -> Result<()> {
    if files.descriptions().is_empty() {
        let text = "there are no files to be sent: the destination has a root file system of its own (--files replace), and \
             --volume names none";
        return Err(Error::new(Kind::Usage, text));
    }
    let client = survey.client;
    let begin = Begin {
        id: id.clone(),
        mode: Mode::Cold,
        pids: survey
            .tree
            .members()
            .iter()
            .map(|member| member.inner_pid)
            .collect(),
        memory_bytes: survey.size.bytes(),
        tcp: TcpConnections::Refuse,
        timeout_s: args.timeout.as_secs(),
        container: survey.found.map(|found| found.container),
        addresses: Vec::new(),
        files: files.descriptions(),
        keeps_files: true,
        outputs: Vec::new(),
    };
    client.post::<Status>("/v1/migrations", &begin).await?;
    let sent = timeout(args.timeout, files.send_ahead(&client)).await;
    // What has arrived stays, whatever became of the rest.
    let path = format!("/v1/migrations/{id}/cancel");
    let ended = client.post::<Status>(&path, &()).await;
    sent.map_err(|_| out_of_time(args.timeout))??;
    ended?;
    let mut report = Report {
        result: "sent ahead".to_owned(),
        files: files.report.clone(),
        total_ms: started.elapsed().as_secs_f64() * 1e3,
        ..report
    };
    report.wire_bytes = report.files.bytes();
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    report.print();
    Ok(())
}

fn out_of_time(limit: Duration) -> Error {
    let text = format!("the time is over (--timeout {limit:?}); what has arrived stays there");
    Error::new(Kind::Interrupted, text)
}
