/* Fails calls about files below a directory, or kills at a call on a socket: loaded before the C library (LD_PRELOAD). See failing.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* What the test reads: how many calls were counted, and which one failed first. */
struct counts {
    _Atomic long counted;
    _Atomic long failed;
    char name[32];
};

static struct counts *counts;
static char below[PATH_MAX];
static size_t below_length;
static long first, last;
static int error_number;
static const char *thread;
static int sockets;

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("FAILING_COUNTS"), *directory = getenv("FAILING_BELOW");
    if (!file || !directory)
        return;
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *map = mmap(NULL, sizeof(struct counts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return;
    snprintf(below, sizeof below, "%s", directory);
    below_length = strlen(below);
    first = atol(getenv("FAILING_FIRST"));
    last = atol(getenv("FAILING_LAST"));
    error_number = atoi(getenv("FAILING_ERRNO"));
    thread = getenv("FAILING_THREAD");
    sockets = getenv("FAILING_SOCKETS") != NULL;
    counts = map;
}

static int fails(const char *call)
{
    char own[16];
    if (thread && (prctl(PR_GET_NAME, own) != 0 || strcmp(own, thread) != 0))
        return 0;
    long number = atomic_fetch_add(&counts->counted, 1) + 1;
    if (number < first || number > last)
        return 0;
    if (atomic_fetch_add(&counts->failed, 1) == 0)
        snprintf(counts->name, sizeof counts->name, "%s", call);
    if (!error_number)
        kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

static int is_below(const char *path)
{
    size_t length = strlen(path);
    if (length > 4 && strcmp(path + length - 4, ".log") == 0)
        return 0;
    return strncmp(path, below, below_length) == 0 && (path[below_length] == '/' || !path[below_length]);
}

static int path_fails(int dir, const char *path, const char *call)
{
    char link[64], whole[2 * PATH_MAX], base[PATH_MAX];
    if (!counts || sockets || !path)
        return 0;
    if (path[0] == '/')
        return is_below(path) && fails(call);
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    if (length < 0)
        return 0;
    base[length] = 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return is_below(whole) && fails(call);
}

static int fd_fails(int fd, const char *call)
{
    char link[64], path[PATH_MAX];
    if (!counts || sockets)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int kept = errno;
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = kept;
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_below(path) && fails(call);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_FD(type, name, parameters, arguments)         \
    type name parameters                                 \
    {                                                    \
        return fd_fails(fd, #name) ? -1 : REAL(name) arguments; \
    }

ON_FD(ssize_t, read, (int fd, void *to, size_t bytes), (fd, to, bytes))
ON_FD(ssize_t, pread, (int fd, void *to, size_t bytes, off_t at), (fd, to, bytes, at))
ON_FD(ssize_t, pread64, (int fd, void *to, size_t bytes, off64_t at), (fd, to, bytes, at))
ON_FD(ssize_t, readv, (int fd, const struct iovec *to, int count), (fd, to, count))
ON_FD(ssize_t, preadv, (int fd, const struct iovec *to, int count, off_t at), (fd, to, count, at))
ON_FD(ssize_t, preadv64, (int fd, const struct iovec *to, int count, off64_t at), (fd, to, count, at))
ON_FD(ssize_t, write, (int fd, const void *from, size_t bytes), (fd, from, bytes))
ON_FD(ssize_t, pwrite, (int fd, const void *from, size_t bytes, off_t at), (fd, from, bytes, at))
ON_FD(ssize_t, pwrite64, (int fd, const void *from, size_t bytes, off64_t at), (fd, from, bytes, at))
ON_FD(ssize_t, writev, (int fd, const struct iovec *from, int count), (fd, from, count))
ON_FD(ssize_t, pwritev, (int fd, const struct iovec *from, int count, off_t at), (fd, from, count, at))
ON_FD(ssize_t, pwritev64, (int fd, const struct iovec *from, int count, off64_t at), (fd, from, count, at))
ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, fdatasync, (int fd), (fd))
ON_FD(int, ftruncate, (int fd, off_t bytes), (fd, bytes))
ON_FD(int, ftruncate64, (int fd, off64_t bytes), (fd, bytes))
ON_FD(int, fallocate, (int fd, int mode, off_t at, off_t bytes), (fd, mode, at, bytes))
ON_FD(int, fallocate64, (int fd, int mode, off64_t at, off64_t bytes), (fd, mode, at, bytes))

ssize_t sendfile(int out, int in, off_t *at, size_t bytes)
{
    return fd_fails(in, "sendfile") ? -1 : REAL(sendfile)(out, in, at, bytes);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t bytes)
{
    return fd_fails(in, "sendfile64") ? -1 : REAL(sendfile64)(out, in, at, bytes);
}

ssize_t splice(int in, off64_t *in_at, int out, off64_t *out_at, size_t bytes, unsigned flags)
{
    return fd_fails(out, "splice") ? -1 : REAL(splice)(in, in_at, out, out_at, bytes, flags);
}

#define OPEN(name)                                        \
    int name(const char *path, int flags, ...)            \
    {                                                     \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = va_arg(rest, mode_t);               \
        va_end(rest);                                     \
        return path_fails(AT_FDCWD, path, #name) ? -1 : REAL(name)(path, flags, mode); \
    }

#define OPENAT(name)                                      \
    int name(int dir, const char *path, int flags, ...)   \
    {                                                     \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = va_arg(rest, mode_t);               \
        va_end(rest);                                     \
        return path_fails(dir, path, #name) ? -1 : REAL(name)(dir, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to)
{
    return path_fails(AT_FDCWD, to, "rename") ? -1 : REAL(rename)(from, to);
}

int unlink(const char *path)
{
    return path_fails(AT_FDCWD, path, "unlink") ? -1 : REAL(unlink)(path);
}

int mkdir(const char *path, mode_t mode)
{
    return path_fails(AT_FDCWD, path, "mkdir") ? -1 : REAL(mkdir)(path, mode);
}

int symlink(const char *to, const char *path)
{
    return path_fails(AT_FDCWD, path, "symlink") ? -1 : REAL(symlink)(to, path);
}

/* This thread's last call was an accept. A connection of which nobody has a copy yet ends with its process: the call that hands it
 * on is not counted, so that no kill comes in between. */
static _Thread_local int accepted;

static int socket_fails(const char *call)
{
    if (!counts || !sockets)
        return 0;
    int hands_on = accepted && strcmp(call, "sendmsg") == 0;
    accepted = 0;
    return !hands_on && fails(call);
}

#define ON_SOCKET(type, name, parameters, arguments)     \
    type name parameters                                 \
    {                                                    \
        return socket_fails(#name) ? -1 : REAL(name) arguments; \
    }

ON_SOCKET(ssize_t, recv, (int fd, void *to, size_t bytes, int flags), (fd, to, bytes, flags))
ON_SOCKET(ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), (fd, message, flags))
ON_SOCKET(ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
ON_SOCKET(int, shutdown, (int fd, int how), (fd, how))

int accept4(int fd, __SOCKADDR_ARG address, socklen_t *length, int flags)
{
    if (socket_fails("accept4"))
        return -1;
    int connection = REAL(accept4)(fd, address, length, flags);
    accepted = connection >= 0;
    return connection;
}
