#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process maps a memfd for reading alone that was sealed with
# F_SEAL_WRITE, as those do that are handed a buffer which nobody may change any more.
# Expected: criu dump refuses what it cannot restore, or the restore brings contents, mapping and seals back.
# Seen: the dump succeeds, and the restore fails: the seals are set again after the mapping exists, which the kernel
# refuses (EBUSY). Without the mapping, or with F_SEAL_GROW and F_SEAL_SHRINK alone, the same process is restored.
# Why it matters: by then the process is gone at the source, unless somebody kept it stopped until the restore was over.
. "$(dirname "$0")/lib/common.bash"
need_root
for suite_version in trixie=4.1.1 sid=4.2.1 experimental=4.3; do
    debian "${suite_version%%=*}" "criu=${suite_version#*=}"
done
cat >"$TMP/sealed.c" <<'C'
#include "memory.h"
/* DIR SEALS MAPPED: makes a file "ready" there, and "again" when it finds itself restored (a file "go" appears). */
int main(int argc, char **argv)
{
    if (argc < 4 || chdir(argv[1]))
        return 77;
    int file = memfd_create("buffer", MFD_ALLOW_SEALING);
    if (file < 0 || ftruncate(file, PAGE) || pwrite(file, "text", 4, 0) != 4 || fcntl(file, F_ADD_SEALS, atoi(argv[2])))
        return 77;
    char *at = argv[3][0] == '1' ? mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0) : NULL;
    close(open("ready", O_CREAT | O_WRONLY, 0600));
    while (access("go", F_OK))
        usleep(1000);
    char text[4];
    int good = pread(file, text, 4, 0) == 4 && !memcmp(text, "text", 4) && (!at || !memcmp(at, "text", 4));
    int seals = fcntl(file, F_GET_SEALS) == atoi(argv[2]);
    close(open(good && seals ? "good" : "bad", O_CREAT | O_WRONLY, 0600));
    return 0;
}
C
gcc -O1 -I"$LIB" -o "$TMP/sealed" "$TMP/sealed.c"
try() { # SUITE SEALS MAPPED
    local dir
    dir=$(mktemp -d -p "$TMP")
    setsid "$TMP/sealed" "$dir" "$2" "$3" </dev/null >"$TMP/said" 2>&1 &
    local pid=$!
    STARTED+=("$pid")
    until [ -e "$dir/ready" ]; do sleep 0.02; done
    mkdir "$dir/images"
    run_in "$1" usr/sbin/criu dump -t "$pid" -D "$dir/images" -o dump.log >"$TMP/said" 2>&1 \
        || { echo "not dumped"; return; }
    touch "$dir/go"
    if unshare --pid --fork --kill-child --mount-proc "$TMP/$1/root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$TMP/$1/root/usr/lib/x86_64-linux-gnu" "$TMP/$1/root/usr/sbin/criu" restore \
        -D "$dir/images" -o restore.log >"$TMP/said" 2>&1 && [ -e "$dir/good" ]; then
        echo "dumped, restored"
    else
        echo "dumped, not restored ($(grep -o 'apply seals.*' "$dir/images/restore.log" | head -1))"
    fi
}
for suite in trixie sid experimental; do
    echo "$suite, F_SEAL_WRITE, mapped for reading: $(try "$suite" 8 1)"
    echo "$suite, F_SEAL_WRITE, not mapped: $(try "$suite" 8 0)"
    echo "$suite, F_SEAL_GROW and F_SEAL_SHRINK, mapped: $(try "$suite" 6 1)"
done >"$TMP/output"
expect_output <<'END'
trixie, F_SEAL_WRITE, mapped for reading: dumped, not restored (apply seals on memfd: Device or resource busy)
trixie, F_SEAL_WRITE, not mapped: dumped, restored
trixie, F_SEAL_GROW and F_SEAL_SHRINK, mapped: dumped, restored
sid, F_SEAL_WRITE, mapped for reading: dumped, not restored (apply seals on memfd: Device or resource busy)
sid, F_SEAL_WRITE, not mapped: dumped, restored
sid, F_SEAL_GROW and F_SEAL_SHRINK, mapped: dumped, restored
experimental, F_SEAL_WRITE, mapped for reading: dumped, not restored (apply seals on memfd: Device or resource busy)
experimental, F_SEAL_WRITE, not mapped: dumped, restored
experimental, F_SEAL_GROW and F_SEAL_SHRINK, mapped: dumped, restored
END
