//! The downtimes as a picture: a group of bars for each case, on a logarithmic scale.

use std::fmt::Write;

use super::super::rounds::Contend;
use super::{CaseResult, Contender, Metric};

/// One case's bars.
pub(super) struct Group {
    title: String,
    /// Name, and ms.
    bars: Vec<(&'static str, f64)>,
}

impl Group {
    pub(super) fn of(result: &CaseResult) -> Group {
        let bar = |&who: &Contender| Some((who.name(), result.median(who, Metric::Pause)?.value));
        let mut bars: Vec<_> = Contender::ALL.iter().filter_map(bar).collect();
        let floor = result.median(Contender::CriuPostCopy, Metric::Floor);
        bars.extend(floor.map(|floor| ("floor", floor.value)));
        Group {
            title: result.case.describe(),
            bars,
        }
    }
}

const WIDTH: f64 = 760.0;
const NAMES: f64 = 130.0;
const VALUES: f64 = 80.0;
const ROW: f64 = 20.0;
const TITLE: f64 = 34.0;
/// Where the scale begins and ends, ms.
const LEAST_MS: f64 = 10.0;
const MOST_MS: f64 = 100_000.0;

/// All groups below each other.
pub(super) fn draw(groups: &[Group]) -> String {
    #[allow(clippy::cast_precision_loss)]
    let height_of = |group: &Group| TITLE + ROW * group.bars.len() as f64;
    let height: f64 = groups.iter().map(height_of).sum::<f64>() + ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut y = 0.0;
    for group in groups {
        let title = &group.title;
        let at = y + TITLE - 12.0;
        // A String takes whatever is written.
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{at}\" font-weight=\"bold\">{title}: pause of the process, ms (logarithmic)</text>"
        );
        y += TITLE;
        for (name, ms) in &group.bars {
            let share = (ms.max(LEAST_MS) / LEAST_MS).log10() / (MOST_MS / LEAST_MS).log10();
            let length = (share.min(1.0) * (WIDTH - NAMES - VALUES)).max(1.0);
            let color = match *name {
                "floor" => "#9e9e9e",
                name if name.starts_with("CRIU") => "#c0703a",
                _ => "#3a6ec0",
            };
            let (text, end) = (y + 14.0, NAMES + length + 4.0);
            let _ = writeln!(
                svg,
                "<text x=\"4\" y=\"{text}\">{name}</text>\
                 <rect x=\"{NAMES}\" y=\"{}\" width=\"{length:.1}\" height=\"14\" fill=\"{color}\"/>\
                 <text x=\"{end:.1}\" y=\"{text}\">{ms:.0}</text>",
                y + 3.0
            );
            y += ROW;
        }
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_drawn_with_its_value() {
        let group = Group {
            title: "64 MiB".to_owned(),
            bars: vec![("hybrid", 60.0), ("CRIU cold", 9000.0), ("floor", 5.0)],
        };
        let svg = draw(&[group]);
        assert_eq!(svg.matches("<rect").count(), 4);
        for value in ["60", "9000", "5"] {
            assert!(svg.contains(&format!(">{value}</text>")), "{svg}");
        }
    }
}
