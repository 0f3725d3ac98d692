#!/usr/bin/env bash
# Linux 6.18, x86_64. userfaultfd calls over a registered range that mprotect has split into two mappings.
# Expected: UFFDIO_COPY fills the first mapping and reports how far it came, or both, as both are registered; and
# UFFDIO_WRITEPROTECT refuses ranges with a hole or an unregistered part without changing anything.
# Seen: COPY, ZEROPAGE and POISON give ENOENT and do nothing, though each half alone is accepted. WRITEPROTECT succeeds
# over a hole; over an unregistered mapping it gives ENOENT after it has protected what stood before.
# Why it matters: ENOENT is also what an unmapped range gives. A page daemon that takes it for "gone" drops pages the
# program still needs as soon as the program changes the protection of a part: try again mapping by mapping.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
static int is_protected(char *at) { return pagemap_entry(at) >> 57 & 1; }
int main(void)
{
    static char source[8 * PAGE] __attribute__((aligned(4096)));
    int uffd = open_uffd(0);
    char *at = map(8 * PAGE);
    if (do_register(uffd, at, 8 * PAGE, MISSING) || mprotect(at + 4 * PAGE, 4 * PAGE, PROT_READ))
        return 77;
    printf("over the split: COPY %d ZEROPAGE %d POISON %d\n", do_copy(uffd, at, source, 8 * PAGE),
        do_zeropage(uffd, at, 8 * PAGE), do_poison(uffd, at, 8 * PAGE));
    printf("halves: COPY %d and %d\n", do_copy(uffd, at, source, 4 * PAGE),
        do_copy(uffd, at + 4 * PAGE, source, 4 * PAGE));
    at = map(8 * PAGE);
    memset(at, 1, 8 * PAGE);
    munmap(at + 3 * PAGE, PAGE);
    if (do_register(uffd, at, 8 * PAGE, WRITE_PROTECT))
        return 77;
    printf("over a hole: WRITEPROTECT %d", do_protect(uffd, at, 8 * PAGE, 1));
    printf(", protected %d %d\n", is_protected(at), is_protected(at + 5 * PAGE));
    at = map(8 * PAGE);
    memset(at, 1, 8 * PAGE);
    if (do_register(uffd, at, 4 * PAGE, WRITE_PROTECT))
        return 77;
    printf("over an unregistered half: WRITEPROTECT %d", do_protect(uffd, at, 8 * PAGE, 1));
    printf(", protected %d %d\n", is_protected(at), is_protected(at + 5 * PAGE));
    return 0;
}
C
expect_output <<'END'
over the split: COPY -2 ZEROPAGE -2 POISON -2
halves: COPY 0 and 0
over a hole: WRITEPROTECT 0, protected 1 1
over an unregistered half: WRITEPROTECT -2, protected 1 0
END
