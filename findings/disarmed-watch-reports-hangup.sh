#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A program watches sockets with EPOLLONESHOT, as those do
# that have several threads at one epoll: after an event the watch is silent until the thread that handles it has armed it
# again. It is dumped while one is being handled; after the restore the peer closes its end.
# Expected: the watch is as silent as before, whatever happens to the socket.
# Seen: EPOLLHUP is reported at once. In fdinfo the silent watch has no event but EPOLLONESHOT; it is added again with
# that mask, and the kernel puts EPOLLERR and EPOLLHUP to whatever is added.
# Why it matters: a second thread gets a socket that the first one still works on, and closes it.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile pool <<'C'
#include "restored.h"
#include <sys/epoll.h>
#include <sys/socket.h>
/* A watched socket, whose one event has been taken by somebody. */
static int handled(int ends[2])
{
    int epoll = epoll_create1(0);
    if (epoll < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        exit(77);
    struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT };
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event) || write(ends[1], "x", 1) != 1
        || epoll_wait(epoll, &event, 1, 0) != 1)
        exit(77);
    return epoll;
}
static void hang_up(FILE *out, int epoll, int end)
{
    struct epoll_event event = { 0 };
    int before = epoll_wait(epoll, &event, 1, 0);
    close(end);
    int after = epoll_wait(epoll, &event, 1, 0);
    fprintf(out, "events of the silent watch: %d, and %d once the peer has closed%s\n", before, after,
            event.events & EPOLLHUP ? " (EPOLLHUP)" : "");
}
int main(int argc, char **argv)
{
    int ends[2], others[2];
    live_in(argc, argv);
    hang_up(stdout, handled(others), others[1]);
    fflush(stdout);
    int epoll = handled(ends);
    until_dumped();
    FILE *out = seen();
    hang_up(out, epoll, ends[1]);
    end_of_seen(out);
    return 0;
}
C
for version in $versions; do
    restored_by "$version" pool >"$TMP/after"
    [ "$version" != trixie=4.1.1 ] || sed "s/^/not dumped: /" "$dir/said"
    cat "$TMP/after"
done >"$TMP/output"
expect_output <<'END'
not dumped: events of the silent watch: 0, and 0 once the peer has closed
4.1.1: events of the silent watch: 0, and 1 once the peer has closed (EPOLLHUP)
4.2.1: events of the silent watch: 0, and 1 once the peer has closed (EPOLLHUP)
4.3: events of the silent watch: 0, and 1 once the peer has closed (EPOLLHUP)
END
