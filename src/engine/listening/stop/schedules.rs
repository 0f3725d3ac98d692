//! Whoever runs first: a stop ends what is watched, whether it was requested before or after.

use shuttle::thread::spawn;

use super::*;
use crate::engine::schedules::each;

#[test]
fn a_stop_is_told_to_whatever_is_watched() {
    each(|| {
        let stop = Stop::default();
        let called = Arc::new(AtomicBool::new(false));
        let (watching, calls) = (stop.clone(), Arc::clone(&called));
        let watched = spawn(move || watching.call(move || calls.store(true, Ordering::SeqCst)));
        let passing = stop.clone();
        // One that comes and goes in the meantime is in nobody's way.
        let passed = spawn(move || drop(passing.call(|| ())));
        stop.request();
        drop(watched.join().unwrap());
        passed.join().unwrap();
        assert!(called.load(Ordering::SeqCst));
    });
}
