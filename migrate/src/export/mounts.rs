//! The line of a mount table that tells of which directories an overlay consists. Pure.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::marks::Marks;

/// An overlay's directories.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Overlay {
    /// The writable layer; none if it is mounted to be read.
    pub(crate) upper: Option<PathBuf>,
    /// The layers below, topmost first.
    pub(super) lowers: Vec<PathBuf>,
    /// Directories that hold nothing but contents of files, to which layers point.
    pub(super) has_data_only: bool,
    pub(super) marks: Marks,
    /// What the options say of `redirect_dir` and `metacopy`; `None`: what the kernel does by default.
    pub(super) redirect_dir: Option<bool>,
    pub(super) metacopy: Option<bool>,
}

/// The overlay that is mounted at `point` in a mount table (`/proc/PID/mountinfo`); `None` if that is something else.
pub(crate) fn overlay_at(point: &[u8], table: &[u8]) -> Option<Overlay> {
    let mut found = None;
    for line in table.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        if fields.get(4).map(|field| unescaped(field)).as_deref() != Some(point) {
            continue;
        }
        // Optional fields end with a lone dash; type, source and options of the file system follow.
        let Some(dash) = fields.iter().position(|field| *field == b"-") else {
            continue;
        };
        // A later line is mounted over an earlier one.
        found = match (fields.get(dash + 1), fields.get(dash + 3)) {
            (Some(kind), Some(options)) if *kind == b"overlay" => Some(parse(options)),
            _ => None,
        };
    }
    found
}

fn parse(options: &[u8]) -> Overlay {
    let mut overlay = Overlay {
        upper: None,
        lowers: Vec::new(),
        has_data_only: false,
        marks: Marks::of_mount(false),
        redirect_dir: None,
        metacopy: None,
    };
    for option in options.split(|byte| *byte == b',') {
        let mut parts = option.splitn(2, |byte| *byte == b'=');
        let name = parts.next().unwrap_or_default();
        let value = unescaped(parts.next().unwrap_or_default());
        match name {
            b"upperdir" => overlay.upper = Some(path(value)),
            b"lowerdir" => {
                let (lowers, data) = split(&value);
                overlay.lowers.extend(lowers);
                overlay.has_data_only |= data;
            }
            // Layers that were added one by one are told one by one.
            b"lowerdir+" => overlay.lowers.push(path(value)),
            b"datadir+" => overlay.has_data_only = true,
            b"redirect_dir" => overlay.redirect_dir = Some(value == b"on"),
            b"metacopy" => overlay.metacopy = Some(value == b"on"),
            b"userxattr" => overlay.marks = Marks::of_mount(true),
            _ => {}
        }
    }
    overlay
}

fn path(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

/// Undoes the kernel's `\ooo`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (first, octal) {
            (b'\\', Some(byte)) => {
                plain.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// Splits at colons without a backslash before them, and tells whether two stood together: what follows those holds
/// contents alone.
fn split(list: &[u8]) -> (Vec<PathBuf>, bool) {
    let (mut dirs, mut dir, mut rest) = (Vec::new(), Vec::new(), list);
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        match (first, after.first()) {
            (b'\\', Some(&escaped)) => {
                dir.push(escaped);
                rest = after.get(1..).unwrap_or_default();
            }
            (b':', Some(b':')) => {
                dirs.push(path(dir));
                return (dirs, true);
            }
            (b':', _) => dirs.push(path(std::mem::take(&mut dir))),
            _ => dir.push(first),
        }
    }
    dirs.push(path(dir));
    (dirs, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
20 19 0:5 / /proc rw - proc proc rw
21 1 0:40 / / rw,relatime shared:1 master:2 - overlay overlay rw,lowerdir=/l/a\\134:b:/l/c\\040d,upperdir=/u\\054p,workdir=/w
22 21 0:41 / /dev rw - overlay overlay rw,upperdir=/other
";

    #[test]
    fn directories_are_read_with_their_escapes() {
        let overlay = overlay_at(b"/", TABLE.as_bytes()).unwrap();
        assert_eq!(overlay.upper, Some("/u,p".into()));
        assert_eq!(overlay.lowers, [PathBuf::from("/l/a:b"), "/l/c d".into()]);
        assert_eq!(
            (overlay.marks, overlay.has_data_only),
            (Marks::Trusted, false)
        );
    }

    #[test]
    fn layers_that_were_added_one_by_one() {
        let table = "1 1 0:4 / / ro - overlay x ro,lowerdir+=/a:b,lowerdir+=/c,datadir+=/d,userxattr,metacopy=on";
        let overlay = overlay_at(b"/", table.as_bytes()).unwrap();
        assert_eq!(overlay.upper, None);
        assert_eq!(overlay.lowers, [PathBuf::from("/a:b"), "/c".into()]);
        assert_eq!((overlay.marks, overlay.has_data_only), (Marks::User, true));
        assert_eq!((overlay.metacopy, overlay.redirect_dir), (Some(true), None));
        let table = "1 1 0:4 / / ro - overlay x ro,lowerdir=/a::/b";
        assert!(overlay_at(b"/", table.as_bytes()).unwrap().has_data_only);
    }

    #[test]
    fn the_mount_on_top_counts() {
        let covered = format!("{TABLE}30 21 0:3 / / rw - ext4 /dev/a rw\n");
        assert_eq!(overlay_at(b"/", covered.as_bytes()), None);
        for cut in 0..TABLE.len() {
            // No prefix of a table is a panic.
            overlay_at(b"/", &TABLE.as_bytes()[..cut]);
        }
    }
}
