#!/usr/bin/env bash
# Linux 6.18, x86_64. MADV_COLLAPSE on a complete region of 2 MiB.
# Expected: it succeeds while the region is registered with userfaultfd, as no page is missing; with a page that
# UFFDIO_ZEROPAGE filled as well. Of memory that a forked child shares it is refused, or sharing goes on.
# Seen: with one page that UFFDIO_ZEROPAGE filled it is refused (EBUSY, as for a missing page) as long as the region is
# registered, and succeeds once it is not. Of memory shared with a child it succeeds, and copies all of it: both pay.
# Why it matters: a restore that fills zero pages by ZEROPAGE gets no huge page there until it unregisters; collapsing
# forked processes after a restore silently doubles their memory.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#define HUGE (2ul << 20)
static long rss(void)
{
    char line[256];
    long kib = -1;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "Private_Dirty: %ld", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return kib;
}
static char *aligned(void)
{
    char *at = map(2 * HUGE);
    at = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
    madvise(at, HUGE, MADV_HUGEPAGE);
    return at;
}
static int collapse(char *at)
{
    return madvise(at, HUGE, 25) ? -errno : 0;
}
int main(void)
{
    static char page[PAGE] __attribute__((aligned(4096))) = "page";
    for (int zero = 0; zero < 2; zero++) {
        char *at = aligned();
        int uffd = open_uffd(0);
        if (do_register(uffd, at, HUGE, MISSING))
            return 77;
        for (unsigned long done = 0; done < HUGE; done += PAGE) {
            int failed = zero && done == PAGE ? do_zeropage(uffd, at + done, PAGE) : do_copy(uffd, at + done, page, PAGE);
            if (failed)
                return 77;
        }
        printf("complete, %s: %d", zero ? "one page by ZEROPAGE" : "all by COPY", collapse(at));
        close(uffd);
        printf(", not registered any more: %d\n", collapse(at));
    }
    char *at = aligned();
    madvise(at, HUGE, MADV_NOHUGEPAGE);
    for (unsigned long done = 0; done < HUGE; done += PAGE)
        at[done] = 1;
    madvise(at, HUGE, MADV_HUGEPAGE);
    int ends[2];
    if (pipe(ends))
        return 77;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(ends[1]);
        _exit(read(ends[0], &byte, 1) < 0);
    }
    long before = rss();
    int result = collapse(at);
    long more = (rss() - before) / 1024;
    printf("shared with a child: %d, and %ld MiB more of its own\n", result, more);
    close(ends[1]);
    waitpid(child, NULL, 0);
    return 0;
}
C
expect_output <<'END'
complete, all by COPY: 0, not registered any more: 0
complete, one page by ZEROPAGE: -16, not registered any more: 0
shared with a child: 0, and 2 MiB more of its own
END
