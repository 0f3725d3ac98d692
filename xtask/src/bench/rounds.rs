//! All rounds of one case: what each contender's runs took, and what that says of one against another.

use std::slice::SliceIndex;

use anyhow::Result;
use serde::Serialize;

use super::alternate;
use super::document;
use super::stats::{Sample, median, median_ratio};
use super::table::{Table, cell};

/// Somebody who competes.
pub(crate) trait Contend: Copy + PartialEq {
    /// What tables call it.
    fn name(self) -> &'static str;
}

/// Something that is read off a run.
pub(crate) trait Measure<R>: Copy {
    /// The heading of its column, with the unit.
    fn heading(self) -> &'static str;

    /// Its value, if the run has one.
    fn of(self, run: &R) -> Option<Sample>;
}

/// See the module's text.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Rounds<C, W, R> {
    pub(crate) case: C,
    pub(crate) contenders: Vec<W>,
    /// Runs of each round, in the order of the contenders.
    rounds: Vec<Vec<R>>,
}

impl<C, W: Contend, R> Rounds<C, W, R> {
    /// Lets the contenders run in turn.
    pub(crate) fn take(
        case: C,
        contenders: Vec<W>,
        rounds: u32,
        mut run: impl FnMut(&C, W) -> Result<R>,
    ) -> Result<Rounds<C, W, R>> {
        let rounds = alternate(&contenders, rounds, |&who| run(&case, who))?;
        Ok(Rounds::of(case, contenders, rounds))
    }

    /// Runs of each round, in the order of the contenders.
    pub(crate) fn of(case: C, contenders: Vec<W>, rounds: Vec<Vec<R>>) -> Rounds<C, W, R> {
        Rounds {
            case,
            contenders,
            rounds,
        }
    }

    /// How many rounds there were.
    pub(crate) fn count(&self) -> usize {
        self.rounds.len()
    }

    /// Some of the rounds, by their numbers from 0 on.
    pub(crate) fn part(
        &self,
        which: impl SliceIndex<[Vec<R>], Output = [Vec<R>]>,
    ) -> Part<'_, W, R> {
        Part {
            contenders: &self.contenders,
            rounds: &self.rounds[which],
        }
    }

    /// See [`Part::samples`].
    pub(crate) fn samples(&self, who: W, metric: impl Measure<R>) -> Vec<Option<Sample>> {
        self.part(..).samples(who, metric)
    }

    /// See [`Part::median`].
    pub(crate) fn median(&self, who: W, metric: impl Measure<R>) -> Option<Sample> {
        self.part(..).median(who, metric)
    }

    /// See [`Part::ratio`].
    pub(crate) fn ratio(&self, who: W, to: W, metric: impl Measure<R>) -> Option<Sample> {
        self.part(..).ratio(who, to, metric)
    }

    /// All samples of these metrics, as they are written down; `name` has the conditions in words.
    pub(crate) fn record<M: Measure<R>>(&self, name: &str, metrics: &[M]) -> Result<document::Case>
    where
        C: Serialize,
    {
        let samples = |&metric: &M| document::Metric {
            name: metric.heading().to_owned(),
            samples: self
                .contenders
                .iter()
                .map(|&who| self.samples(who, metric))
                .collect(),
        };
        Ok(document::Case {
            name: name.to_owned(),
            conditions: serde_json::to_value(&self.case)?,
            contenders: self
                .contenders
                .iter()
                .map(|who| who.name().to_owned())
                .collect(),
            metrics: metrics.iter().map(samples).collect(),
            lacking: Vec::new(),
        })
    }

    /// The medians of all contenders, and the ratios of each of `pairs` that competed.
    pub(crate) fn table<M: Measure<R>>(&self, metrics: &[M], pairs: &[(W, W)]) -> Table {
        let headings = std::iter::once("").chain(metrics.iter().map(|metric| metric.heading()));
        let mut table = Table::new(headings);
        for &who in &self.contenders {
            let medians = metrics.iter().map(|&metric| cell(self.median(who, metric)));
            table.row(who.name(), medians);
        }
        let competed = |who: &W| self.contenders.contains(who);
        for &(who, to) in pairs
            .iter()
            .filter(|(who, to)| competed(who) && competed(to))
        {
            let name = format!("{} / {}", who.name(), to.name());
            let ratios = metrics
                .iter()
                .map(|&metric| cell(self.ratio(who, to, metric)));
            table.row(&name, ratios);
        }
        table
    }
}

/// Some of the rounds of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a, W, R> {
    contenders: &'a [W],
    rounds: &'a [Vec<R>],
}

impl<W: Contend, R> Part<'_, W, R> {
    /// What a contender's runs have of a metric, round by round; nothing if it did not run.
    pub(crate) fn samples(&self, who: W, metric: impl Measure<R>) -> Vec<Option<Sample>> {
        let Some(index) = self.contenders.iter().position(|&other| other == who) else {
            return Vec::new();
        };
        let of_round = |round: &Vec<R>| metric.of(round.get(index)?);
        self.rounds.iter().map(of_round).collect()
    }

    /// The median of what a contender's runs have of a metric.
    pub(crate) fn median(&self, who: W, metric: impl Measure<R>) -> Option<Sample> {
        median(self.samples(who, metric).into_iter().flatten())
    }

    /// The median of a contender's ratios to another in the same round.
    pub(crate) fn ratio(&self, who: W, to: W, metric: impl Measure<R>) -> Option<Sample> {
        let other = self.samples(to, metric);
        median_ratio(self.samples(who, metric).into_iter().zip(other))
    }
}
