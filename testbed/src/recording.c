/* Records what a program does to files below a directory: loaded before the C library (LD_PRELOAD). See recording.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int record = -1;
static char below[PATH_MAX];
static size_t below_length;

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("RECORDING_FILE"), *directory = getenv("RECORDING_BELOW");
    if (!file || !directory)
        return;
    snprintf(below, sizeof below, "%s", directory);
    below_length = strlen(below);
    record = open(file, O_WRONLY | O_APPEND | O_CLOEXEC);
}

static int is_below(const char *path)
{
    return strncmp(path, below, below_length) == 0 && (path[below_length] == '/' || !path[below_length]);
}

/* One line: what, and one or two paths. It is there before the call is made. */
static void note(const char *what, const char *path, const char *other)
{
    char line[3 * PATH_MAX];
    int kept = errno;
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", what, path, other);
    if (syscall(SYS_write, record, line, length) != length)
        abort();
    errno = kept;
}

static int whole(int dir, const char *path, char *out)
{
    char link[64], base[PATH_MAX];
    if (record < 0 || !path)
        return 0;
    if (path[0] == '/') {
        snprintf(out, 2 * PATH_MAX, "%s", path);
        return is_below(out);
    }
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    if (length < 0)
        return 0;
    base[length] = 0;
    snprintf(out, 2 * PATH_MAX, "%s/%s", base, path);
    return is_below(out);
}

static void note_fd(int fd, const char *what)
{
    char link[64], path[PATH_MAX];
    if (record < 0)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int kept = errno;
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = kept;
    if (length < 0)
        return;
    path[length] = 0;
    if (is_below(path))
        note(what, path, "");
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_FD(what, type, name, parameters, arguments) \
    type name parameters                               \
    {                                                  \
        note_fd(fd, what);                             \
        return REAL(name) arguments;                   \
    }

ON_FD("write", ssize_t, write, (int fd, const void *from, size_t bytes), (fd, from, bytes))
ON_FD("write", ssize_t, pwrite, (int fd, const void *from, size_t bytes, off_t at), (fd, from, bytes, at))
ON_FD("write", ssize_t, pwrite64, (int fd, const void *from, size_t bytes, off64_t at), (fd, from, bytes, at))
ON_FD("write", ssize_t, writev, (int fd, const struct iovec *from, int count), (fd, from, count))
ON_FD("write", ssize_t, pwritev, (int fd, const struct iovec *from, int count, off_t at), (fd, from, count, at))
ON_FD("write", ssize_t, pwritev64, (int fd, const struct iovec *from, int count, off64_t at), (fd, from, count, at))
ON_FD("write", int, ftruncate, (int fd, off_t bytes), (fd, bytes))
ON_FD("write", int, ftruncate64, (int fd, off64_t bytes), (fd, bytes))
ON_FD("write", int, fallocate, (int fd, int mode, off_t at, off_t bytes), (fd, mode, at, bytes))
ON_FD("write", int, fallocate64, (int fd, int mode, off64_t at, off64_t bytes), (fd, mode, at, bytes))
ON_FD("sync", int, fsync, (int fd), (fd))
ON_FD("sync", int, fdatasync, (int fd), (fd))

ssize_t splice(int in, off64_t *in_at, int out, off64_t *out_at, size_t bytes, unsigned flags)
{
    note_fd(out, "write");
    return REAL(splice)(in, in_at, out, out_at, bytes, flags);
}

#define ON_PATH(what, type, name, parameters, arguments, dir, path, other) \
    type name parameters                                                   \
    {                                                                      \
        char out[2 * PATH_MAX];                                            \
        if (whole(dir, path, out))                                         \
            note(what, out, other);                                        \
        return REAL(name) arguments;                                       \
    }

/* A name is made by an open that may make it; that of a file that is there already changes nothing. */
#define OPEN(name, parameters, dir, arguments)         \
    int name parameters                                \
    {                                                  \
        char out[2 * PATH_MAX];                        \
        va_list rest;                                  \
        va_start(rest, flags);                         \
        mode_t mode = va_arg(rest, mode_t);            \
        va_end(rest);                                  \
        if ((flags & O_CREAT) && whole(dir, path, out)) \
            note("make", out, "");                     \
        return REAL(name) arguments;                   \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int dir, const char *path, int flags, ...), dir, (dir, path, flags, mode))
OPEN(openat64, (int dir, const char *path, int flags, ...), dir, (dir, path, flags, mode))

ON_PATH("rename", int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, from, to)
ON_PATH("unlink", int, unlink, (const char *path), (path), AT_FDCWD, path, "")
ON_PATH("mkdir", int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, "")
ON_PATH("link", int, symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path, to)
