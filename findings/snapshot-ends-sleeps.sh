#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process is dumped with --leave-running, as for a snapshot,
# while it and its children wait for a time. None has a handler for a signal.
# Expected: the waits go on. The kernel resumes nanosleep, poll and a futex with a timeout by itself after SIGSTOP and
# SIGCONT or a tracer's stop; it does not those of signal(7)'s list (epoll_wait and others).
# Seen: all of nanosleep, poll and futex fail with EINTR, as in a restored process. The program sleeps too short, once for
# each snapshot. Waits until an absolute time by clock_nanosleep, and those without a limit, go on.
# Why it matters: a program without handlers need not expect EINTR here. sleep(3) returns early, and sem_timedwait and
# poll report an error, in the process that a snapshot was not to disturb.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile sleepers <<'C'
#include "restored.h"
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <time.h>
enum { WAYS = 6, LONG = 600 };
static const char *const names[] = { "nanosleep", "poll", "futex with a timeout", "futex without one",
                                     "clock_nanosleep, absolute", "read" };
static volatile struct state { int ready, ended, error; } *states;
static int wait_by(int way)
{
    uint32_t word = 0;
    int ends[2];
    char byte;
    struct timespec span = { .tv_sec = LONG }, until;
    if (pipe(ends) || clock_gettime(CLOCK_MONOTONIC, &until))
        exit(77);
    until.tv_sec += LONG;
    struct pollfd nothing = { .fd = ends[0], .events = POLLIN };
    switch (way) {
    case 0: return nanosleep(&span, NULL);
    case 1: return poll(&nothing, 1, LONG * 1000);
    case 2: return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &span, NULL, 0);
    case 3: return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    case 4: return errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL), -!!errno;
    default: return read(ends[0], &byte, 1);
    }
}
static char state_of(pid_t pid)
{
    char path[64], line[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *stat = fopen(path, "r");
    if (stat && fgets(line, sizeof line, stat))
        line[0] = strrchr(line, ')')[2];
    if (stat)
        fclose(stat);
    return line[0];
}
static void until_asleep(const pid_t *pids)
{
    for (int way = 0; way < WAYS; way++)
        while (!states[way].ended && (!states[way].ready || state_of(pids[way]) != 'S'))
            usleep(1000);
}
static void report(FILE *out)
{
    for (int way = 0; way < WAYS; way++)
        fprintf(out, "%s: %s\n", names[way],
                !states[way].ended ? "waits" : states[way].error == EINTR ? "EINTR" : "ended");
    fflush(out);
}
int main(int argc, char **argv)
{
    pid_t pids[WAYS];
    live_in(argc, argv);
    states = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int way = 0; way < WAYS; way++)
        if (!(pids[way] = fork())) {
            states[way].ready = 1;
            int outcome = wait_by(way);
            states[way].error = outcome < 0 ? errno : 0;
            states[way].ended = 1;
            _exit(0);
        }
    until_asleep(pids);
    for (int way = 0; way < WAYS; way++)
        kill(pids[way], SIGSTOP);
    for (int way = 0; way < WAYS; way++) {
        while (state_of(pids[way]) != 'T')
            usleep(1000);
        kill(pids[way], SIGCONT);
    }
    until_asleep(pids);
    report(stdout);
    until_dumped();
    until_asleep(pids);
    FILE *out = seen();
    report(out);
    end_of_seen(out);
    for (int way = 0; way < WAYS; way++)
        kill(pids[way], SIGKILL);
    return 0;
}
C
for version in $versions; do
    start sleepers
    dump "${version%%=*}" --leave-running \
        || { cat "$dir/images/dump.log" >&2; cannot "criu dump fails on this machine"; }
    touch "$dir/go"
    until [ -e "$dir/seen" ]; do sleep 0.02; done
    [ "$version" != trixie=4.1.1 ] || sed "s/^/SIGSTOP and SIGCONT: /" "$dir/said"
    sed "s/^/dump by ${version#*=}: /" "$dir/seen"
done >"$TMP/output"
expect_output <<'END'
SIGSTOP and SIGCONT: nanosleep: waits
SIGSTOP and SIGCONT: poll: waits
SIGSTOP and SIGCONT: futex with a timeout: waits
SIGSTOP and SIGCONT: futex without one: waits
SIGSTOP and SIGCONT: clock_nanosleep, absolute: waits
SIGSTOP and SIGCONT: read: waits
dump by 4.1.1: nanosleep: EINTR
dump by 4.1.1: poll: EINTR
dump by 4.1.1: futex with a timeout: EINTR
dump by 4.1.1: futex without one: waits
dump by 4.1.1: clock_nanosleep, absolute: waits
dump by 4.1.1: read: waits
dump by 4.2.1: nanosleep: EINTR
dump by 4.2.1: poll: EINTR
dump by 4.2.1: futex with a timeout: EINTR
dump by 4.2.1: futex without one: waits
dump by 4.2.1: clock_nanosleep, absolute: waits
dump by 4.2.1: read: waits
dump by 4.3: nanosleep: EINTR
dump by 4.3: poll: EINTR
dump by 4.3: futex with a timeout: EINTR
dump by 4.3: futex without one: waits
dump by 4.3: clock_nanosleep, absolute: waits
dump by 4.3: read: waits
END
