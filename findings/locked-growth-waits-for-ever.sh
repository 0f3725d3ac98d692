#!/usr/bin/env bash
# Linux 6.18, x86_64. A thread moves locked, registered memory by mremap and lets it grow; UFFD_EVENT_REMAP is switched on.
# Expected: a monitor that answers each fault and reads each event at once lets the thread go on.
# Seen: mremap brings the new pages of locked memory before it sends the event. The fault on the first of them cannot be
# answered: UFFDIO_ZEROPAGE and UFFDIO_COPY give EAGAIN until the event is read, which is not there to be read. The thread
# waits for ever. UFFDIO_UNREGISTER is not refused, and lets it go on.
# Why it matters: under `criu lazy-pages` a program that locks memory and calls realloc for a large block hangs, and with it
# all of its threads that touch a missing page.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <pthread.h>
static int uffd;
static char *volatile base;
static int readable(int ms)
{
    struct pollfd p = { uffd, POLLIN, 0 };
    return poll(&p, 1, ms);
}
static void *monitor(void *unused)
{
    struct { uint8_t event, pad[7]; uint64_t arg[3]; } m;
    while (readable(-1) > 0) {
        if (read(uffd, &m, sizeof m) != sizeof m)
            continue;
        if (m.event == 0x14)
            printf("  event REMAP, length %ld pages\n", (long)(m.arg[2] / PAGE));
        if (m.event != 0x12)
            continue;
        char *page = (char *)(m.arg[1] & ~(PAGE - 1));
        int said, tries = 0;
        while ((said = do_zeropage(uffd, page, PAGE)) == -EAGAIN && tries++ < 200 && !readable(10))
            ;
        printf("  fault at page %ld: %s, %s\n", (long)(page - base) / (long)PAGE,
               said ? strerror(-said) : "filled", readable(0) ? "a message to read" : "no message to read");
        if (said) {
            struct range whole = { (uintptr_t)base, 32 * PAGE };
            printf("  unregistered: %d\n", ioctl(uffd, _IOR(0xAA, 0x01, struct range), &whole));
        }
    }
    return unused;
}
int main(void)
{
    pthread_t thread;
    setbuf(stdout, NULL);
    uffd = open_uffd(EVENT_REMAP | EVENT_UNMAP | EVENT_REMOVE);
    if (pthread_create(&thread, NULL, monitor, NULL))
        return 77;
    for (int locked = 0; locked < 2; locked++) {
        char *at = map(12 * PAGE), *to = map(32 * PAGE);
        memset(at, 1, 12 * PAGE);
        base = to; /* stays mapped: MREMAP_FIXED takes its place */
        if (do_register(uffd, at, 12 * PAGE, MISSING) || (locked && mlock(at, 12 * PAGE)))
            return 77;
        alarm(20);
        printf("moved and grown from 12 to 32 pages, %s\n", locked ? "locked" : "not locked");
        if (mremap(at, 12 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
            return 77;
        to[12 * PAGE] = 1;
    }
    usleep(100000); /* the monitor's last line */
    return 0;
}
C
expect_output <<'END'
moved and grown from 12 to 32 pages, not locked
  event REMAP, length 12 pages
  fault at page 12: filled, no message to read
moved and grown from 12 to 32 pages, locked
  fault at page 12: Resource temporarily unavailable, no message to read
  unregistered: 0
  event REMAP, length 12 pages
END
