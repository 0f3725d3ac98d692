#!/usr/bin/env bash
# Linux 6.18, x86_64. What UFFDIO_REGISTER takes for write protection with UFFD_FEATURE_WP_ASYNC.
# Expected: anonymous, shared and hugetlb memory, as for every other mode; mappings of files on a disk give EINVAL.
# Seen: with WP_ASYNC (and the mode write protection alone) mappings of a file on a disk are taken, private or shared,
# executable ones too, and stores to a shared mapping of a file on a disk are told apart, also after msync. Without
# the feature, or with missing pages in the same call, EINVAL. MAP_DROPPABLE memory is refused, though anonymous.
# Why it matters: dirty tracking needs no second way (soft-dirty) for mapped files; but a tracker that takes "all it could
# register" for "all that post-copy can fill" is wrong.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
case "$(stat -f -c %T "$TMP")" in
    tmpfs|ramfs) cannot "the temporary folder is in memory; set TMPDIR to one on a disk" ;;
esac
export PROBE_FILE=$TMP/data
run_c <<'C'
#include "memory.h"
static void *map_file(int fd, int flags, int prot)
{
    void *at = mmap(NULL, 4 * PAGE, prot, flags, fd, 0);
    return at == MAP_FAILED ? exit(77), NULL : at;
}
static void try(const char *label, void *at)
{
    int async = open_uffd(WP_ASYNC | WP_UNPOPULATED), plain = open_uffd(0);
    printf("%s: asynchronous %d", label, do_register(async, at, 4 * PAGE, WRITE_PROTECT));
    close(async);
    printf(", synchronous %d", do_register(plain, at, 4 * PAGE, WRITE_PROTECT));
    close(plain);
    async = open_uffd(WP_ASYNC);
    printf(", with missing pages %d\n", do_register(async, at, 4 * PAGE, MISSING | WRITE_PROTECT));
    close(async);
}
int main(void)
{
    int fd = open(getenv("PROBE_FILE"), O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 4 * PAGE))
        return 77;
    try("private file", map_file(fd, MAP_PRIVATE, PROT_READ | PROT_WRITE));
    try("shared file", map_file(fd, MAP_SHARED, PROT_READ | PROT_WRITE));
    try("code", map_file(fd, MAP_PRIVATE, PROT_READ | PROT_EXEC));
    try("droppable", mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, 0x08 | MAP_ANONYMOUS, -1, 0));
    char *at = map_file(fd, MAP_SHARED, PROT_READ | PROT_WRITE);
    memset(at, 1, 4 * PAGE);
    if (do_register(open_uffd(WP_ASYNC | WP_UNPOPULATED), at, 4 * PAGE, WRITE_PROTECT))
        return 1;
    print_written("shared file armed", at, 4, 1);
    at[0] = 2;
    if (msync(at, 4 * PAGE, MS_SYNC))
        return 77;
    print_written("page 0 stored to, msync", at, 4, 1);
    at[2 * PAGE] = 2;
    print_written("armed again, page 2 stored to", at, 4, 0);
    return 0;
}
C
expect_output <<'END'
private file: asynchronous 0, synchronous -22, with missing pages -22
shared file: asynchronous 0, synchronous -22, with missing pages -22
code: asynchronous 0, synchronous -22, with missing pages -22
droppable: asynchronous -22, synchronous -22, with missing pages -22
shared file armed: WWWW
page 0 stored to, msync: W---
armed again, page 2 stored to: --W-
END
