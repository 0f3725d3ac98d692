//! Whoever runs first: who waits for pages gets them when they have come, or hears that they do not come.

use shuttle::thread::spawn;

use super::*;
use crate::engine::schedules::each;
use crate::units::Vaddr;

const PAGE: PageSize = PageSize::KIB_4;

const PAGES: u64 = 12;

/// Pages of pid 7, each apart from the next.
fn page(number: u64) -> PageRange {
    let start = (10 + 2 * number) << 12;
    PageRange::new(start, start + 4096)
}

fn memory() -> Arc<DumpMemory> {
    let plan = DrainPlan::new(PAGE, (0..PAGES).map(|number| (7, page(number))));
    Arc::new(DumpMemory {
        page: PAGE,
        file: MemoryFile::new(PAGES << 12, None).unwrap(),
        processes: None,
        state: Mutex::new(State::new(plan)),
        changed: Condvar::new(),
    })
}

/// A page's first byte says which it is.
fn content(range: PageRange) -> Vec<u8> {
    let pages = range.start().get() >> 12..range.end().get() >> 12;
    pages
        .flat_map(|page| [u8::try_from(page).unwrap(); 4096])
        .collect()
}

fn drain(memory: &DumpMemory, most: u64) {
    let mut again = true;
    for _ in 0..most {
        let Some((pid, range)) = memory.next_request() else {
            return;
        };
        if std::mem::take(&mut again) {
            // The first answer was short.
            memory.give_back(pid, range);
            continue;
        }
        memory.store(pid, range, &content(range)).unwrap();
    }
}

fn expect(memory: &DumpMemory, numbers: Range<u64>, number: u64) {
    assert!(numbers.contains(&number), "{numbers:?}");
    let mut bytes = vec![0; 4096];
    memory.read(number..number + 1, &mut bytes).unwrap();
    assert_eq!(bytes, content(page(number)));
}

#[test]
fn who_waits_gets_what_comes() {
    each(|| {
        let memory = memory();
        let waiting = [PAGES - 1, 0, PAGES / 2].map(|number| {
            let memory = Arc::clone(&memory);
            spawn(move || {
                let numbers = memory.wait_for(7, page(number)).unwrap();
                expect(&memory, numbers, number);
            })
        });
        let faults = Arc::clone(&memory);
        let faulting = spawn(move || {
            let fault = Fault {
                target: Target::Process(7),
                vaddr: Vaddr(page(3).start().get()),
                around: page(3),
                in_full: false,
                once_more: false,
            };
            let (numbers, range) = faults.find(&fault).unwrap();
            assert_eq!(range, page(3));
            expect(&faults, numbers, 3);
        });
        drain(&memory, u64::MAX);
        for thread in waiting.into_iter().chain([faulting]) {
            thread.join().unwrap();
        }
    });
}

#[test]
fn whoever_waits_sees_that_nothing_more_comes() {
    each(|| {
        let memory = memory();
        let waiting = [PAGES - 1, 0, PAGES / 2].map(|number| {
            let memory = Arc::clone(&memory);
            spawn(move || match memory.wait_for(7, page(number)) {
                Ok(numbers) => expect(&memory, numbers, number),
                Err(error) => assert_eq!(error.kind(), Kind::PeerLost),
            })
        });
        // A page at most: two threads or more wait to the end.
        drain(&memory, 2);
        memory.fail("the dump has gone");
        for thread in waiting {
            thread.join().unwrap();
        }
    });
}
