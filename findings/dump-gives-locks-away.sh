#!/usr/bin/env bash
# CRIU 4.2.1 (Debian sid). A process that holds a robust lock (as PTHREAD_MUTEX_ROBUST) in a shared file is dumped.
# Expected: the image has the process as the lock's owner and so has the file, which CRIU does not copy; so after the
# restore all is as before.
# Seen: criu dump ends what it has dumped, and the kernel takes that for the death of the lock's owner: the file says
# FUTEX_OWNER_DIED, and others are given the lock. The restored process goes on as if it held it. With --leave-running
# the file stays as it is.
# Why it matters: two processes are inside the lock where a part of those that share it is moved, or moved back.
. "$(dirname "$0")/lib/common.bash"
need_root
debian sid criu=4.2.1
cat >"$TMP/owner.c" <<'C'
#include "memory.h"
#include <linux/futex.h>
/* Holds a robust lock whose word is the first of the file. Says after a restore what it sees of it. */
int main(int argc, char **argv)
{
    int file = open(argv[1], O_RDWR | O_CREAT, 0600);
    if (argc < 2 || file < 0 || ftruncate(file, PAGE))
        return 77;
    volatile unsigned *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    static struct { void *next; long offset; void *pending; } head;
    void **entry = (void **)(shared + 16);
    shared[0] = getpid();
    *entry = &head;
    head.next = entry;
    head.offset = (char *)shared - (char *)entry;
    syscall(SYS_set_robust_list, &head, sizeof head);
    shared[1] = 1;
    while (shared[1] != 2)
        usleep(1000);
    shared[2] = shared[0] == (unsigned)getpid() ? 1 : 2;
    pause();
}
C
gcc -O1 -I"$LIB" -o "$TMP/owner" "$TMP/owner.c"
word() { od -An -tu4 -j "$1" -N4 "$TMP/lock" 2>"$TMP/od.err" | tr -d ' '; }
start() {
    rm -f "$TMP/lock"
    setsid "$TMP/owner" "$TMP/lock" </dev/null >"$TMP/owner.log" 2>&1 &
    STARTED+=("$!")
    until [ "$(word 4)" = 1 ]; do sleep 0.02; done
    pid=$(word 0)
}
dump() {
    mkdir "$TMP/$1"
    run_in sid usr/sbin/criu dump -t "$pid" -D "$TMP/$1" -o dump.log "${@:2}" >"$TMP/said" 2>&1 \
        || { cat "$TMP/$1/dump.log" >&2; cannot "criu dump fails on this machine"; }
}
state() {
    case "$(word 0)" in
        "$pid") echo "held by its owner" ;;
        1073741824) echo "given up, owner died" ;;
        *) echo "$(word 0)" ;;
    esac
}
{
    start
    dump running --leave-running
    echo "dumped with --leave-running: $(state)"
    start
    dump ended
    echo "dumped: $(state)"
    printf '\2\0\0\0' | dd of="$TMP/lock" bs=1 seek=4 conv=notrunc status=none
    unshare --pid --fork --kill-child --mount-proc "$TMP/sid/root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$TMP/sid/root/usr/lib/x86_64-linux-gnu" "$TMP/sid/root/usr/sbin/criu" restore \
        -D "$TMP/ended" -o restore.log >"$TMP/said" 2>&1 &
    STARTED+=("$!")
    until [ "$(word 8)" != 0 ] || ! kill -0 "$!" 2>"$TMP/kill.err"; do sleep 0.02; done
    case "$(word 8)" in
        1) echo "restored: the owner finds its lock held by itself" ;;
        2) echo "restored: the owner runs on, its lock is $(state)" ;;
        *) cat "$TMP/ended/restore.log" >&2; cannot "criu restore fails on this machine" ;;
    esac
} >"$TMP/output"
expect_output <<'END'
dumped with --leave-running: held by its owner
dumped: given up, owner died
restored: the owner runs on, its lock is given up, owner died
END
