//! All groups of mechanisms. A new mechanism is an entry here and a function that measures one round of it.

use serde_json::json;

use super::faults::{self, Place, Wait};
use super::fills::{self, Fill};
use super::write_protect::{self, Tracking};
use super::{Group, Mechanism, Scale, collapse};

/// Bytes of the pieces in which memory is filled.
const PIECES: [usize; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20];

/// Of how many pages one is written, in percent.
const DIRTY_PERCENT: [u32; 4] = [1, 10, 50, 100];

/// See the module's text.
pub(super) fn all() -> Vec<Group> {
    let mut all: Vec<Group> = Place::ALL.map(waits).into();
    all.extend(Fill::ALL.map(pieces));
    all.extend(DIRTY_PERCENT.map(tracking));
    all.push(collapsing());
    all
}

fn mechanism(
    name: impl Into<String>,
    round: impl FnMut(&Scale) -> anyhow::Result<Vec<f64>> + 'static,
) -> Mechanism {
    Mechanism {
        name: name.into(),
        round: Box::new(round),
    }
}

/// A fault on a missing page, until it is filled by UFFDIO_COPY and its thread runs again.
fn waits(place: Place) -> Group {
    let by = |wait: Wait| mechanism(wait.name(), move |scale| faults::round(wait, place, scale));
    Group {
        name: format!("fault, handler on {}", place.name()),
        conditions: json!({"part": "fault", "handler": place.name()}),
        metrics: &faults::METRICS,
        mechanisms: Wait::ALL.map(by).into(),
    }
}

/// Missing memory filled piece by piece, while nobody waits for it.
fn pieces(fill: Fill) -> Group {
    let by = |piece: usize| {
        let name = match piece {
            ..0x10_0000 => format!("{} KiB", piece >> 10),
            _ => format!("{} MiB", piece >> 20),
        };
        mechanism(name, move |scale| fills::round(fill, piece, scale))
    };
    Group {
        name: fill.name().to_owned(),
        conditions: json!({"part": "fill", "call": fill.name()}),
        metrics: &fills::METRICS,
        mechanisms: PIECES.map(by).into(),
    }
}

/// Which pages are written between two looks.
fn tracking(percent: u32) -> Group {
    let by = |tracking: Tracking| {
        mechanism(tracking.name(), move |scale| {
            write_protect::round(tracking, percent, scale)
        })
    };
    Group {
        name: format!("write tracking, {percent} % of pages written"),
        conditions: json!({"part": "write tracking", "percent": percent}),
        metrics: &write_protect::METRICS,
        mechanisms: Tracking::ALL.map(by).into(),
    }
}

/// Small pages put together into huge ones.
fn collapsing() -> Group {
    let by = |way: collapse::Way| mechanism(way.name(), move |scale| collapse::round(way, scale));
    Group {
        name: "MADV_COLLAPSE, regions of 2 MiB".to_owned(),
        conditions: json!({"part": "collapse"}),
        metrics: &collapse::METRICS,
        mechanisms: collapse::Way::ALL.map(by).into(),
    }
}
