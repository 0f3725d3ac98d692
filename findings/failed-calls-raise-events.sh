#!/usr/bin/env bash
# Linux 6.18, x86_64. Calls that fail and change nothing, on memory that is registered with userfaultfd.
# Expected: no event, for nothing was unmapped, removed or forked.
# Seen: an event each. munmap and mmap with MAP_FIXED over a range that ends in sealed memory (mseal) fail with EPERM
# and raise UNMAP for the whole range, of which not a page was unmapped. MADV_FREE on a memfd (EINVAL) and MADV_REMOVE
# on one that is sealed (EPERM) raise REMOVE, and the contents stay. A fork that fails late (here the PID that it wants is
# taken; so at a pids.max) raises FORK with the descriptor of a child that never ran, and waits until it is read.
# Why it matters: the events are a monitor's only word on what it need not bring any more. One that believes them fills
# zeros where a page of a restored process was still to come.
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <linux/sched.h>
#include <pthread.h>
#define MSEAL 462
struct message { uint8_t event, reserved[7]; uint64_t start, end, more; };
static int uffd;
static char *memory;
static struct message last;
static volatile int events;

static void *monitor(void *unused)
{
    struct message message;
    struct pollfd waiting = { .fd = uffd, .events = POLLIN };
    while (poll(&waiting, 1, -1) == 1)
        if (read(uffd, &message, sizeof message) == sizeof message) {
            last = message;
            __atomic_add_fetch(&events, 1, __ATOMIC_SEQ_CST);
        }
    return unused;
}
/* The caller of the call that failed has waited until its event was read. */
static void report(const char *what, int failed, int error, const char *base)
{
    static int told;
    printf("%s: %s", what, failed ? strerror(error) : "succeeds");
    for (int tries = 0; events == told && tries < 500; tries++)
        usleep(1000);
    if (events == told)
        printf(", no event\n");
    else if (last.event == 0x13)
        printf(", FORK\n");
    else
        printf(", %s of pages %lu to %lu\n", last.event == 0x16 ? "UNMAP" : last.event == 0x15 ? "REMOVE" : "another",
               (last.start - (uintptr_t)base) / PAGE, (last.end - (uintptr_t)base) / PAGE - 1);
    told = events;
}
int main(void)
{
    pthread_t thread;
    char *source = map(PAGE);
    memory = map(8 * PAGE);
    uffd = open_uffd(EVENT_FORK | EVENT_REMOVE | EVENT_UNMAP);
    if (do_register(uffd, memory, 4 * PAGE, MISSING) || syscall(MSEAL, memory + 6 * PAGE, PAGE, 0)
        || pthread_create(&thread, NULL, monitor, NULL))
        return 77;
    int failed = munmap(memory, 8 * PAGE);
    report("munmap of pages 0 to 7, where 6 is sealed", failed, errno, memory);
    failed = mmap(memory + PAGE, 7 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
    report("mmap with MAP_FIXED over pages 1 to 7", failed, errno, memory);
    printf("UFFDIO_COPY to page 1: %d\n", do_copy(uffd, memory + PAGE, source, PAGE));

    int file = memfd_create("file", MFD_ALLOW_SEALING);
    if (file < 0 || ftruncate(file, 4 * PAGE))
        return 77;
    char *shared = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    memset(shared, 5, 4 * PAGE);
    if (do_register(uffd, shared, 4 * PAGE, MISSING) || fcntl(file, F_ADD_SEALS, 16 /* F_SEAL_FUTURE_WRITE */))
        return 77;
    failed = madvise(shared, 2 * PAGE, MADV_FREE);
    report("MADV_FREE of pages 0 and 1 of a memfd", failed, errno, shared);
    failed = madvise(shared, 2 * PAGE, MADV_REMOVE);
    report("MADV_REMOVE of pages 0 and 1 of a sealed memfd", failed, errno, shared);
    printf("they hold %d and %d\n", shared[0], shared[PAGE]);

    pid_t taken = getpid();
    struct clone_args args = { .exit_signal = SIGCHLD, .set_tid = (uintptr_t)&taken, .set_tid_size = 1 };
    long child = syscall(SYS_clone3, &args, sizeof args);
    if (!child)
        _exit(0);
    report("clone3 with a PID that is taken", child < 0, errno, memory);
    printf("UFFDIO_COPY into its child: %d\n", do_copy((int)last.start, memory + 2 * PAGE, source, PAGE));
    return 0;
}
C
expect_output <<'END'
munmap of pages 0 to 7, where 6 is sealed: Operation not permitted, UNMAP of pages 0 to 7
mmap with MAP_FIXED over pages 1 to 7: Operation not permitted, UNMAP of pages 1 to 7
UFFDIO_COPY to page 1: 0
MADV_FREE of pages 0 and 1 of a memfd: Invalid argument, REMOVE of pages 0 to 1
MADV_REMOVE of pages 0 and 1 of a sealed memfd: Operation not permitted, REMOVE of pages 0 to 1
they hold 5 and 5
clone3 with a PID that is taken: File exists, FORK
UFFDIO_COPY into its child: -3
END
