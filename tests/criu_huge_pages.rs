//! Private huge pages and dumps on top of each other: CRIU reads no parent for them, so no hole to a parent may
//! stand there, and what has one is finished before it is restored.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pageferry::criu::header::Target;
use pageferry::image::dir::ImageDir;
use pageferry::image::file::{Magic, MessageReader};
use pageferry::image::pagemap::PagemapDecoder;
use pageferry::image::proto::{PagemapEntry, PagemapHead};
use pageferry::units::PageRange;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::debian::Suite;
use testbed::hugepages::HugePages;
use testbed::images::{move_same_pages_to_parent, page_size};
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::migration::Dump;
use testbed::rounds::Rounds;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{for_each_criu, gate, workspace};

for_each_criu!(rounds_keep_huge_pages_and_finish_those_of_others);

/// The dumped processes' and the restored ones', with some to spare.
const HUGE_PAGES: u64 = 24;

/// PARENT of an entry's flags.
const IN_PARENT: u32 = 1;

fn load(test_dir: &TestDir) -> LoadSpec {
    let area = |mapping, pages| AreaSpec::new(mapping, pages, Content::Random);
    LoadSpec::new(
        test_dir.path("load"),
        vec![
            area(Mapping::Private, 600),
            area(Mapping::HugePrivate, 1024),
            area(Mapping::Locked, 200),
            area(Mapping::HugeMemfd, 512),
        ],
    )
}

/// Pages of the process in `images` that are holes to the parent: where CRIU reads no parents, and
/// elsewhere.
fn holes(images: &Path, pid: i32) -> Result<(u64, u64)> {
    let dir = ImageDir::open(images, page_size()?)?;
    let pid = u32::try_from(pid)?;
    let alone = dir.mappings(pid)?.without_parents;
    let huge: u64 = alone.iter().copied().map(PageRange::bytes).sum();
    ensure!(huge == 1536 * 4096, "{huge} bytes of huge pages");
    let file = std::fs::File::open(images.join(Target::Process(pid).pagemap_name()))?;
    let mut entries = MessageReader::new(std::io::BufReader::new(file), Magic::Pagemap)?;
    entries.read::<PagemapHead>()?.context("a head")?;
    let mut decoder = PagemapDecoder::new(dir.page());
    let (mut within, mut elsewhere) = (0, 0);
    while let Some(entry) = entries.read::<PagemapEntry>()? {
        let range = decoder.decode(&entry)?.range;
        if entry.flags.unwrap_or(0) & IN_PARENT != 0 {
            let common = alone.iter().filter_map(|other| other.intersect(range));
            let bytes: u64 = common.map(PageRange::bytes).sum();
            within += bytes / 4096;
            elsewhere += (range.bytes() - bytes) / 4096;
        }
    }
    Ok((within, elsewhere))
}

fn expect_no_bad_holes(images: &Path, pid: i32) -> Result<()> {
    let (within, elsewhere) = holes(images, pid)?;
    ensure!(within == 0, "{within} huge pages are holes to the parent");
    ensure!(elsewhere >= 600, "only {elsewhere} pages are in the parent");
    Ok(())
}

fn rounds_keep_huge_pages_and_finish_those_of_others(
    test_dir: &TestDir,
    criu: &Criu,
) -> Result<()> {
    let Some(_pages) = gate::need("room for huge pages", HugePages::allow(HUGE_PAGES)) else {
        return Ok(());
    };
    let mut rounds = Rounds::start(test_dir, criu, load(test_dir))?;
    let pid = rounds.load.pid().as_raw();
    for _ in 0..2 {
        rounds.dump(Make::Ours, &["--dedup-content"])?;
    }
    expect_no_bad_holes(&rounds.images(2), pid)?;

    // As whoever does not know of this makes them.
    let third = rounds.images(3);
    Dump::new(criu, rounds.load.pid(), &third)
        .leave_running()
        .run()?;
    move_same_pages_to_parent(&third, &rounds.images(1))?;
    ensure!(holes(&third, pid)?.0 == 1536, "the images are good");
    let finish = Command::new(workspace::binary("pageferry")?)
        .arg("finish")
        .arg(&third)
        .status()?;
    ensure!(finish.success(), "pageferry finish: {finish}");
    expect_no_bad_holes(&third, pid)
}

#[test]
fn a_forwarded_round_keeps_huge_pages() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let Some(_pages) = gate::need("room for huge pages", HugePages::allow(HUGE_PAGES)) else {
            return Ok(());
        };
        let load = Load::start(load(test_dir), None)?;
        let images = |round: u32| test_dir.path(&format!("round-{round}"));
        for round in 1..=2 {
            let mut options = Options::new(images(round)).log_to("receiver.log");
            if round > 1 {
                options = options.on_parent(&images(round - 1));
            }
            let receiver = PageServer::receiving(Make::Ours, &options)?;
            Dump::new(criu, load.pid(), images(round))
                .leave_running()
                .forwarded_to(receiver, &test_dir.path("sender"))?;
        }
        expect_no_bad_holes(&images(2), load.pid().as_raw())
    });
}
