//! The pages that a restore needs first: named by a file and brought before all others, or recorded into one.
//!
//! While a restore is recorded, nothing comes but what a thread waits for, a page at a time: what came by itself would not
//! be seen to be touched. Then the restore goes on as any other.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use super::{Restore, RestoreConfig};
use crate::error::{Error, Kind, Result};
use crate::image::dir::ImageDir;
use crate::image::working_set::{WorkingSetFile, read, read_if_there};
use crate::lazy::planner::SpaceId;
use crate::lazy::policy::RECORDING;
use crate::lazy::space::Space;
use crate::lazy::working_set::{Mapping, Recorder, WorkingSet};
use crate::units::{PageSize, Vaddr};

/// What a working set did for a restore.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, JsonSchema)]
pub struct WorkingSetSummary {
    /// Missing pages that it named.
    pub pages: u64,
    /// Pages of these that a thread touched before they had come.
    pub faults: u64,
    /// Missing pages that a thread touched and that it did not name, while it was in use.
    pub faults_elsewhere: u64,
    /// Pages that were recorded in this restore.
    pub recorded_pages: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct WorkingSetUse {
    /// What comes first.
    set: Option<WorkingSet>,
    /// The place of each process in the tree, by pid.
    places: BTreeMap<u32, usize>,
    recording: Option<Recording>,
    summary: WorkingSetSummary,
}

/// A recording under way, or to be written at the end.
#[derive(Debug)]
struct Recording {
    file: WorkingSetFile,
    recorder: Recorder,
    /// What is added to.
    earlier: WorkingSet,
    mappings: BTreeMap<usize, Vec<Mapping>>,
    length_us: u64,
    /// When it ends, once the restore has finished.
    until_us: Option<u64>,
    over: bool,
}

impl WorkingSetUse {
    /// What `config` names; of the images `pids`, in the order of the tree.
    pub(super) fn open(
        config: &RestoreConfig,
        images: &ImageDir,
        pids: &[u32],
    ) -> Result<WorkingSetUse> {
        let page = images.page();
        let places = (0..).zip(pids).map(|(place, pid)| (*pid, place)).collect();
        let opened = WorkingSetUse {
            places,
            ..WorkingSetUse::default()
        };
        if let Some(path) = &config.record_working_set {
            let length = config.record_time.as_micros();
            let earlier = read_if_there(path)?.map(|set| fitting(set, path, page));
            let earlier = earlier.transpose()?;
            let recording = Recording {
                file: WorkingSetFile::create(path)?,
                recorder: Recorder::new(page),
                earlier: earlier.unwrap_or_else(|| WorkingSet::empty(page)),
                mappings: BTreeMap::new(),
                length_us: u64::try_from(length).unwrap_or(u64::MAX),
                until_us: None,
                over: false,
            };
            return Ok(WorkingSetUse {
                recording: Some(recording),
                ..opened
            });
        }
        let set = match &config.working_set {
            Some(path) => Some(fitting(read(path)?, path, page)?),
            // It is a hint: the restore is as good without it.
            None => of_images(images).unwrap_or_else(|error| {
                tracing::warn!("{error}: continuing without it");
                None
            }),
        };
        if let Some(set) = &set {
            tracing::info!(
                "the working set names {} pages in {} runs",
                set.pages(),
                set.extents()
            );
        }
        Ok(WorkingSetUse { set, ..opened })
    }

    /// Lets the pages of the process `pid` that it names come first. `mappings` are the process's.
    pub(super) fn apply(&mut self, pid: u32, space: &mut Space, mappings: Vec<Mapping>) {
        let Some(place) = self.places.get(&pid).copied() else {
            return;
        };
        if let Some(recording) = &mut self.recording {
            recording.mappings.insert(place, mappings);
        } else if let Some(set) = &self.set {
            let ranges = set.ranges(place, &mappings);
            if !ranges.is_empty() {
                self.summary.pages += space.stream_first(ranges);
            }
        }
    }

    /// Whether touches are of interest.
    fn watches(&self) -> bool {
        self.set.is_some() || self.is_recording()
    }

    fn is_recording(&self) -> bool {
        self.recording.as_ref().is_some_and(|one| !one.over)
    }

    /// A thread of `pid` touched the missing page `image`, which may be one of those that come first.
    fn touched(&mut self, pid: u32, image: Vaddr, is_first: bool, now_us: u64) {
        match &mut self.recording {
            Some(recording) => {
                if let Some(place) = self.places.get(&pid) {
                    recording.recorder.touch(*place, image, now_us);
                }
            }
            None if is_first => self.summary.faults += 1,
            None => self.summary.faults_elsewhere += 1,
        }
    }

    /// What it did.
    pub(super) fn summary(&self) -> WorkingSetSummary {
        self.summary
    }
}

/// The working set beside the images, if there is one.
fn of_images(images: &ImageDir) -> Result<Option<WorkingSet>> {
    let path = images.working_set_path();
    let set = read_if_there(&path)?;
    set.map(|set| fitting(set, &path, images.page()))
        .transpose()
}

/// `set`, which is of `path`, if it was recorded with pages of `page`.
fn fitting(set: WorkingSet, path: &Path, page: PageSize) -> Result<WorkingSet> {
    let theirs = set.page();
    if theirs == page {
        return Ok(set);
    }
    let text = format!(
        "{} was recorded with pages of {} bytes, and this host has pages of {}",
        path.display(),
        theirs.bytes(),
        page.bytes()
    );
    Err(Error::new(Kind::Usage, text))
}

impl Restore {
    /// Nothing comes but what threads wait for, until the recording is over.
    pub(super) fn begin_recording(&mut self) {
        if self.working_set.is_recording() {
            self.planner.set_policy(&RECORDING);
        }
    }

    /// Notes that a thread of `id` touches `addr`. To be called before the planner is told.
    pub(super) fn note_touch(&mut self, id: SpaceId, addr: Vaddr, now_us: u64) {
        if !self.working_set.watches() {
            return;
        }
        let Some(space) = self.planner.space(id) else {
            return;
        };
        if let Some((image, is_first)) = space.first_touch(addr) {
            self.working_set
                .touched(space.pid(), image, is_first, now_us);
        }
    }

    /// Ends a recording when it is time to: from then on the stream runs.
    pub(super) fn end_recording(&mut self) {
        let now_us = self.clock.now_us();
        let Some(recording) = &mut self.working_set.recording else {
            return;
        };
        if recording.over || !self.handover.is_finished() {
            return;
        }
        let length_us = recording.length_us;
        let until_us = *recording
            .until_us
            .get_or_insert_with(|| now_us.saturating_add(length_us));
        if now_us < until_us {
            return;
        }
        recording.over = true;
        tracing::info!(
            "the recording is over: {} pages were touched",
            recording.recorder.pages()
        );
        self.background.leave_to_faults(false);
        self.planner.set_policy(self.config.policy);
    }

    /// Writes what was recorded.
    pub(super) fn finish_recording(&mut self) -> Result<()> {
        let Some(recording) = self.working_set.recording.take() else {
            return Ok(());
        };
        let recorded = recording.recorder.finish(&recording.mappings);
        self.working_set.summary.recorded_pages = recorded.pages();
        let mut set = recording.earlier;
        set.merge(&recorded)
            .map_err(|error| Error::new(Kind::Usage, error.to_string()))?;
        tracing::info!(
            "{} pages recorded; the working set in {} names {} in {} runs",
            recorded.pages(),
            recording.file.path().display(),
            set.pages(),
            set.extents()
        );
        recording.file.complete(&set)
    }
}
