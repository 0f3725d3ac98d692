#!/usr/bin/env bash
# Linux 6.18, x86_64. UFFDIO_REGISTER over memory that the same userfaultfd has write-protected (WP_ASYNC).
# Expected: registering it for missing pages alone ends the write tracking, so that a later registration for write
# protection starts with every page counted as written, as it does after UFFDIO_UNREGISTER.
# Seen: the marks of the first tracking stay in the page table. A store made while the range was registered for missing
# pages alone does not clear them, and once it is registered for write protection again PAGEMAP_SCAN calls that page
# clean: the store is lost to the tracking.
# Why it matters: a migration that switches a range from dirty tracking to post-copy and back (a retry) sends stale pages.
# Unregister in between.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
static void try(const char *label, int unregister)
{
    char *at = map(4 * PAGE);
    int uffd = open_uffd(WP_ASYNC | WP_UNPOPULATED);
    struct range range = { (uintptr_t)at, 4 * PAGE };
    memset(at, 1, 4 * PAGE);
    if (do_register(uffd, at, 4 * PAGE, WRITE_PROTECT))
        exit(77);
    print_written("armed", at, 4, 1);
    if (unregister && ioctl(uffd, _IOR(0xAA, 0x01, range), &range))
        exit(77);
    if (do_register(uffd, at, 4 * PAGE, MISSING))
        exit(77);
    at[0] = 7;
    if (do_register(uffd, at, 4 * PAGE, WRITE_PROTECT))
        exit(77);
    print_written(label, at, 4, 0);
    printf("page 0 reads %d\n", at[0]);
}
int main(void)
{
    try("registered anew, page 0 stored to meanwhile", 0);
    try("the same with UFFDIO_UNREGISTER between", 1);
    return 0;
}
C
expect_output <<'END'
armed: WWWW
registered anew, page 0 stored to meanwhile: ----
page 0 reads 7
armed: WWWW
the same with UFFDIO_UNREGISTER between: WWWW
page 0 reads 7
END
