#!/usr/bin/env bash
# Linux 6.18, x86_64. A thread ends while the pages that the kernel itself touches at its end (the head of its robust
# futex list, the word of set_tid_address) are missing under userfaultfd; a handler is there and serves every fault.
# Expected: the kernel's access waits for the handler, as that of every system call does, and the end is an ordinary one.
# Seen: no fault is raised. A lock held at the end stays locked without FUTEX_OWNER_DIED, and the word for
# set_tid_address is neither cleared nor woken. It is so for exit(2) of one thread as for SIGKILL.
# Why it matters: after a lazy restore, processes that share a robust mutex with one that ends wait for ever, and a
# pthread_join of that thread does too. Who fills memory should fill those pages first: a dump knows their addresses.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
static char source[2 * PAGE] __attribute__((aligned(4096)));
struct head { void *next; long offset; void *pending; };

/* The thread's own page holds the head of its robust list and, at 64, the word of set_tid_address. */
static void hold_lock(char *own, volatile unsigned *shared)
{
    struct head *head = (struct head *)own;
    void **entry = (void **)(shared + 16);
    shared[0] = getpid();
    *entry = head;
    head->next = entry;
    head->offset = (char *)shared - (char *)entry;
    head->pending = NULL;
    *(unsigned *)(own + 64) = getpid();
    syscall(SYS_set_robust_list, head, sizeof *head);
    syscall(SYS_set_tid_address, own + 64);
}

static void serve(int uffd, char *own, int served)
{
    unsigned char message[32];
    struct pollfd ready = { uffd, POLLIN, 0 };
    for (;;) {
        poll(&ready, 1, -1);
        if (read(uffd, message, 32) != 32)
            continue;
        (void)!write(served, "f", 1);
        do_copy(uffd, own, source, PAGE);
    }
}

static void try(const char *label, int missing, int by_kill)
{
    int memory = memfd_create("lock", 0), ready[2], served[2];
    if (ftruncate(memory, PAGE) || pipe(ready) || pipe(served))
        exit(77);
    fcntl(served[0], F_SETFL, O_NONBLOCK);
    volatile unsigned *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    pid_t handler = 0, child = fork();
    if (!child) {
        char *own = map(PAGE);
        hold_lock(own, shared);
        memcpy(source, own, PAGE);
        int uffd = open_uffd(0);
        if (missing) {
            madvise(own, PAGE, MADV_DONTNEED);
            if (do_register(uffd, own, PAGE, MISSING))
                _exit(77);
        }
        handler = fork();
        if (!handler)
            serve(uffd, own, served[1]);
        (void)!write(ready[1], &handler, sizeof handler);
        if (by_kill)
            pause();
        syscall(SYS_exit, 0);
    }
    if (read(ready[0], &handler, sizeof handler) != sizeof handler)
        exit(77);
    if (by_kill)
        kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    char byte;
    printf("%s: owner died %s, faults raised %s\n", label, shared[0] & FUTEX_OWNER_DIED ? "told" : "not told",
        read(served[0], &byte, 1) == 1 ? "some" : "none");
    kill(handler, SIGKILL);
}

static int child_main(void *at) { (void)at; syscall(SYS_exit, 0); return 0; }

/* A thread of this process whose set_tid_address word lies in a missing page. */
static void try_tid(const char *label, int missing)
{
    static char stack[16 * PAGE] __attribute__((aligned(4096)));
    char *own = map(PAGE);
    int uffd = open_uffd(0), served[2];
    if (pipe(served))
        exit(77);
    *(unsigned *)own = 1;
    memcpy(source, own, PAGE);
    if (missing) {
        madvise(own, PAGE, MADV_DONTNEED);
        if (do_register(uffd, own, PAGE, MISSING))
            exit(77);
    }
    pid_t handler = fork();
    if (!handler)
        serve(uffd, own, served[1]);
    int pidfd = -1;
    int tid = clone(child_main, stack + sizeof stack,
        CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_CHILD_CLEARTID | SIGCHLD | CLONE_PIDFD, NULL, &pidfd, NULL, own);
    waitpid(tid, NULL, 0);
    /* Only now is the page brought in, if it has not come. */
    printf("%s: the word is %s\n", label, *(volatile unsigned *)own ? "as before" : "cleared");
    kill(handler, SIGKILL);
}

int main(void)
{
    setbuf(stdout, NULL);
    signal(SIGCHLD, SIG_DFL);
    try("page present, exit", 0, 0);
    try("page missing, exit", 1, 0);
    try("page missing, SIGKILL", 1, 1);
    try_tid("set_tid_address, page present", 0);
    try_tid("set_tid_address, page missing", 1);
    return 0;
}
C
expect_output <<'END'
page present, exit: owner died told, faults raised none
page missing, exit: owner died not told, faults raised none
page missing, SIGKILL: owner died not told, faults raised none
set_tid_address, page present: the word is cleared
set_tid_address, page missing: the word is as before
END
