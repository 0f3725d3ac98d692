#!/usr/bin/env bash
# Linux 6.18, x86_64. /proc/PID/cmdline and /proc/PID/environ are read while the pages of the process with its arguments
# and its environment are missing under userfaultfd; a handler is there and serves every fault.
# Expected: the read waits for the handler and returns the text, as process_vm_readv of the same bytes does, or fails.
# Seen: it returns nothing at once, without an error, and raises no fault.
# Why it matters: after a lazy restore `ps` shows such a process as a thread of the kernel ([name]), and what looks for
# processes by `pgrep -f` takes a service for ended that runs. Who fills memory should fill these pages early.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <pthread.h>
#include <signal.h>
static char source[64 * PAGE] __attribute__((aligned(4096)));
static char *from;
static size_t length;
static int ready[2], served[2];

static int length_of(pid_t pid, const char *name)
{
    char path[64];
    static char text[64 * PAGE];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    int file = open(path, O_RDONLY), got = read(file, text, sizeof text);
    close(file);
    return got < 0 ? -errno : got;
}

static const char *faults(void)
{
    char byte;
    return read(served[0], &byte, 1) == 1 ? "some" : "none";
}

/* Takes the pages of the first thread's stack away from the one with the arguments on: this thread has another stack. */
static void *take_away(void *unused)
{
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long start, end = 0;
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "[stack]") && sscanf(line, "%lx-%lx", &start, &end) != 2)
            _exit(77);
    length = end - (uintptr_t)from;
    if (!end || length > sizeof source)
        _exit(77);
    memcpy(source, from, length);
    int uffd = open_uffd(0);
    pid_t handler = fork();
    if (!handler) {
        unsigned char message[32];
        struct pollfd poller = { uffd, POLLIN, 0 };
        while (poll(&poller, 1, -1) > 0) {
            if (read(uffd, message, 32) != 32)
                continue;
            (void)!write(served[1], "f", 1);
            do_copy(uffd, from, source, length);
        }
    }
    madvise(from, length, MADV_DONTNEED);
    if (do_register(uffd, from, length, MISSING))
        _exit(77);
    (void)!write(ready[1], &handler, sizeof handler);
    for (;;)
        pause();
    return unused;
}

int main(int count, char **arguments)
{
    if (count == 1) {
        char *again[] = { arguments[0], "an-argument", NULL }, *environment[] = { "NAME=value", NULL };
        execve("/proc/self/exe", again, environment);
        exit(77);
    }
    char *text = arguments[1], read_text[12] = "";
    setbuf(stdout, NULL);
    if (pipe(ready) || pipe(served))
        exit(77);
    fcntl(served[0], F_SETFL, O_NONBLOCK);
    from = (char *)((uintptr_t)arguments[0] & ~(PAGE - 1));
    pid_t child = fork(), handler;
    if (!child) {
        pthread_t thread;
        pthread_create(&thread, NULL, take_away, NULL);
        pthread_join(thread, NULL);
    }
    if (read(ready[0], &handler, sizeof handler) != sizeof handler)
        exit(77);
    int shown = length_of(child, "cmdline"), environment = length_of(child, "environ");
    printf("missing: cmdline %d bytes, environ %d bytes, faults raised: %s\n", shown, environment, faults());
    struct iovec to = { read_text, 11 }, at = { text, 11 };
    ssize_t got = process_vm_readv(child, &to, 1, &at, 1, 0);
    printf("process_vm_readv: %zd bytes, %s, faults raised: %s\n", got, read_text, faults());
    shown = length_of(child, "cmdline");
    printf("present: cmdline %s, environ %d bytes\n", shown > 12 ? "whole" : "empty", length_of(child, "environ"));
    kill(child, SIGKILL);
    kill(handler, SIGKILL);
    return 0;
}
C
expect_output <<'END'
missing: cmdline 0 bytes, environ 0 bytes, faults raised: none
process_vm_readv: 11 bytes, an-argument, faults raised: some
present: cmdline whole, environ 11 bytes
END
