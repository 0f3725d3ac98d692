#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process with private memory forks. Then the two give that
# memory different protections by mprotect: the child's can be written. Both are dumped and restored plainly.
# Expected: each mapping has the protection again that it had at the dump.
# Seen: the child's mapping has the parent's protection and PROT_WRITE. A child that could execute it cannot any more, and one
# that could read it cannot according to its maps, if the parent could not. Contents are right, and nothing is logged as an error.
# CRIU restores such memory by a fork of the parent's mapping, and lets it be written for that.
# Why it matters: code that a forked worker generates (a JIT) crashes after a restore of which all tools say that it succeeded.
. "$(dirname "$0")/lib/common.bash"
need_root
for suite_version in trixie=4.1.1 sid=4.2.1 experimental=4.3; do
    debian "${suite_version%%=*}" "criu=${suite_version#*=}"
done
cat >"$TMP/forked.c" <<'C'
#include "memory.h"
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
enum { PAGES = 4 };
/* What /proc/self/maps says of the mapping at `at`. */
static void protection(char *at, char *out)
{
    char line[512];
    unsigned long first, last;
    FILE *maps = fopen("/proc/self/maps", "r");
    strcpy(out, "none");
    while (fgets(line, sizeof(line), maps)) {
        char found[8];
        if (sscanf(line, "%lx-%lx %7s", &first, &last, found) == 3 && first <= (unsigned long)at && (unsigned long)at < last)
            strcpy(out, found);
    }
    fclose(maps);
}
/* Memory apart from its neighbours. */
static char *alone(void)
{
    char *at = map((PAGES + 2) * PAGE);
    if (munmap(at, PAGE) || munmap(at + (PAGES + 1) * PAGE, PAGE))
        exit(77);
    return memset(at + PAGE, 'A', PAGES * PAGE);
}
/* DIR: makes a file "ready" there; the restored child (a file "go" appears) writes its mappings' protections to "said". */
int main(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]))
        return 77;
    alarm(100);
    char *code = alone(), *data = alone(), *same = alone();
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(100);
        if (mprotect(code, PAGES * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC))
            return 77;
        while (access("parent", F_OK))
            usleep(1000);
        close(open("ready", O_CREAT | O_WRONLY, 0600));
        while (access("go", F_OK))
            usleep(1000);
        char of_code[8], of_data[8], of_same[8];
        protection(code, of_code);
        protection(data, of_data);
        protection(same, of_same);
        FILE *said = fopen("said.new", "w");
        fprintf(said, "%s for rwxp, %s for rw-p, %s for rw-p that the parent has, too", of_code, of_data, of_same);
        fclose(said);
        rename("said.new", "said");
        while (1)
            pause();
    }
    if (mprotect(data, PAGES * PAGE, PROT_NONE))
        return 77;
    close(open("parent", O_CREAT | O_WRONLY, 0600));
    while (1)
        pause();
}
C
gcc -O1 -I"$LIB" -o "$TMP/forked" "$TMP/forked.c"
try() { # SUITE
    local dir pid
    dir=$(mktemp -d -p "$TMP")
    setsid "$TMP/forked" "$dir" </dev/null >"$TMP/said" 2>&1 &
    pid=$!
    STARTED+=("$pid")
    until [ -e "$dir/ready" ]; do sleep 0.02; done
    mkdir "$dir/images"
    run_in "$1" usr/sbin/criu dump -t "$pid" -D "$dir/images" -o dump.log >"$TMP/said" 2>&1 || { echo "not dumped"; return; }
    touch "$dir/go"
    unshare --pid --fork --kill-child --mount-proc "$TMP/$1/root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$TMP/$1/root/usr/lib/x86_64-linux-gnu" "$TMP/$1/root/usr/sbin/criu" \
        restore -D "$dir/images" -o restore.log >"$TMP/said" 2>&1 &
    STARTED+=("$!")
    for _ in $(seq 500); do [ ! -e "$dir/said" ] || break; sleep 0.02; done
    [ ! -e "$dir/said" ] && echo "nothing" || cat "$dir/said"
    kill -KILL "${STARTED[-1]}" 2>"$TMP/kill.err" || true
}
for suite in trixie sid experimental; do
    echo "$suite: $(try "$suite")"
done >"$TMP/output"
expect_output <<'END'
trixie: rw-p for rwxp, -w-p for rw-p, rw-p for rw-p that the parent has, too
sid: rw-p for rwxp, -w-p for rw-p, rw-p for rw-p that the parent has, too
experimental: rw-p for rwxp, -w-p for rw-p, rw-p for rw-p that the parent has, too
END
