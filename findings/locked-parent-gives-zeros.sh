#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process locks memory page by page (MLOCK_ONFAULT), touches half
# of it and forks. The child, whose memory is not locked, writes pages in the other half. Both are dumped and restored.
# Expected: `criu restore --lazy-pages` gives the child its pages, as a plain restore does.
# Seen: the child reads zeros in place of pages that the parent never had, and nothing tells of it. The parent's mapping is
# restored as locked, which fills it with zero pages; the child gets them by a fork, so that its pages are not missing there.
# Why it matters: silent loss of memory for what locks its memory and forks workers, as `mlockall(MCL_ONFAULT)` programs do.
. "$(dirname "$0")/lib/common.bash"
need_root
for suite_version in trixie=4.1.1 sid=4.2.1 experimental=4.3; do
    debian "${suite_version%%=*}" "criu=${suite_version#*=}"
done
cat >"$TMP/locked.c" <<'C'
#include "memory.h"
#include <signal.h>
#include <sys/prctl.h>
enum { PAGES = 64 };
/* DIR: makes a file "ready" there; the restored child (a file "go" appears) writes what it found to "said". */
int main(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]))
        return 77;
    alarm(100);
    char *at = map(PAGES * PAGE);
    if (mlock2(at, PAGES * PAGE, MLOCK_ONFAULT))
        return 77;
    for (int n = 0; n < PAGES / 2; n++)
        at[n * PAGE] = 'A';
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(100);
        for (int n = 0; n < PAGES; n += 2)
            at[n * PAGE] = 'B';
        close(open("ready", O_CREAT | O_WRONLY, 0600));
        while (access("go", F_OK))
            usleep(1000);
        int zero = 0, other = 0;
        for (int n = 0; n < PAGES; n++) {
            char expected = n % 2 == 0 ? 'B' : n < PAGES / 2 ? 'A' : 0, found = at[n * PAGE];
            zero += found != expected && !found;
            other += found != expected && found;
        }
        FILE *said = fopen("said.new", "w");
        fprintf(said, "%d pages are zero, %d another's", zero, other);
        fclose(said);
        rename("said.new", "said");
    }
    while (1)
        pause();
}
C
gcc -O1 -I"$LIB" -o "$TMP/locked" "$TMP/locked.c"
try() { # SUITE lazily|plainly
    local dir options=() server="" pid
    dir=$(mktemp -d -p "$TMP")
    setsid "$TMP/locked" "$dir" </dev/null >"$TMP/said" 2>&1 &
    pid=$!
    STARTED+=("$pid")
    until [ -e "$dir/ready" ]; do sleep 0.02; done
    mkdir "$dir/images"
    run_in "$1" usr/sbin/criu dump -t "$pid" -D "$dir/images" -o dump.log >"$TMP/said" 2>&1 || { echo "not dumped"; return; }
    touch "$dir/go"
    local criu=("$TMP/$1/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$TMP/$1/root/usr/lib/x86_64-linux-gnu"
        "$TMP/$1/root/usr/sbin/criu")
    if [ "$2" = lazily ]; then
        "${criu[@]}" lazy-pages -D "$dir/images" -o lazy.log >"$TMP/said" 2>&1 &
        STARTED+=("$!")
        until [ -S "$dir/images/lazy-pages.socket" ]; do sleep 0.02; done
        options=(--lazy-pages)
    fi
    unshare --pid --fork --kill-child --mount-proc "${criu[@]}" restore "${options[@]}" -D "$dir/images" -o restore.log \
        >"$TMP/said" 2>&1 &
    server=$!
    STARTED+=("$server")
    for _ in $(seq 500); do [ ! -e "$dir/said" ] || break; sleep 0.02; done
    [ ! -e "$dir/said" ] && echo "nothing" || cat "$dir/said"
    kill -KILL "$server" 2>"$TMP/kill.err" || true
}
for suite in trixie sid experimental; do
    for how in plainly lazily; do
        echo "$suite, restored $how: $(try "$suite" "$how")"
    done
done >"$TMP/output"
expect_output <<'END'
trixie, restored plainly: 0 pages are zero, 0 another's
trixie, restored lazily: 16 pages are zero, 0 another's
sid, restored plainly: 0 pages are zero, 0 another's
sid, restored lazily: 16 pages are zero, 0 another's
experimental, restored plainly: 0 pages are zero, 0 another's
experimental, restored lazily: 16 pages are zero, 0 another's
END
