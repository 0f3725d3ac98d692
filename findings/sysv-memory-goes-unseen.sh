#!/usr/bin/env bash
# Linux 6.18, x86_64. userfaultfd and System V shared memory (shmget, shmat).
# Expected: registered as other shared memory is (MAP_SHARED|MAP_ANONYMOUS, memfd): all three live in the same tmpfs. What
# unmaps registered memory raises UFFD_EVENT_UNMAP.
# Seen: EINVAL for missing pages, for minor faults and for write protection, since the mapping has operations of its own;
# only asynchronous write protection alone takes it. munmap of that raises the event; shmdt does not, nor does shmat with
# SHM_REMAP over registered memory of any kind (mmap with MAP_FIXED does).
# Why it matters: databases keep their buffers there. Post-copy and live snapshots cannot cover them, pre-copy tracking
# can; and a page daemon that trusts the event goes on filling or tracking addresses that are something else by now.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <pthread.h>
#include <sys/shm.h>
static int monitored, unmaps;
/* Counts the events; a call that raises one returns only after it was read here. */
static void *monitor(void *unused)
{
    struct { uint8_t event, pad[7]; uint64_t arg[3]; } m;
    struct pollfd p = { monitored, POLLIN, 0 };
    while (poll(&p, 1, -1) > 0)
        if (read(monitored, &m, sizeof m) == sizeof m && m.event == 0x16)
            __atomic_add_fetch(&unmaps, 1, __ATOMIC_SEQ_CST);
    return unused;
}
static char *attach(void *at, int flags)
{
    int id = shmget(IPC_PRIVATE, 4 * PAGE, IPC_CREAT | 0600);
    char *got = shmat(id, at, flags);
    return shmctl(id, IPC_RMID, NULL) || got == (char *)-1 ? exit(77), NULL : got;
}
static char *registered(char *at)
{
    return do_register(monitored, at, 4 * PAGE, WRITE_PROTECT) ? exit(77), NULL : at;
}
static void tell(const char *label)
{
    usleep(50000);
    printf("%s: UNMAP events %d\n", label, __atomic_exchange_n(&unmaps, 0, __ATOMIC_SEQ_CST));
}
static void try(const char *label, void *at)
{
    struct { uint64_t features, mode; const char *name; } ways[] = {
        { 0, MISSING, "missing" }, { 1 << 10, 4, "minor" }, { WP_SHMEM, WRITE_PROTECT, "protect" },
        { WP_ASYNC | WP_UNPOPULATED | WP_SHMEM, WRITE_PROTECT, "protect asynchronously" },
    };
    printf("%s:", label);
    for (int i = 0; i < 4; i++) {
        int uffd = open_uffd(ways[i].features);
        printf("%s %s %d", i ? "," : "", ways[i].name, do_register(uffd, at, 4 * PAGE, ways[i].mode));
        close(uffd);
    }
    printf("\n");
}
int main(void)
{
    int fd = memfd_create("probe", 0);
    char *sysv = attach(NULL, 0);
    if (ftruncate(fd, 4 * PAGE))
        return 77;
    try("memfd", mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    try("shared anonymous", mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    try("System V", sysv);
    memset(sysv, 1, 4 * PAGE);
    if (do_register(open_uffd(WP_ASYNC | WP_UNPOPULATED | WP_SHMEM), sysv, 4 * PAGE, WRITE_PROTECT))
        return 0;
    print_written("System V armed", sysv, 4, 1);
    sysv[PAGE] = 2;
    print_written("page 1 stored to", sysv, 4, 0);

    pthread_t thread;
    monitored = open_uffd(WP_ASYNC | WP_UNPOPULATED | WP_SHMEM | EVENT_UNMAP);
    if (pthread_create(&thread, NULL, monitor, NULL))
        return 77;
    munmap(registered(attach(NULL, 0)), 4 * PAGE);
    tell("System V, munmap");
    shmdt(registered(attach(NULL, 0)));
    tell("System V, shmdt");
    mmap(registered(map(4 * PAGE)), 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    tell("anonymous, mmap with MAP_FIXED");
    attach(registered(map(4 * PAGE)), SHM_REMAP);
    tell("anonymous, shmat with SHM_REMAP");
    return 0;
}
C
expect_output <<'END'
memfd: missing 0, minor 0, protect 0, protect asynchronously 0
shared anonymous: missing 0, minor 0, protect 0, protect asynchronously 0
System V: missing -22, minor -22, protect -22, protect asynchronously 0
System V armed: WWWW
page 1 stored to: -W--
System V, munmap: UNMAP events 1
System V, shmdt: UNMAP events 0
anonymous, mmap with MAP_FIXED: UNMAP events 1
anonymous, shmat with SHM_REMAP: UNMAP events 0
END
