/* Preloaded into a process: from its FAIL_FROM-th write into a path that contains FAIL_IN on, the disk is full.

   Every call that makes a file longer counts: write, pwrite, writev and pwritev.
   Each call adds one byte to the file COUNT_IN, if there is one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static int full(int file) {
    const char *wanted = getenv("FAIL_IN"), *from = getenv("FAIL_FROM"), *count = getenv("COUNT_IN");
    char link[64], path[PATH_MAX];
    if (!wanted) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, wanted)) return 0;
    long mine = __sync_add_and_fetch(&calls, 1);
    if (count) {
        int out = open(count, O_WRONLY | O_CREAT | O_APPEND, 0666);
        ssize_t (*plain)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
        if (out >= 0) { plain(out, "x", 1); close(out); }
    }
    return from && mine >= atol(from);
}

#define WRAP(name, parameters, arguments)                                 \
    ssize_t name parameters {                                             \
        static ssize_t (*real) parameters;                                \
        if (!real) real = dlsym(RTLD_NEXT, #name);                        \
        if (full(file)) { errno = ENOSPC; return -1; }                    \
        return real arguments;                                            \
    }

WRAP(write, (int file, const void *data, size_t size), (file, data, size))
WRAP(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
WRAP(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
WRAP(writev, (int file, const struct iovec *parts, int count), (file, parts, count))
WRAP(pwritev, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at))
WRAP(pwritev64, (int file, const struct iovec *parts, int count, off64_t at), (file, parts, count, at))

/* Copies inside the kernel are refused as unsupported, so that the caller falls back to writing. */
ssize_t sendfile(int out, int in, off_t *at, size_t size) { errno = ENOSYS; return -1; }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { errno = ENOSYS; return -1; }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t size, unsigned flags) { errno = ENOSYS; return -1; }
