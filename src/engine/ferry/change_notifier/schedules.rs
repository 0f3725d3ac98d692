//! Whoever runs first: nobody who has looked before a change sleeps through it.

use std::sync::Arc;

use shuttle::thread::spawn;

use super::*;
use crate::engine::schedules::each;
use crate::sync::AtomicBool;

#[test]
fn no_change_is_slept_through() {
    each(|| {
        let notifier = Arc::new(ChangeNotifier::default());
        let changed = Arc::new(AtomicBool::new(false));
        let waiting = [(); 2].map(|()| {
            let (notifier, changed) = (Arc::clone(&notifier), Arc::clone(&changed));
            spawn(move || {
                loop {
                    let seen = notifier.notified();
                    if changed.load(std::sync::atomic::Ordering::SeqCst) {
                        return;
                    }
                    // Under shuttle no time passes: it ends by a notification alone.
                    notifier.wait(seen, Duration::MAX);
                }
            })
        });
        changed.store(true, std::sync::atomic::Ordering::SeqCst);
        notifier.notify();
        for thread in waiting {
            thread.join().unwrap();
        }
    });
}
