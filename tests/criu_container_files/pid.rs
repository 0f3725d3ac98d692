//! Volumes of processes that are no container.

use anyhow::{Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;

use crate::writing::Writing;

/// Starts a process that changes files in a volume, with a pid that is free on both hosts.
const START: &str = "\
cp /root/bundles/c1/rootfs/bin/filewriter .
mkdir own-control
echo 7000 > /proc/sys/kernel/ns_last_pid
setsid ./filewriter /root/own /root/own-control < /dev/null > /dev/null 2>&1 &
echo $! > own.pid
until [ -s own/log ]; do sleep 0.05; done";

/// Tells it what to do.
fn send(writing: &Writing, host: usize, number: u32, word: &str) -> Result<()> {
    let answer = writing.pair.machines[host].output(&format!(
        "cd own-control; echo '{number} {word}' > next; mv next command\n\
         for try in $(seq 3000); do [ ! -e answer-{number} ] || break; sleep 0.02; done; cat answer-{number}"
    ))?;
    ensure!(answer == "right", "{word}: {answer}");
    Ok(())
}

fn volumes_of_a_process_move(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let Some(writing) = Writing::start(test_dir, criu, "pid")? else {
        return Ok(());
    };
    writing.pair.machines[0].script(START)?;
    send(&writing, 0, 1, "verify")?;
    // The program itself is at the destination, as for every process.
    writing.pair.machines[1].script("cp /shared/source/filewriter .")?;
    let output = writing.pair.machines[0].output(
        "pageferry migrate --pid $(cat own.pid) --to $DESTINATION:9191 --serve-on $SOURCE --state-dir /root/state \
         --mode hybrid --max-rounds 2 --volume /root/own --volume /root/own-control --report /root/own.json \
         --criu /criu/criu > own-move.log 2>&1 || { tail -n 20 own-move.log; echo failed; }",
    )?;
    ensure!(!output.ends_with("failed"), "{output}");
    send(&writing, 1, 2, "verify")?;
    send(&writing, 1, 3, "pause")?;
    let left =
        writing.pair.machines[0].output("kill -0 $(cat own.pid) 2> /dev/null || echo gone")?;
    ensure!(left == "gone", "{left}");
    Ok(())
}

#[test]
fn volumes_move_with_a_process() {
    with_criu(Suite::Sid, volumes_of_a_process_move);
}
