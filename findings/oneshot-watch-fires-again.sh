#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process has two inotify watches: one with IN_ONESHOT, to
# be told of the first new file alone, and one with IN_EXCL_UNLINK, not to be told of files that have lost their names.
# Expected: the watches come back as they were, with these flags: they stand in the mask in /proc/PID/fdinfo.
# Seen: both flags are lost, without a word. The first watch tells of every new file and never ends (no IN_IGNORED), the
# second of what is written to files that were deleted.
# Why it matters: programs use IN_ONESHOT where a second event would start the same work twice.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile watcher <<'C'
#include "restored.h"
#include <sys/inotify.h>
static void create(const char *name) { close(open(name, O_CREAT | O_WRONLY, 0600)); }
/* Counts the events of a mask that have come for a watch. */
static void count(FILE *out, const char *what, int inotify, uint32_t mask)
{
    char buffer[4096] __attribute__((aligned(8)));
    int told = 0, ended = 0;
    ssize_t len = read(inotify, buffer, sizeof buffer);
    for (ssize_t at = 0; at < len;) {
        struct inotify_event *event = (void *)(buffer + at);
        told += !!(event->mask & mask);
        ended += !!(event->mask & IN_IGNORED);
        at += sizeof *event + event->len;
    }
    fprintf(out, "%s: %d%s\n", what, told, ended ? ", and its end" : "");
}
/* What the two watches tell of the same three steps. */
static void try(FILE *out, const char *dir, int once, int named)
{
    char first[64], second[64];
    snprintf(first, sizeof first, "%s/first", dir);
    snprintf(second, sizeof second, "%s/second", dir);
    create(first);
    create(second);
    count(out, "two new files, IN_ONESHOT", once, IN_CREATE);
    int file = open(first, O_WRONLY);
    unlink(first);
    if (write(file, "x", 1) != 1)
        exit(77);
    count(out, "a write to a file without a name, IN_EXCL_UNLINK", named, IN_MODIFY);
}
static int watch(const char *dir, uint32_t mask)
{
    int inotify = inotify_init1(IN_NONBLOCK);
    if (inotify < 0 || inotify_add_watch(inotify, dir, mask) < 0)
        exit(77);
    return inotify;
}
int main(int argc, char **argv)
{
    live_in(argc, argv);
    if (mkdir("a", 0700) || mkdir("b", 0700))
        return 77;
    try(stdout, "a", watch("a", IN_CREATE | IN_ONESHOT), watch("a", IN_MODIFY | IN_EXCL_UNLINK));
    fflush(stdout);
    int once = watch("b", IN_CREATE | IN_ONESHOT), named = watch("b", IN_MODIFY | IN_EXCL_UNLINK);
    until_dumped();
    FILE *out = seen();
    try(out, "b", once, named);
    end_of_seen(out);
    return 0;
}
C
for version in $versions; do
    restored_by "$version" watcher >"$TMP/after"
    [ "$version" != trixie=4.1.1 ] || sed "s/^/not dumped: /" "$dir/said"
    cat "$TMP/after"
done >"$TMP/output"
expect_output <<'END'
not dumped: two new files, IN_ONESHOT: 1, and its end
not dumped: a write to a file without a name, IN_EXCL_UNLINK: 0
4.1.1: two new files, IN_ONESHOT: 2
4.1.1: a write to a file without a name, IN_EXCL_UNLINK: 1
4.2.1: two new files, IN_ONESHOT: 2
4.2.1: a write to a file without a name, IN_EXCL_UNLINK: 1
4.3: two new files, IN_ONESHOT: 2
4.3: a write to a file without a name, IN_EXCL_UNLINK: 1
END
