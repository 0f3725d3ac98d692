//! The laboratory of `cargo bench --bench uffd` works as a whole: every mechanism is measured, or says what this kernel
//! lacks.

use anyhow::{Result, ensure};
use testbed::laboratory::{Scale, measure};

#[test]
fn every_mechanism_has_samples_or_a_reason() -> Result<()> {
    let mut begun = 0;
    let samples = measure(&Scale::TINY, "", |_| begun += 1)?;
    ensure!(begun == samples.groups.len() && begun > 0);
    for group in &samples.groups {
        ensure!(!group.mechanisms.is_empty(), "{} is empty", group.name);
        for one in &group.mechanisms {
            let name = format!("{}: {}", group.name, one.name);
            match &one.lacking {
                Some(why) => {
                    ensure!(!why.is_empty() && one.rounds.is_empty(), "{name}: {one:?}");
                    eprintln!("{name}: {why}");
                }
                None => {
                    ensure!(one.rounds.len() == 1, "{name} has no samples");
                    ensure!(one.rounds[0].len() == group.metrics.len(), "{name}");
                    let finite = |figure: &f64| figure.is_finite() && *figure >= 0.0;
                    ensure!(one.rounds[0].iter().all(finite), "{name}: {one:?}");
                }
            }
        }
    }
    let shown = samples.to_string();
    ensure!(shown.contains("clock ") && shown.contains("UFFDIO_COPY"));
    Ok(())
}

#[test]
fn one_word_chooses_mechanisms() -> Result<()> {
    let samples = measure(&Scale::TINY, "UFFDIO_ZEROPAGE", |_| {})?;
    ensure!(samples.groups.len() == 1);
    let samples = measure(&Scale::TINY, "no tracking", |_| {})?;
    ensure!(
        samples
            .groups
            .iter()
            .all(|group| group.mechanisms.len() == 1)
    );
    ensure!(!samples.groups.is_empty());
    Ok(())
}
