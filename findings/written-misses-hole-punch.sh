#!/usr/bin/env bash
# Linux 6.18, x86_64. PAGEMAP_SCAN with asynchronous write protection (UFFD_FEATURE_WP_ASYNC) on shared file memory.
# Expected: a page whose content went away since the last scan is reported as written, as it is for anonymous memory
# after MADV_DONTNEED.
# Seen: on a memfd nothing is reported: not after a hole punched by the descriptor, not after MADV_REMOVE by the program
# itself, not after a truncation and growth. The pages read zero, and reading them does not make them "written" either.
# Why it matters: a pre-copy that sends what the scan calls written leaves the old bytes on the other host. Holes of the
# file must be compared (SEEK_HOLE) or sent as well.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
static char *armed(int fd, int shared)
{
    char *at = shared ? mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : map(4 * PAGE);
    int uffd = open_uffd(WP_ASYNC | WP_UNPOPULATED | WP_SHMEM);
    memset(at, 1, 4 * PAGE);
    if (do_register(uffd, at, 4 * PAGE, WRITE_PROTECT))
        exit(77);
    print_written("  armed", at, 4, 1);
    return at;
}
static int file(void)
{
    int fd = memfd_create("probe", 0);
    return ftruncate(fd, 4 * PAGE) ? exit(77), -1 : fd;
}
static void check(const char *label, char *at)
{
    print_written(label, at, 4, 0);
    printf("  page 1 reads %d\n", at[PAGE]);
    print_written("  after reading", at, 4, 0);
}
int main(void)
{
    char *at = armed(-1, 0);
    madvise(at + PAGE, PAGE, MADV_DONTNEED);
    check("anonymous, MADV_DONTNEED of page 1", at);
    int fd = file();
    at = armed(fd, 1);
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, PAGE))
        return 77;
    check("memfd, hole at page 1", at);
    at = armed(file(), 1);
    if (madvise(at + PAGE, PAGE, MADV_REMOVE))
        return 77;
    check("memfd, MADV_REMOVE of page 1", at);
    fd = file();
    at = armed(fd, 1);
    if (ftruncate(fd, 0) || ftruncate(fd, 4 * PAGE))
        return 77;
    check("memfd, truncated and grown", at);
    at[2 * PAGE] = 1;
    print_written("memfd, page 2 stored to", at, 4, 0);
    return 0;
}
C
expect_output <<'END'
  armed: WWWW
anonymous, MADV_DONTNEED of page 1: -W--
  page 1 reads 0
  after reading: -W--
  armed: WWWW
memfd, hole at page 1: ----
  page 1 reads 0
  after reading: ----
  armed: WWWW
memfd, MADV_REMOVE of page 1: ----
  page 1 reads 0
  after reading: ----
  armed: WWWW
memfd, truncated and grown: ----
  page 1 reads 0
  after reading: ----
memfd, page 2 stored to: --W-
END
