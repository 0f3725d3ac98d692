#!/usr/bin/env bash
# CRIU 4.1.1, 4.2.1, 4.3 (Debian trixie, sid, experimental). A process has a personality of its own, as `setarch -R` and
# `linux32` of util-linux give it: no randomized addresses, and a machine that calls itself i686.
# Expected: it has the same one after the restore.
# Seen: it has that of the criu that restored it, the default one; not a word in the logs.
# Why it matters: uname(2) answers otherwise in the running process. Programs that it starts from then on have randomized
# addresses again: debuggers, sanitizers and shared caches of code that rely on fixed ones fail only after a migration.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
versions="trixie=4.1.1 sid=4.2.1 experimental=4.3"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile fixed <<'C'
#include "restored.h"
#include <sys/personality.h>
#include <sys/utsname.h>
/* Where a program that this one starts has its stack. */
static unsigned long stack_of_started(void)
{
    unsigned long start = 0;
    FILE *maps = popen("grep stack /proc/self/maps", "r");
    if (!maps || fscanf(maps, "%lx", &start) != 1)
        exit(77);
    pclose(maps);
    return start;
}
static void report(FILE *out)
{
    struct utsname name;
    uname(&name);
    fprintf(out, "personality %x, uname %s, programs started have their stack at %s\n",
            (unsigned)personality(0xffffffff), name.machine,
            stack_of_started() == stack_of_started() && stack_of_started() == stack_of_started() ? "a fixed place" :
            "places of chance");
    fflush(out);
}
int main(int argc, char **argv)
{
    live_in(argc, argv);
    if (personality(PER_LINUX32 | ADDR_NO_RANDOMIZE) < 0)
        return 77;
    report(stdout);
    until_dumped();
    FILE *out = seen();
    report(out);
    end_of_seen(out);
    return 0;
}
C
for version in $versions; do
    restored_by "$version" fixed >"$TMP/after"
    [ "$version" != trixie=4.1.1 ] || sed "s/^/before the dump: /" "$dir/said"
    cat "$TMP/after"
done >"$TMP/output"
expect_output <<'END'
before the dump: personality 40008, uname i686, programs started have their stack at a fixed place
4.1.1: personality 0, uname x86_64, programs started have their stack at places of chance
4.2.1: personality 0, uname x86_64, programs started have their stack at places of chance
4.3: personality 0, uname x86_64, programs started have their stack at places of chance
END
