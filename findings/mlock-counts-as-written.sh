#!/usr/bin/env bash
# Linux 6.18, x86_64. What asynchronous write protection (UFFD_FEATURE_WP_ASYNC) calls written.
# Expected: mlock over memory that is present makes no page written, as MADV_POPULATE_READ does not; a store to a huge
# page makes the huge page written, as it has one entry.
# Seen: mlock of private memory makes every page written, for it faults them in for writing. A store splits the huge
# page: one page of 4 KiB is written, and the memory is in small pages from then on.
# Why it matters: a program that locks its memory late makes one more full pre-copy round, with not one byte changed; and
# tracking takes the huge pages away from every program that writes, long after the migration was given up.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
enum { HUGE = 2 << 20 };
/* Size of the process's huge pages that hold the address, in kB, from smaps. */
static long huge_kb(char *at)
{
    char line[256];
    unsigned long start, end;
    long kb = 0, inside = 0, value;
    FILE *file = fopen("/proc/self/smaps", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = start <= (uintptr_t)at && (uintptr_t)at < end;
        if (inside && sscanf(line, "AnonHugePages: %ld", &value) == 1)
            kb = value;
    }
    return file ? (fclose(file), kb) : 0;
}
int main(void)
{
    char *at = map(8 * PAGE);
    memset(at, 1, 8 * PAGE);
    int uffd = open_uffd(WP_ASYNC | WP_UNPOPULATED);
    if (do_register(uffd, at, 8 * PAGE, WRITE_PROTECT))
        return 77;
    print_written("armed", at, 8, 1);
    if (madvise(at, 4 * PAGE, 22))
        return 77;
    print_written("MADV_POPULATE_READ of pages 0-3", at, 8, 0);
    if (mlock(at + 2 * PAGE, 3 * PAGE))
        return 77;
    print_written("mlock of pages 2-4", at, 8, 0);

    at = map(2 * HUGE);
    at = (char *)(((uintptr_t)at + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(at, HUGE, MADV_HUGEPAGE);
    memset(at, 1, HUGE);
    if (huge_kb(at) != HUGE / 1024 || do_register(uffd, at, HUGE, WRITE_PROTECT))
        return 77;
    if (do_protect(uffd, at, HUGE, 1))
        return 77;
    print_written("huge page armed, first pages", at, 8, 0);
    printf("huge before the store: %ld kB\n", huge_kb(at));
    at[PAGE] = 2;
    print_written("page 1 stored to", at, 8, 0);
    printf("huge after it: %ld kB\n", huge_kb(at));
    return 0;
}
C
expect_output <<'END'
armed: WWWWWWWW
MADV_POPULATE_READ of pages 0-3: --------
mlock of pages 2-4: --WWW---
huge page armed, first pages: --------
huge before the store: 2048 kB
page 1 stored to: -W------
huge after it: 0 kB
END
