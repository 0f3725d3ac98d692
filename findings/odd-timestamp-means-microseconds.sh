#!/usr/bin/env bash
# Linux 6.18, x86_64. A connection is restored as CRIU does it: in TCP_REPAIR it is given the value that TCP_TIMESTAMP
# had at the source, so that the peer sees timestamps that go on.
# Expected: they go on from that value in steps of a millisecond, whatever it is.
# Seen: so for even values. An odd one switches the connection to microseconds (the lowest bit stands for the unit since
# Linux 6.7, and reading sets it accordingly). Older kernels knew no such bit: their values are odd or even.
# Why it matters: half of the connections that come from a kernel before 6.7 run through the 32 bits in 71 minutes instead
# of 49 days. After 36 minutes of silence their timestamps look old, and the peer drops what comes (the last lines).
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>
/* A connection over loopback: its two ends. */
static void connected(int ends[2])
{
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || listen(listener, 1) || getsockname(listener, (struct sockaddr *)&at, &len)
        || connect(ends[0], (struct sockaddr *)&at, len) || (ends[1] = accept(listener, NULL, NULL)) < 0)
        exit(77);
    close(listener);
}
static uint32_t timestamp(int end)
{
    uint32_t value = 0;
    socklen_t len = sizeof value;
    if (getsockopt(end, IPPROTO_TCP, TCP_TIMESTAMP, &value, &len))
        exit(77);
    return value;
}
static void restore(int end, uint32_t value)
{
    int on = 1, off = 0;
    if (setsockopt(end, IPPROTO_TCP, TCP_REPAIR, &on, sizeof on)
        || setsockopt(end, IPPROTO_TCP, TCP_TIMESTAMP, &value, sizeof value)
        || setsockopt(end, IPPROTO_TCP, TCP_REPAIR, &off, sizeof off))
        exit(77);
}
/* Steps of the timestamp in a millisecond: 1, or 1000. */
static long steps_in_a_ms(int end)
{
    struct timespec began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    uint32_t first = timestamp(end);
    usleep(200000);
    clock_gettime(CLOCK_MONOTONIC, &now);
    long us = (now.tv_sec - began.tv_sec) * 1000000 + (now.tv_nsec - began.tv_nsec) / 1000;
    double steps = (timestamp(end) - first) * 1000.0 / us;
    return steps > 500 && steps < 1500 ? 1000 : steps > 0.5 && steps < 1.5 ? 1 : -1;
}
static void run_on_from(const char *what, uint32_t value)
{
    int ends[2];
    connected(ends);
    restore(ends[0], value);
    printf("%s: %ld a millisecond\n", what, steps_in_a_ms(ends[0]));
}
static void after_silence(const char *what, uint32_t later)
{
    int ends[2];
    char byte;
    connected(ends);
    restore(ends[0], (timestamp(ends[0]) & ~1U) + later);
    if (write(ends[0], "x", 1) != 1)
        exit(77);
    struct pollfd arrives = { .fd = ends[1], .events = POLLIN };
    printf("%s: %s\n", what, poll(&arrives, 1, 1500) == 1 && read(ends[1], &byte, 1) == 1 ? "received" : "not received");
}
int main(void)
{
    run_on_from("restored with 1000000", 1000000);
    run_on_from("restored with 1000001", 1000001);
    after_silence("a byte with a timestamp 36 minutes later, in milliseconds", 36 * 60 * 1000U);
    after_silence("a byte with a timestamp 36 minutes later, in microseconds", 36 * 60 * 1000000U);
    return 0;
}
C
expect_output <<'END'
restored with 1000000: 1 a millisecond
restored with 1000001: 1000 a millisecond
a byte with a timestamp 36 minutes later, in milliseconds: received
a byte with a timestamp 36 minutes later, in microseconds: not received
END
