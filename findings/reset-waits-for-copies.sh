#!/usr/bin/env bash
# Linux 6.18, x86_64 (TCP on loopback). Ending a connection by a reset while another process has a copy of the socket.
# Expected: SO_LINGER with 0 s and close reset the connection, and shutdown first makes no difference.
# Seen: nothing is sent until the last copy is closed; connect to AF_UNSPEC resets at once, whatever copies there are.
# After a shutdown of both directions the other side has read a clean end of data before any reset.
# Why it matters: for a page server "the connection ended cleanly" can mean "the transfer is complete". A daemon that has
# forked a helper, or calls shutdown first, tells its peer of success where it meant failure.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <netinet/in.h>
#include <sys/socket.h>
static int near, far;
static void connection(void)
{
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof to;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    near = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&to, len) || listen(listener, 1) || getsockname(listener, (void *)&to, &len)
        || connect(near, (void *)&to, len) || (far = accept(listener, NULL, NULL)) < 0)
        exit(77);
    struct linger none = { 1, 0 };
    setsockopt(near, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    close(listener);
}
static const char *peer(void)
{
    char byte;
    ssize_t got = recv(far, &byte, 1, MSG_DONTWAIT);
    if (got == 0)
        return "end of data";
    return errno == EAGAIN ? "nothing" : errno == ECONNRESET ? "reset" : "another error";
}
int main(void)
{
    connection();
    close(near);
    printf("closed: %s\n", peer());
    connection();
    int copy = dup(near);
    close(near);
    printf("closed, a copy left: %s\n", peer());
    close(copy);
    printf("copy closed: %s\n", peer());
    connection();
    copy = dup(near);
    struct sockaddr none = { .sa_family = AF_UNSPEC };
    if (connect(near, &none, sizeof none))
        return 1;
    printf("connect to AF_UNSPEC, a copy left: %s\n", peer());
    close(copy);
    connection();
    shutdown(near, SHUT_RDWR);
    close(near);
    printf("shutdown, then closed: %s\n", peer());
    return 0;
}
C
expect_output <<'END'
closed: reset
closed, a copy left: nothing
copy closed: reset
connect to AF_UNSPEC, a copy left: reset
shutdown, then closed: end of data
END
