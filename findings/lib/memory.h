/* userfaultfd and PAGEMAP_SCAN for the probes; numbers from include/uapi/linux/userfaultfd.h and fs.h of Linux 6.18,
 * written out because distributions ship older headers. Helpers return 0 or -errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define UNUSED __attribute__((unused))
#define GUARD_INSTALL 102

enum { MISSING = 1, WRITE_PROTECT = 2 };
enum {
    EVENT_FORK = 1 << 1, EVENT_REMAP = 1 << 2, EVENT_REMOVE = 1 << 3, EVENT_UNMAP = 1 << 6,
    WP_SHMEM = 1 << 12, WP_UNPOPULATED = 1 << 13, POISON = 1 << 14, WP_ASYNC = 1 << 15, MOVE = 1 << 16
};
struct range { uint64_t start, len; };

UNUSED static int result(int failed) { return failed ? -errno : 0; }

UNUSED static int open_uffd(uint64_t features)
{
    struct { uint64_t api, features, ioctls; } api = { 0xAA, features, 0 };
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || ioctl(fd, _IOWR(0xAA, 0x3F, api), &api)) {
        perror("userfaultfd");
        exit(77);
    }
    return fd;
}

UNUSED static int do_register(int fd, void *at, size_t len, uint64_t mode)
{
    struct { struct range range; uint64_t mode, ioctls; } arg = { { (uintptr_t)at, len }, mode, 0 };
    return result(ioctl(fd, _IOWR(0xAA, 0x00, arg), &arg));
}

UNUSED static int do_copy(int fd, void *to, const void *from, size_t len)
{
    struct { uint64_t dst, src, len, mode; int64_t copied; } arg = { (uintptr_t)to, (uintptr_t)from, len, 0, 0 };
    return result(ioctl(fd, _IOWR(0xAA, 0x03, arg), &arg));
}

UNUSED static int do_zeropage(int fd, void *at, size_t len)
{
    struct { struct range range; uint64_t mode; int64_t done; } arg = { { (uintptr_t)at, len }, 0, 0 };
    return result(ioctl(fd, _IOWR(0xAA, 0x04, arg), &arg));
}

UNUSED static int do_move(int fd, void *to, void *from, size_t len)
{
    struct { uint64_t dst, src, len, mode; int64_t moved; } arg = { (uintptr_t)to, (uintptr_t)from, len, 0, 0 };
    return result(ioctl(fd, _IOWR(0xAA, 0x05, arg), &arg));
}

UNUSED static int do_protect(int fd, void *at, size_t len, uint64_t mode)
{
    struct { struct range range; uint64_t mode; } arg = { { (uintptr_t)at, len }, mode };
    return result(ioctl(fd, _IOWR(0xAA, 0x06, arg), &arg));
}

UNUSED static int do_poison(int fd, void *at, size_t len)
{
    struct { struct range range; uint64_t mode; int64_t done; } arg = { { (uintptr_t)at, len }, 0, 0 };
    return result(ioctl(fd, _IOWR(0xAA, 0x08, arg), &arg));
}

UNUSED static void *map(size_t len)
{
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(77);
    }
    return at;
}

/* One of the process's own entries of /proc/PID/pagemap. */
UNUSED static uint64_t pagemap_entry(void *at)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)at / PAGE * 8) != 8)
        exit(77);
    close(fd);
    return entry;
}

/* Prints which pages PAGEMAP_SCAN calls written (one character a page); rearm write-protects them again. */
UNUSED static void print_written(const char *label, void *at, size_t pages, int rearm)
{
    struct { uint64_t start, end, categories; } found[64];
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
    } arg = { sizeof arg, rearm ? 3 : 0, (uintptr_t)at, (uintptr_t)at + pages * PAGE, 0, (uintptr_t)found, 64, 0, 0, 2, 0, 2 };
    char line[65] = { 0 };
    int fd = open("/proc/self/pagemap", O_RDONLY);
    int count = ioctl(fd, _IOWR('f', 16, arg), &arg);
    if (count < 0)
        exit(77);
    memset(line, '-', pages);
    for (int i = 0; i < count; i++)
        for (uint64_t p = found[i].start; p < found[i].end; p += PAGE)
            line[(p - (uintptr_t)at) / PAGE] = 'W';
    printf("%s: %s\n", label, line);
    close(fd);
}
