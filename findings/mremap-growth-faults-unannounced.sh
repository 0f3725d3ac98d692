#!/usr/bin/env bash
# Linux 6.18, x86_64. mremap that grows a registered mapping, all userfaultfd events switched on.
# Expected: a mapping that grows in place is either announced (UFFD_EVENT_REMAP) or its new pages are not registered; one
# that moves and grows is announced with its new length.
# Seen: growth in place sends no event and the new pages are registered: their first touch is a page fault message for an
# address the monitor has never heard of. A move that grows is announced with the OLD length, and the tail faults as well.
# Why it matters: realloc of a large block does this. A page daemon that gives up at an unknown address, or asks the
# source for it, stops the program: unknown pages beside a registered range are zero pages.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <pthread.h>
static int uffd;
static char *volatile base;
/* Tells each message, fills what is asked for with zeros. */
static void *monitor(void *unused)
{
    struct { uint8_t event, pad[7]; uint64_t arg[3]; } m;
    struct pollfd p = { uffd, POLLIN, 0 };
    while (poll(&p, 1, -1) > 0) {
        if (read(uffd, &m, sizeof m) != sizeof m)
            continue;
        if (m.event == 0x14)
            printf("  event REMAP, length %ld pages\n", (long)(m.arg[2] / PAGE));
        if (m.event != 0x12)
            continue;
        uint64_t page = m.arg[1] & ~(PAGE - 1);
        printf("  fault at page %ld\n", (long)((page - (uintptr_t)base) / PAGE));
        do_zeropage(uffd, (void *)page, PAGE);
    }
    return unused;
}
int main(void)
{
    pthread_t thread;
    setbuf(stdout, NULL);
    uffd = open_uffd(EVENT_REMAP | EVENT_UNMAP | EVENT_REMOVE);
    char *at = map(16 * PAGE);
    munmap(at + 8 * PAGE, 8 * PAGE);
    memset(at, 1, 8 * PAGE);
    base = at;
    if (do_register(uffd, at, 8 * PAGE, MISSING) || pthread_create(&thread, NULL, monitor, NULL))
        return 77;
    alarm(20);
    printf("grown in place from 8 to 12 pages\n");
    if (mremap(at, 8 * PAGE, 12 * PAGE, 0) != at)
        return 77;
    at[9 * PAGE] = 1;
    printf("moved and grown from 12 to 32 pages\n");
    char *to = map(32 * PAGE);
    base = to;
    if (mremap(at, 12 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
        return 77;
    to[20 * PAGE] = 1;
    return 0;
}
C
expect_output <<'END'
grown in place from 8 to 12 pages
  fault at page 9
moved and grown from 12 to 32 pages
  event REMAP, length 12 pages
  fault at page 20
END
