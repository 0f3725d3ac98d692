#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process maps a memfd privately and writes a part of it. Its
# full dump is copied, and the copy gets a link "parent" to the first one. No page refers to the parent.
# Expected: all three restore both: a parent that nothing refers to is no difference.
# Seen: 4.1.1 and 4.2.1 restore both. 4.3 restores the dump without a link alone; with it, the restore fails: it has no
# file descriptor store yet when it maps such memory ("Unable to get a file descriptor with the 0 id").
# Why it matters: whoever makes increments outside of CRIU (deduplication, an earlier round) links every dump to the one
# before. With 4.3 a process with such a mapping cannot be restored from them.
. "$(dirname "$0")/lib/common.bash"
need_root
for suite_version in trixie=4.1.1 sid=4.2.1 experimental=4.3; do
    debian "${suite_version%%=*}" "criu=${suite_version#*=}"
done
cat >"$TMP/private.c" <<'C'
#include "memory.h"
/* DIR: makes a file "ready" there, and "good" or "bad" when it finds itself restored (a file "go" appears). */
int main(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]))
        return 77;
    int file = memfd_create("buffer", 0);
    if (file < 0 || ftruncate(file, 4 * PAGE) || pwrite(file, "file", 4, 0) != 4)
        return 77;
    char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (at == MAP_FAILED)
        return 77;
    memcpy(at + PAGE, "own", 3);
    close(open("ready", O_CREAT | O_WRONLY, 0600));
    while (access("go", F_OK))
        usleep(1000);
    int good = !memcmp(at, "file", 4) && !memcmp(at + PAGE, "own", 3);
    close(open(good ? "good" : "bad", O_CREAT | O_WRONLY, 0600));
    return 0;
}
C
gcc -O1 -I"$LIB" -o "$TMP/private" "$TMP/private.c"
restored() { # SUITE DIR IMAGES
    rm -f "$2/good"
    if unshare --pid --fork --kill-child --mount-proc "$TMP/$1/root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$TMP/$1/root/usr/lib/x86_64-linux-gnu" "$TMP/$1/root/usr/sbin/criu" restore \
        -D "$2/$3" -o restore.log >"$TMP/said" 2>&1 && [ -e "$2/good" ]; then
        echo restored
    else
        echo "not restored ($(grep -o 'Unable to get a file descriptor with the 0 id' "$2/$3/restore.log" | head -1))"
    fi
}
for suite in trixie sid experimental; do
    dir=$(mktemp -d -p "$TMP")
    setsid "$TMP/private" "$dir" </dev/null >"$TMP/said" 2>&1 &
    pid=$!
    STARTED+=("$pid")
    until [ -e "$dir/ready" ]; do sleep 0.02; done
    mkdir "$dir/first"
    run_in "$suite" usr/sbin/criu dump -t "$pid" -D "$dir/first" -o dump.log >"$TMP/said" 2>&1 \
        || { echo "$suite: not dumped"; continue; }
    cp -r "$dir/first" "$dir/second"
    ln -s ../first "$dir/second/parent"
    touch "$dir/go"
    echo "$suite, alone: $(restored "$suite" "$dir" first)"
    echo "$suite, with a parent that nothing refers to: $(restored "$suite" "$dir" second)"
done >"$TMP/output"
expect_output <<'END'
trixie, alone: restored
trixie, with a parent that nothing refers to: restored
sid, alone: restored
sid, with a parent that nothing refers to: restored
experimental, alone: restored
experimental, with a parent that nothing refers to: not restored (Unable to get a file descriptor with the 0 id)
END
