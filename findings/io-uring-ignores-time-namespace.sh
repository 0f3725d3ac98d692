#!/usr/bin/env bash
# Linux 6.18, x86_64. A process lives in a time namespace whose CLOCK_MONOTONIC and CLOCK_BOOTTIME are 1000 s ahead of
# the host's or 100 s behind them, as criu restore makes one for a process from a host that booted earlier or later. It
# waits until a time of its clock that is 0.2 s away.
# Expected: 0.2 s, by whatever call.
# Seen: so for clock_nanosleep, futex (WAIT_BITSET, futex_waitv, and futex_wait of Linux 6.7) and timerfd. io_uring takes
# the same time for one of the host's clock: absolute timeouts (IORING_TIMEOUT_ABS, by either clock, and
# IORING_ENTER_ABS_TIMER) come 1000 s too late, or at once where the namespace is behind.
# Why it matters: after a migration the deadlines of a program that uses io_uring are wrong by the difference of the two
# hosts' uptimes: they come days late, or its loop spins.
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <signal.h>
#include <sys/timerfd.h>
#include <time.h>
enum { ABS_TIMER = 1 << 5 };
static void nothing(int signal) { (void)signal; }
static int ring;
static struct io_uring_params params;
static char *rings;
static struct io_uring_sqe *entry;

static void open_ring(void)
{
    ring = syscall(SYS_io_uring_setup, 1, &params);
    if (ring < 0 || !(params.features & IORING_FEAT_SINGLE_MMAP))
        exit(77);
    rings = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    entry = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (rings == MAP_FAILED || entry == MAP_FAILED)
        exit(77);
}
static int *at(unsigned offset) { return (int *)(rings + offset); }
/* Submits the one entry and waits; the result of the completion, or -EINTR if a signal came first. */
static int submit_and_wait(struct io_uring_sqe sqe)
{
    *entry = sqe;
    *at(params.sq_off.array) = 0;
    __atomic_store_n(at(params.sq_off.tail), *at(params.sq_off.tail) + 1, __ATOMIC_RELEASE);
    syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    int head = *at(params.cq_off.head);
    if (head == __atomic_load_n(at(params.cq_off.tail), __ATOMIC_ACQUIRE))
        return -EINTR;
    struct io_uring_cqe *done = (void *)(rings + params.cq_off.cqes);
    *at(params.cq_off.head) = head + 1;
    return done[head & *at(params.cq_off.ring_mask)].res;
}
static int wait_until(int way, struct timespec *time)
{
    uint32_t word = 0;
    uint64_t expirations;
    struct { uint64_t val, uaddr; uint32_t flags, reserved; } waiter = { 0, (uintptr_t)&word, 2 | 128, 0 };
    struct __kernel_timespec until = { time->tv_sec, time->tv_nsec };
    struct itimerspec timer = { .it_value = *time };
    struct io_uring_getevents_arg arg = { .ts = (uintptr_t)&until };
    struct io_uring_sqe sqe = { .opcode = IORING_OP_TIMEOUT, .addr = (uintptr_t)&until, .len = 1 };
    int file;
    switch (way) {
    case 0: return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, time, NULL);
    case 1: return result(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, time, NULL, -1) < 0);
    case 2: return result(syscall(449, &waiter, 1, 0, time, CLOCK_MONOTONIC) < 0);
    case 3: return result(syscall(455, &word, 0UL, 0xffffffffUL, 2 | 128, time, CLOCK_MONOTONIC) < 0);
    case 4:
        file = timerfd_create(CLOCK_MONOTONIC, 0);
        return result(timerfd_settime(file, TFD_TIMER_ABSTIME, &timer, NULL) || read(file, &expirations, 8) < 0);
    case 5: sqe.timeout_flags = IORING_TIMEOUT_ABS; return submit_and_wait(sqe);
    case 6: sqe.timeout_flags = IORING_TIMEOUT_ABS | IORING_TIMEOUT_BOOTTIME; return submit_and_wait(sqe);
    default:
        return result(syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG | ABS_TIMER,
                              &arg, sizeof arg) < 0);
    }
}
static const char *const names[] = { "clock_nanosleep", "futex, WAIT_BITSET", "futex_waitv", "futex_wait", "timerfd",
                                     "io_uring, TIMEOUT_ABS", "io_uring, TIMEOUT_ABS by CLOCK_BOOTTIME",
                                     "io_uring, ENTER_ABS_TIMER" };
static long passed_ms(struct timespec *since)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (now.tv_sec - since->tv_sec) * 1000 + (now.tv_nsec - since->tv_nsec) / 1000000;
}
/* What a process sees in a namespace that is so many seconds ahead. */
static int try(long ahead)
{
    char offsets[64];
    snprintf(offsets, sizeof offsets, "monotonic %ld 0\nboottime %ld 0\n", ahead, ahead);
    int file = unshare(CLONE_NEWTIME) ? -1 : open("/proc/self/timens_offsets", O_WRONLY);
    if (file < 0 || write(file, offsets, strlen(offsets)) < 0)
        return 77;
    pid_t child = fork();
    int status = 77;
    if (child)
        return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    struct sigaction no_restart = { .sa_handler = nothing };
    sigaction(SIGALRM, &no_restart, NULL);
    for (int way = 0; way < 8; way++) {
        struct timespec time, began;
        params = (struct io_uring_params){ 0 };
        open_ring();
        clock_gettime(way == 6 ? CLOCK_BOOTTIME : CLOCK_MONOTONIC, &time);
        clock_gettime(CLOCK_MONOTONIC_RAW, &began);
        time.tv_nsec += 200000000;
        time.tv_sec += time.tv_nsec / 1000000000;
        time.tv_nsec %= 1000000000;
        alarm(3);
        int outcome = wait_until(way, &time);
        alarm(0);
        printf("%+ld s, %s: %s\n", ahead, names[way],
               outcome == -EINTR ? "not within 3 s" : passed_ms(&began) < 190 ? "too early" : "in time");
        close(ring);
    }
    fflush(stdout);
    _exit(0);
}
int main(void)
{
    static const long ahead[] = { 1000, -100 };
    for (int i = 0; i < 2; i++) {
        pid_t child = fork();
        int status = 77;
        if (!child)
            _exit(try(ahead[i]));
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status))
            return 77;
    }
    return 0;
}
C
expect_output <<'END'
+1000 s, clock_nanosleep: in time
+1000 s, futex, WAIT_BITSET: in time
+1000 s, futex_waitv: in time
+1000 s, futex_wait: in time
+1000 s, timerfd: in time
+1000 s, io_uring, TIMEOUT_ABS: not within 3 s
+1000 s, io_uring, TIMEOUT_ABS by CLOCK_BOOTTIME: not within 3 s
+1000 s, io_uring, ENTER_ABS_TIMER: not within 3 s
-100 s, clock_nanosleep: in time
-100 s, futex, WAIT_BITSET: in time
-100 s, futex_waitv: in time
-100 s, futex_wait: in time
-100 s, timerfd: in time
-100 s, io_uring, TIMEOUT_ABS: too early
-100 s, io_uring, TIMEOUT_ABS by CLOCK_BOOTTIME: too early
-100 s, io_uring, ENTER_ABS_TIMER: too early
END
