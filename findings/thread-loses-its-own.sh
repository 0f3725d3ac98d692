#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A thread has something of its own, by unshare(2): a table of
# descriptors, a working directory and umask (CLONE_FS, as file servers use it), a network or a host name (as runtimes of
# containers have them on single threads).
# Expected: the dump refuses what it cannot restore, as it does for processes that share their memory.
# Seen: the dump and the restore succeed, and the thread has what the first thread of the process has. Descriptors that
# only it had are gone.
# Why it matters: the thread reads and writes files by relative names in another directory, opens sockets in another
# network, and fails with EBADF, minutes after a migration that has gone well.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile threads <<'C'
#include "restored.h"
#include <pthread.h>
#include <sched.h>
static volatile int is_ready, asked;
static const char *kind;
static int file;
static FILE *out;
/* Whether this thread has a namespace that the first one has not. */
static int own_namespace(const char *name)
{
    char path[64], mine[64] = "", first[64] = "";
    snprintf(path, sizeof path, "/proc/thread-self/ns/%s", name);
    if (readlink(path, mine, sizeof mine - 1) < 0)
        exit(77);
    snprintf(path, sizeof path, "/proc/self/ns/%s", name);
    if (readlink(path, first, sizeof first - 1) < 0)
        exit(77);
    return strcmp(mine, first) != 0;
}
static void report(FILE *to)
{
    char path[4096] = "";
    if (!strcmp(kind, "descriptors"))
        fprintf(to, "descriptors: the thread's own is %s\n", fcntl(file, F_GETFD) < 0 ? "closed" : "open");
    else if (!strcmp(kind, "directory"))
        fprintf(to, "directory: %s\n", strcmp(strrchr(getcwd(path, sizeof path), '/'), "/own") ? "the process's" : "its own");
    else
        fprintf(to, "%s namespace: %s\n", kind, own_namespace(kind) ? "its own" : "the process's");
    fflush(to);
}
static void *thread(void *unused)
{
    int failed = 0;
    if (!strcmp(kind, "descriptors"))
        failed = unshare(CLONE_FILES) || (file = fcntl(0, F_DUPFD, 100)) < 0;
    else if (!strcmp(kind, "directory"))
        failed = unshare(CLONE_FS) || mkdir("own", 0700) || chdir("own");
    else
        failed = unshare(!strcmp(kind, "net") ? CLONE_NEWNET : CLONE_NEWUTS);
    if (failed)
        exit(77);
    report(stdout);
    is_ready = 1;
    while (!asked)
        usleep(1000);
    report(out);
    return unused;
}
int main(int argc, char **argv)
{
    pthread_t started;
    live_in(argc, argv);
    kind = argv[2];
    if (pthread_create(&started, NULL, thread, NULL))
        return 77;
    while (!is_ready)
        usleep(1000);
    until_dumped();
    out = seen();
    asked = 1;
    pthread_join(started, NULL);
    end_of_seen(out);
    return 0;
}
C
for version in $versions; do
    for kind in descriptors directory net uts; do
        restored_by "$version" threads "$kind" >"$TMP/after"
        [ "$version" != trixie=4.1.1 ] || sed "s/^/before the dump: /" "$dir/said"
        cat "$TMP/after"
    done
done >"$TMP/output"
expect_output <<'END'
before the dump: descriptors: the thread's own is open
4.1.1: descriptors: the thread's own is closed
before the dump: directory: its own
4.1.1: directory: the process's
before the dump: net namespace: its own
4.1.1: net namespace: the process's
before the dump: uts namespace: its own
4.1.1: uts namespace: the process's
4.2.1: descriptors: the thread's own is closed
4.2.1: directory: the process's
4.2.1: net namespace: the process's
4.2.1: uts namespace: the process's
4.3: descriptors: the thread's own is closed
4.3: directory: the process's
4.3: net namespace: the process's
4.3: uts namespace: the process's
END
