#!/usr/bin/env bash
# Linux 6.18, x86_64. KSM (MADV_MERGEABLE) and userfaultfd write protection.
# Expected: ksmd leaves write-protected pages alone, or keeps their mark when it merges them.
# Seen: every page merged into another one loses the mark (63 or all of 64 equal pages). In asynchronous mode PAGEMAP_SCAN calls
# them written though nobody wrote; in synchronous mode a store to such a page goes through and raises no event.
# Why it matters: a live snapshot by write protection gets pages from after the snapshot, and pre-copy of mergeable
# memory sends merged pages again. Take memory out of KSM (MADV_UNMERGEABLE) before protecting it.
# Turns ksmd on for a few seconds and puts the setting back.
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
KSM=/sys/kernel/mm/ksm/run
[ -w "$KSM" ] || cannot "the kernel has no KSM"
before=$(cat "$KSM")
if [ "$before" != 1 ]; then
    AT_END+=("echo $before >$KSM")
    echo 1 >"$KSM"
fi
run_c <<'C'
#include "memory.h"
enum { PAGES = 64 };
static int protected_pages(char *at)
{
    int count = 0;
    for (int i = 0; i < PAGES; i++)
        count += pagemap_entry(at + i * PAGE) >> 57 & 1;
    return count;
}
static char *merged(int uffd, const char *label, int content)
{
    char *at = map(PAGES * PAGE);
    memset(at, content, PAGES * PAGE);
    if (madvise(at, PAGES * PAGE, MADV_MERGEABLE) || do_register(uffd, at, PAGES * PAGE, WRITE_PROTECT)
        || do_protect(uffd, at, PAGES * PAGE, 1))
        exit(77);
    printf("%s: %d of %d protected", label, protected_pages(at), PAGES);
    for (int i = 0; i < 200 && protected_pages(at) > 1; i++)
        usleep(100000);
    printf(", %s after the merge\n", protected_pages(at) <= 1 ? "at most 1" : "several");
    return at;
}
int main(void)
{
    print_written("asynchronous, called written", merged(open_uffd(WP_ASYNC | WP_UNPOPULATED), "asynchronous", 0x5a), PAGES, 0);
    int uffd = open_uffd(0);
    char *at = merged(uffd, "synchronous", 0xa5);
    int page = 0;
    while (page < PAGES && pagemap_entry(at + page * PAGE) >> 57 & 1)
        page++;
    if (page == PAGES)
        return 1;
    alarm(10);
    at[page * PAGE] = 1;
    struct pollfd events = { uffd, POLLIN, 0 };
    printf("stored to a merged page; events: %d\n", poll(&events, 1, 200));
    return 0;
}
C
sed -i -E 's/(called written: )W*-?W*$/\1all or all but one/' "$TMP/output"
expect_output <<'END'
asynchronous: 64 of 64 protected, at most 1 after the merge
asynchronous, called written: all or all but one
synchronous: 64 of 64 protected, at most 1 after the merge
stored to a merged page; events: 0
END
