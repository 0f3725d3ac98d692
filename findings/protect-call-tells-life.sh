#!/usr/bin/env bash
# Linux 6.18, x86_64. How the holder of a userfaultfd learns that the process behind it is gone.
# Expected: poll tells (a hang-up or an error), as it does for pipes, sockets and pidfds.
# Seen: poll and read say the same (nothing) before and after the process's end. UFFDIO_WRITEPROTECT on a descriptor that
# has registered nothing for write protection asks without touching anything: ENOENT while the memory lives, ESRCH
# after its last user has gone.
# Why it matters: a page daemon that waits for events alone waits for ever after the program's end (a child's descriptor
# from UFFD_EVENT_FORK has no pidfd), and asking by UFFDIO_ZEROPAGE would fill a page where one is missing.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
#include <sys/socket.h>
static void send_fd(int socket, int fd)
{
    char byte = 0, space[CMSG_SPACE(sizeof fd)] = { 0 };
    struct iovec data = { &byte, 1 };
    struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    if (sendmsg(socket, &m, 0) != 1)
        _exit(1);
}
static int receive_fd(int socket)
{
    char byte, space[CMSG_SPACE(sizeof(int))];
    int fd;
    struct iovec data = { &byte, 1 };
    struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
    if (recvmsg(socket, &m, 0) != 1 || !CMSG_FIRSTHDR(&m))
        exit(77);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}
static void tell(const char *label, int uffd, char *at)
{
    char message[32];
    struct pollfd p = { uffd, POLLIN, 0 };
    int ready = poll(&p, 1, 50), got = result(read(uffd, message, sizeof message) < 0);
    printf("%s: poll %d, read %d, WRITEPROTECT %d\n", label, ready, got, do_protect(uffd, at, PAGE, 1));
}
int main(void)
{
    int pair[2];
    char *at = map(4 * PAGE), byte = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 77;
    pid_t child = fork();
    if (child == 0) {
        int uffd = open_uffd(0);
        if (do_register(uffd, at, 4 * PAGE, MISSING))
            _exit(1);
        send_fd(pair[1], uffd);
        close(uffd);
        _exit(read(pair[1], &byte, 1) != 1);
    }
    int uffd = receive_fd(pair[0]);
    tell("alive", uffd, at);
    if (write(pair[0], &byte, 1) != 1 || waitpid(child, NULL, 0) != child)
        return 77;
    tell("gone", uffd, at);
    return 0;
}
C
expect_output <<'END'
alive: poll 0, read -11, WRITEPROTECT -2
gone: poll 0, read -11, WRITEPROTECT -3
END
