#!/usr/bin/env bash
# Linux 6.18, x86_64. UFFDIO_MOVE of private memory.
# Expected: EBUSY while a forked child shares the page, success once the child is gone; EBUSY for a page that a pipe holds
# after vmsplice, as for other pages the kernel has a hand on; and a missing page whose absence is write-protected
# (UFFD_FEATURE_WP_UNPOPULATED) can be moved to, as it can be copied to.
# Seen: EBUSY goes on after the child's end, and reading does not help: only a store to the page does. A page that a pipe
# holds is moved. To a write-protected missing page MOVE gives EEXIST, while COPY succeeds.
# Why it matters: a program that has once called system() or fork() makes MOVE fail for all it has not written since, so
# swapping memory out and in by MOVE needs the way through COPY; and data "in flight" in a pipe changes with the moved page.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
int main(void)
{
    static char zeros[PAGE] __attribute__((aligned(4096)));
    char *from = map(4 * PAGE), *to = map(4 * PAGE);
    int uffd = open_uffd(MOVE | WP_UNPOPULATED | WP_ASYNC);
    memset(from, 1, 4 * PAGE);
    if (do_register(uffd, to, 4 * PAGE, MISSING))
        return 77;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    if (waitpid(child, NULL, 0) != child)
        return 77;
    printf("after the child's end: %d\n", do_move(uffd, to, from, PAGE));
    printf("read (%d): ", *(volatile char *)from);
    printf("%d\n", do_move(uffd, to, from, PAGE));
    from[0] = 2;
    printf("stored to: %d\n", do_move(uffd, to, from, PAGE));

    int ends[2];
    char got = 0;
    from = map(PAGE);
    from[0] = 'a';
    struct iovec whole = { from, PAGE };
    if (pipe(ends) || vmsplice(ends[1], &whole, 1, 0) != (ssize_t)PAGE)
        return 77;
    printf("held by a pipe: %d\n", do_move(uffd, to + PAGE, from, PAGE));
    to[PAGE] = 'b';
    if (read(ends[0], &got, 1) != 1)
        return 77;
    printf("moved, then stored to: the pipe has '%c'\n", got);

    from = map(2 * PAGE);
    memset(from, 1, 2 * PAGE);
    to = map(2 * PAGE);
    if (do_register(uffd, to, 2 * PAGE, MISSING | WRITE_PROTECT) || do_protect(uffd, to, 2 * PAGE, 1))
        return 77;
    printf("to a write-protected missing page: MOVE %d", do_move(uffd, to, from, PAGE));
    printf(" COPY %d\n", do_copy(uffd, to + PAGE, zeros, PAGE));
    return 0;
}
C
expect_output <<'END'
after the child's end: -16
read (1): -16
stored to: 0
held by a pipe: 0
moved, then stored to: the pipe has 'b'
to a write-protected missing page: MOVE -17 COPY 0
END
