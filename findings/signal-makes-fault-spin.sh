#!/usr/bin/env bash
# Linux 6.18, x86_64. A thread waits for a page that is missing under userfaultfd, and something wants its attention: a
# signal that it has a handler for, SIGSTOP, a tracer's PTRACE_INTERRUPT, the freezer of control groups (version 2).
# Expected: it wakes for that if it waits in a load, and if it waits inside a system call it sleeps on until the page is
# there, one message a fault either way.
# Seen: in read(2) (the kernel stores into the page) it does neither. It looks at the page again and again at the full
# speed of a CPU, each time with a new message to the monitor, and is not stopped, traced or frozen before the page
# arrives. In mlock(2), which pins pages first, it sleeps.
# Why it matters: a container that is paused while pages are on their way burns its CPU and never gets frozen; timers and
# profilers (SIGALRM, SIGPROF, Go's preemption by SIGURG) do the same to a process at work. The monitor is woken thousands
# of times a second for one page, so it must not ask its source for a page twice.
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
mkdir "$TMP/groups"
AT_END+=('rmdir "$TMP"/groups/pageferry-finding-*' 'umount "$TMP/groups"')
mount -t cgroup2 none "$TMP/groups" 2>"$TMP/mount.err" || cannot "needs control groups of version 2"
export GROUPS_AT="$TMP/groups"
run_c <<'C'
#include "memory.h"
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
enum { LOAD, READ, MLOCK };
enum { SIGNAL, STOP, TRACER, FREEZER };
static const char *const waits[] = { "load", "read", "mlock" };
static const char *const wants[] = { "signal", "SIGSTOP", "tracer", "freezer" };
static struct shared { char *page; volatile int uffd, ready, handled; } *shared;
static void handler(int signal) { (void)signal, shared->handled = 1; }

static void wait_for_page(int how)
{
    shared->page = map(PAGE);
    shared->uffd = open_uffd(0);
    int zeros = open("/dev/zero", O_RDONLY);
    signal(SIGUSR1, handler);
    if (do_register(shared->uffd, shared->page, PAGE, MISSING))
        exit(77);
    shared->ready = 1;
    if (how == LOAD)
        *(volatile char *)shared->page;
    else if (how == READ ? read(zeros, shared->page, 1) != 1 : mlock(shared->page, PAGE))
        exit(77);
    for (;;)
        pause();
}
/* Messages that come, up to a number, until none has come for half a second. */
static int messages(int uffd, int most)
{
    char message[32];
    struct pollfd waiting = { .fd = uffd, .events = POLLIN };
    int count = 0;
    while (count < most && poll(&waiting, 1, 500) == 1)
        count += read(uffd, message, sizeof message) == sizeof message;
    return count;
}
static void write_to(const char *group, const char *file, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", group, file);
    FILE *out = fopen(path, "w");
    if (!out || fputs(text, out) < 0 || fclose(out))
        exit(77);
}
static int is_frozen(const char *group)
{
    char path[512], line[64];
    int frozen = 0;
    snprintf(path, sizeof path, "%s/cgroup.events", group);
    FILE *events = fopen(path, "r");
    while (events && fgets(line, sizeof line, events))
        frozen |= !strcmp(line, "frozen 1\n");
    return events ? (fclose(events), frozen) : 0;
}
static char state_of(pid_t pid)
{
    char path[64], line[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *stat = fopen(path, "r");
    if (!stat || !fgets(line, sizeof line, stat))
        exit(77);
    fclose(stat);
    return strrchr(line, ')')[2];
}
static void try(int how, int what)
{
    char group[256], number[32];
    *shared = (struct shared){ 0 };
    pid_t pid = fork();
    if (!pid)
        wait_for_page(how);
    while (!shared->ready)
        usleep(1000);
    int uffd = syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, pid, 0), shared->uffd, 0);
    if (uffd < 0 || messages(uffd, 2) != 1)
        exit(77);
    snprintf(group, sizeof group, "%s/pageferry-finding-%d", getenv("GROUPS_AT"), pid);
    snprintf(number, sizeof number, "%d", pid);
    if (what == SIGNAL)
        kill(pid, SIGUSR1);
    else if (what == STOP)
        kill(pid, SIGSTOP);
    else if (what == TRACER && (ptrace(PTRACE_SEIZE, pid, 0, 0) || ptrace(PTRACE_INTERRUPT, pid, 0, 0)))
        exit(77);
    else if (what == FREEZER) {
        if (mkdir(group, 0700))
            exit(77);
        write_to(group, "cgroup.procs", number);
        write_to(group, "cgroup.freeze", "1");
    }
    int more = messages(uffd, 500);
    char state = state_of(pid);
    int heard = what == SIGNAL ? shared->handled : what == FREEZER ? is_frozen(group) : state == 'T' || state == 't';
    printf("%s, %s: %s, %s\n", waits[how], wants[what], heard ? "heard" : "not heard",
           more >= 500 ? "500 messages more" : more ? "1 message more" : "no message more");
    fflush(stdout);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(uffd);
}
int main(void)
{
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int how = LOAD; how <= MLOCK; how++)
        for (int what = SIGNAL; what <= FREEZER; what++)
            try(how, what);
    return 0;
}
C
expect_output <<'END'
load, signal: heard, 1 message more
load, SIGSTOP: heard, no message more
load, tracer: heard, no message more
load, freezer: heard, no message more
read, signal: not heard, 500 messages more
read, SIGSTOP: not heard, 500 messages more
read, tracer: not heard, 500 messages more
read, freezer: not heard, 500 messages more
mlock, signal: not heard, no message more
mlock, SIGSTOP: not heard, no message more
mlock, tracer: not heard, no message more
mlock, freezer: not heard, no message more
END
