#!/usr/bin/env bash
# Linux 6.18, x86_64. One mremap that moves several mappings at once (possible since 6.17), where userfaultfd knows some.
# Expected: as mremap does elsewhere, all is moved or nothing; and memory that is registered with userfaultfd moves as
# any other does, for a single registered mapping does.
# Seen: EFAULT as soon as one mapping of several is registered, though each alone could be moved. What stands before it
# has been moved by then and stays so; the answer does not say how far the call came.
# Why it matters: a program that moves such a span works, and fails while its memory is under post-copy or tracked by
# write protection, with half of the span at the new place.
. "$(dirname "$0")/lib/common.bash"
need_kernel 6.18
run_c <<'C'
#include "memory.h"
static char *two_mappings(void)
{
    char *at = map(8 * PAGE);
    memset(at, 1, 8 * PAGE);
    if (mprotect(at + 4 * PAGE, 4 * PAGE, PROT_READ))
        exit(77);
    return at;
}
/* Whether a page is mapped at all. */
static int is_mapped(char *at) { return !msync(at, PAGE, MS_ASYNC); }

static void move(const char *label, char *from, size_t pages)
{
    char *to = map(pages * PAGE);
    munmap(to, pages * PAGE);
    int failed = mremap(from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED;
    int error = result(failed);
    printf("%s: %d, first half %s, second half %s\n", label, error, is_mapped(to) ? "moved" : "stays",
        is_mapped(to + pages / 2 * PAGE) ? "moved" : "stays");
}

int main(void)
{
    int uffd = open_uffd(0);
    move("not registered", two_mappings(), 8);
    char *at = two_mappings();
    if (do_register(uffd, at, 4 * PAGE, MISSING))
        return 77;
    move("first registered", at, 8);
    at = two_mappings();
    if (do_register(uffd, at + 4 * PAGE, 4 * PAGE, MISSING))
        return 77;
    move("second registered", at, 8);
    at = two_mappings();
    if (do_register(uffd, at + 4 * PAGE, 4 * PAGE, WRITE_PROTECT))
        return 77;
    move("second registered for write protection", at, 8);
    at = two_mappings();
    if (do_register(uffd, at, 8 * PAGE, MISSING))
        return 77;
    move("registered, the first alone", at, 4);
    move("registered, the second alone", at + 4 * PAGE, 4);
    return 0;
}
C
expect_output <<'END'
not registered: 0, first half moved, second half moved
first registered: -14, first half stays, second half stays
second registered: -14, first half moved, second half stays
second registered for write protection: -14, first half moved, second half stays
registered, the first alone: 0, first half moved, second half moved
registered, the second alone: 0, first half moved, second half moved
END
