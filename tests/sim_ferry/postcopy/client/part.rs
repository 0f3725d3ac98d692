//! The client as its connections see it.

use std::time::Duration;

use pageferry::ferry::frame::Kind;
use pageferry::ferry::hello::{Fail, FailCode, Hello};
use pageferry::ferry::postcopy_receiver::PostcopyError;

use super::{Client, End, HASHES_A_FRAME};
use crate::parts::{Part, Status, StreamKey};

impl Part for Client {
    fn stream_up(&mut self, _key: StreamKey, _peer: &Hello) {}

    /// Both connections are gone.
    fn stream_down(&mut self, _key: StreamKey) {
        if std::mem::take(&mut self.attached) {
            let asked = self.receiver.asked_pages();
            self.seen.add("page lost with its connection", asked);
            self.receiver.detach();
            self.planner.give_back_all();
            self.questions.clear();
            self.open_in_full.clear();
        }
    }

    fn frame(&mut self, key: StreamKey, kind: Kind, number: u64, body: &[u8]) -> bool {
        if self.end.is_some() || self.aborted {
            return false;
        }
        let event = match key.for_faults {
            true => self.receiver.handle_answer(kind, number, body),
            false => self.receiver.handle_pushed(kind, number, body),
        };
        match event {
            Ok(event) => self.handle(event),
            Err(PostcopyError::Ended(fail)) => self.lost(&fail.text),
            Err(error) => panic!("the forwarder broke the protocol: {error}"),
        }
        self.ask();
        true
    }

    fn poll(&mut self, key: StreamKey) -> Option<Vec<u8>> {
        if key.for_faults {
            return self.questions.pop_front();
        }
        if let Some(words) = self.receiver.poll(0) {
            self.said_failure = self.aborted;
            return Some(words);
        }
        while let Some(wanted) = self.receiver.wanted_hashes() {
            let step = self.hash(wanted);
            let words = self.receiver.send_hashes(step, HASHES_A_FRAME);
            if words.is_some() {
                return words;
            }
        }
        None
    }

    fn lost(&mut self, why: &str) {
        self.end.get_or_insert(match self.closes_at.is_some() {
            true => End::Unconfirmed,
            false => End::Failed(why.to_owned()),
        });
    }

    /// The restore fails: the processes are killed.
    fn abort(&mut self) {
        if self.closes_at.is_none() {
            self.aborted = true;
            self.receiver
                .fail(Fail::new(FailCode::Receiver, "the restore failed"));
        }
    }

    fn failure(&self) -> Option<Fail> {
        None
    }

    fn status(&self) -> Status {
        match &self.end {
            _ if self.aborted && (self.said_failure || !self.attached) => {
                Status::Failed("the restore failed".to_owned())
            }
            None => Status::Going,
            Some(End::Success) => Status::Done,
            Some(end) => Status::Failed(format!("{end:?}")),
        }
    }

    fn tick(&mut self, now: Duration) {
        self.now = now;
        if self.closes_at.is_some_and(|at| at <= now) {
            self.lost("the source does not answer");
        }
        if now >= self.restored_at {
            self.receiver.may_install();
        }
        self.acknowledge(now);
        if now >= self.acts_at && self.closes_at.is_none() && !self.aborted {
            self.acts_at = now + Duration::from_millis(self.rng.u64(1..60));
            self.act();
        }
        self.ask();
    }

    fn next_tick(&self) -> Option<Duration> {
        match self.closes_at {
            Some(at) => Some(at),
            None => Some(self.acts_at),
        }
    }
}
