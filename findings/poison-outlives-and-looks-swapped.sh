#!/usr/bin/env bash
# Linux 6.18, x86_64. UFFDIO_POISON and what others see of it.
# Expected: COPY and CONTINUE over a poisoned page give EEXIST, as ZEROPAGE and POISON do; a hole punched into the file removes the
# poison of a page with the page; /proc/PID/pagemap does not call poisoned or guarded pages swapped.
# Seen: COPY and CONTINUE replace the poison. After the hole the mapping is poisoned still, only truncation or MADV_DONTNEED end that.
# Both markers have pagemap's bit 62 (swapped), on a machine without swap too; bit 58 (guard) tells the guards apart, and
# nothing but an impossible swap entry the poison.
# Why it matters: tools that count swapped pages, or dump whatever is "present or swapped", take markers for memory; a
# file whose hole was punched to heal it is not healed for those who had it mapped.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
static const char *bits(char *at)
{
    static char line[64];
    uint64_t e = pagemap_entry(at);
    snprintf(line, sizeof line, "present %d swapped %d guard %d", (int)(e >> 63), (int)(e >> 62 & 1), (int)(e >> 58 & 1));
    return line;
}
int main(void)
{
    static char source[PAGE] __attribute__((aligned(4096)));
    char *at = map(4 * PAGE);
    int uffd = open_uffd(POISON);
    if (do_register(uffd, at, 4 * PAGE, MISSING) || do_poison(uffd, at, PAGE))
        return 77;
    if (madvise(at + PAGE, PAGE, GUARD_INSTALL))
        return 77;
    printf("poisoned: %s\n", bits(at));
    printf("guarded: %s\n", bits(at + PAGE));
    printf("missing: %s\n", bits(at + 2 * PAGE));
    printf("over poison: POISON %d ZEROPAGE %d", do_poison(uffd, at, PAGE), do_zeropage(uffd, at, PAGE));
    printf(" COPY %d\n", do_copy(uffd, at, source, PAGE));
    printf("then: %s\n", bits(at));

    int fd = memfd_create("probe", 0);
    if (ftruncate(fd, 2 * PAGE))
        return 77;
    at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (do_register(uffd, at, 2 * PAGE, MISSING) || do_poison(uffd, at, 2 * PAGE))
        return 77;
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 * PAGE))
        return 77;
    printf("memfd, hole punched: %s\n", bits(at));
    madvise(at, PAGE, MADV_DONTNEED);
    printf("memfd, MADV_DONTNEED: %s\n", bits(at));
    if (ftruncate(fd, 0) || ftruncate(fd, 2 * PAGE))
        return 77;
    printf("memfd, truncated and grown: %s\n", bits(at + PAGE));

    struct { struct range range; uint64_t mode; int64_t mapped; } arg = { { (uintptr_t)at, PAGE }, 0, 0 };
    int minor = open_uffd(1 << 10 | POISON);
    close(uffd);
    at[0] = 1;
    madvise(at, PAGE, MADV_DONTNEED);
    if (do_register(minor, at, 2 * PAGE, 4) || do_poison(minor, at, PAGE))
        return 77;
    printf("memfd, page in the file, poisoned: CONTINUE %d\n", result(ioctl(minor, _IOWR(0xAA, 0x07, arg), &arg)));
    printf("then: %s, reads %d\n", bits(at), at[0]);
    return 0;
}
C
expect_output <<'END'
poisoned: present 0 swapped 1 guard 0
guarded: present 0 swapped 1 guard 1
missing: present 0 swapped 0 guard 0
over poison: POISON -17 ZEROPAGE -17 COPY 0
then: present 1 swapped 0 guard 0
memfd, hole punched: present 0 swapped 1 guard 0
memfd, MADV_DONTNEED: present 0 swapped 0 guard 0
memfd, truncated and grown: present 0 swapped 0 guard 0
memfd, page in the file, poisoned: CONTINUE 0
then: present 1 swapped 0 guard 0, reads 1
END
