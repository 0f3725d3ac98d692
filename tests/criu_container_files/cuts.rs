//! A connection that breaks in the middle of a round of files: it goes on from there, or the container stays.

use std::fs;

use anyhow::{Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

use crate::expect_nothing_there;
use crate::writing::Writing;

/// Resets connections to the agent, and refuses new ones, once so much has come over them.
const CUT: &str = "\
nft add table inet cut
nft add chain inet cut in '{ type filter hook input priority 0; }'
nft add rule inet cut in tcp dport 9191 quota over 8 mbytes reject with tcp reset";

/// Ends that, once the source has seen it.
const MEND: &str = "\
(until grep -q 'sent again' /shared/source/cut.log; do sleep 0.05; done; nft delete table inet cut) \
    < /dev/null > /dev/null 2>&1 &";

fn a_cut_connection_is_made_again(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(mut writing) = Writing::start(test_dir, criu, "cut")? else {
        return Ok(());
    };
    let big: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(16 << 20)
        .collect();
    fs::write(writing.root(0).join("big"), &big)?;
    // Without an end: the container stays, and the destination gives up by itself.
    writing.pair.machines[1].script(CUT)?;
    let given_up = writing.migrate(
        0,
        "given-up",
        "--mode cold --volume /root/volume --timeout 4s",
    );
    ensure!(given_up.is_err(), "{given_up:?}");
    writing.send(0, "verify")?;
    ensure!(writing.status(0)? == "running");
    writing.pair.machines[1].script("nft delete table inet cut")?;
    wait::until("the destination to give up", GENEROUS, || {
        Ok(expect_nothing_there(&writing).is_ok().then_some(()))
    })?;
    // And one that ends.
    writing.pair.machines[1].script(CUT)?;
    writing.pair.machines[1].script(MEND)?;
    let moved = writing.migrate(0, "cut", "--mode cold --volume /root/volume");
    let moved = moved.map_err(anyhow::Error::msg)?;
    ensure!(moved["result"] == "moved", "{moved}");
    writing.send(1, "verify")?;
    ensure!(fs::read(writing.root(1).join("big"))? == big);
    Ok(())
}

#[test]
fn a_round_goes_on_where_its_connection_broke() {
    with_criu(Suite::Sid, a_cut_connection_is_made_again);
}
