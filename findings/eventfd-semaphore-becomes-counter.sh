#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process has an eventfd made with EFD_SEMAPHORE: each read
# takes one of what is in it, so that as many threads may pass as were let in.
# Expected: the kernel shows the flag (eventfd-semaphore in /proc/PID/fdinfo since Linux 6.5), so the restore sets it.
# Seen: it is not restored. After the restore one read takes the whole count, and says that number instead of 1; the
# second read finds nothing. Neither the dump nor the restore logs a word.
# Why it matters: of five permits one waiter gets all, and the other four wait for ever.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile permits <<'C'
#include "restored.h"
#include <sys/eventfd.h>
static void take(FILE *out, int permits)
{
    uint64_t taken = 0;
    if (read(permits, &taken, sizeof taken) == sizeof taken)
        fprintf(out, "a read takes %lu\n", taken);
    else
        fprintf(out, "a read takes nothing\n");
}
int main(int argc, char **argv)
{
    live_in(argc, argv);
    int permits = eventfd(5, EFD_SEMAPHORE | EFD_NONBLOCK);
    if (permits < 0)
        return 77;
    take(stdout, permits);
    fflush(stdout);
    until_dumped();
    FILE *out = seen();
    take(out, permits);
    take(out, permits);
    end_of_seen(out);
    return 0;
}
C
for version in $versions; do
    restored_by "$version" permits >"$TMP/after"
    sed "s/^/before: /" "$dir/said"
    cat "$TMP/after"
done >"$TMP/output"
expect_output <<'END'
before: a read takes 1
4.1.1: a read takes 4
4.1.1: a read takes nothing
before: a read takes 1
4.2.1: a read takes 4
4.2.1: a read takes nothing
before: a read takes 1
4.3: a read takes 4
4.3: a read takes nothing
END
