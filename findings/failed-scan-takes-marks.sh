#!/usr/bin/env bash
# Linux 6.18, x86_64. PAGEMAP_SCAN with PM_SCAN_WP_MATCHING and PM_SCAN_CHECK_WPASYNC over tracked memory followed by
# memory that is not registered for asynchronous write protection.
# Expected: EPERM, and nothing has changed: the scan can be repeated over the tracked part.
# Seen: EPERM, but the tracked part has been protected again: a second scan of it alone finds nothing. What was written
# since the scan before stands in the array of regions, but the call's result no longer tells how many are valid.
# Why it matters: a program maps new memory beside the old and the round fails. A pre-copy that scans again loses pages:
# after EPERM every page of the range has to count as written, unless the array
# was cleared before the call and is read up to the first empty region.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
int main(void)
{
    struct { uint64_t start, end, categories; } found[8] = { 0 };
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
    } arg = { sizeof arg, 3, 0, 0, 0, (uintptr_t)found, 8, 0, 0, 2, 0, 2 };
    char *at = map(8 * PAGE);
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    memset(at, 1, 8 * PAGE);
    if (do_register(open_uffd(WP_ASYNC | WP_UNPOPULATED), at, 4 * PAGE, WRITE_PROTECT))
        return 77;
    print_written("tracked, armed", at, 4, 1);
    at[PAGE] = 2;
    print_written("tracked, page 1 stored to", at, 4, 0);
    arg.start = (uintptr_t)at, arg.end = arg.start + 8 * PAGE;
    int told = result(ioctl(pagemap, _IOWR('f', 16, arg), &arg) < 0);
    printf("scan over both: %d, regions filled in: %s\n", told, found[0].start == (uintptr_t)at + PAGE ? "yes" : "no");
    print_written("tracked, scanned again", at, 4, 1);
    return 0;
}
C
expect_output <<'END'
tracked, armed: WWWW
tracked, page 1 stored to: -W--
scan over both: -1, regions filled in: yes
tracked, scanned again: ----
END
