//! Whoever runs first: the end of a dump is decided once, and everybody who waits for it hears of it.

use std::sync::Arc;

use shuttle::thread::spawn;

use super::*;
use crate::engine::schedules::each;

fn table(only_one: bool) -> Arc<ClientTable> {
    Arc::new(ClientTable::new(ClientTimeouts {
        first: None,
        next: Some(Duration::ZERO),
        only_one,
    }))
}

#[test]
fn a_client_is_in_time_or_the_dump_was_given_up() {
    each(|| {
        let table = table(true);
        let clients = [(); 2].map(|()| {
            let table = Arc::clone(&table);
            spawn(move || table.enter().confirm())
        });
        let gives_up = Arc::clone(&table);
        let had_confirmed = spawn(move || gives_up.give_up()).join().unwrap();
        let in_time = clients.map(|client| client.join().unwrap());
        // What the dump is told is what a client may rely on.
        assert_eq!(had_confirmed, in_time.contains(&true));
        assert_eq!(table.confirmed(), had_confirmed);
    });
}

#[test]
fn whoever_waits_sees_the_end() {
    each(|| {
        let table = table(true);
        let served = Arc::clone(&table);
        let client = spawn(move || {
            let mut entry = served.enter();
            let in_time = entry.confirm();
            let confirmed = in_time.then(|| entry.wait_for_dump());
            entry.leave_for_good();
            (in_time, confirmed)
        });
        let asked = Arc::clone(&table);
        let dump = spawn(move || {
            let outcome = asked.wait_for_outcome(|| false);
            asked.dump_ended(outcome == DumpOutcome::Confirmed);
            asked.wait_until_gone(|| false, false);
            outcome
        });
        assert_eq!(client.join().unwrap(), (true, Some(true)));
        assert_eq!(dump.join().unwrap(), DumpOutcome::Confirmed);
    });
}

#[test]
fn a_client_that_fails_ends_the_wait() {
    each(|| {
        let table = table(true);
        let [fails, asked] = [(); 2].map(|()| Arc::clone(&table));
        let client = spawn(move || {
            let mut entry = fails.enter();
            entry.leave_for_good();
        });
        let dump = spawn(move || asked.wait_for_outcome(|| false));
        client.join().unwrap();
        assert_eq!(dump.join().unwrap(), DumpOutcome::Failed);
        assert!(!table.enter().confirm());
    });
}
