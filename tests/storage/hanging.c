// Preloaded into a process, makes its reads and opens of paths that hold HANG_PATH wait while the file HANG_WHILE
// exists, as those of a mount whose server is gone do: no signal brings them back.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void hang(const char *path) {
    const char *mark = getenv("HANG_PATH"), *gate = getenv("HANG_WHILE");
    if (mark == NULL || gate == NULL || strstr(path, mark) == NULL) return;
    if (access(gate, F_OK) != 0) return;
    char seen[4096];
    snprintf(seen, sizeof seen, "%s.met", gate);
    close(creat(seen, 0666));
    while (access(gate, F_OK) == 0) usleep(20000);
}

static void hang_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    hang(path);
}

#define READER(name)                                                       \
    ssize_t name(int fd, void *data, size_t count, off64_t offset) {       \
        static ssize_t (*real)(int, void *, size_t, off64_t);              \
        if (real == NULL) real = dlsym(RTLD_NEXT, #name);                  \
        hang_fd(fd);                                                       \
        return real(fd, data, count, offset);                              \
    }
READER(pread)
READER(pread64)

ssize_t read(int fd, void *data, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    if (real == NULL) real = dlsym(RTLD_NEXT, "read");
    hang_fd(fd);
    return real(fd, data, count);
}

#define OPENER(name)                                                       \
    int name(const char *path, int flags, ...) {                           \
        static int (*real)(const char *, int, ...);                        \
        if (real == NULL) real = dlsym(RTLD_NEXT, #name);                  \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;          \
        va_end(rest);                                                      \
        if (getenv("HANG_OPEN") != NULL) hang(path);                       \
        return real(path, flags, mode);                                    \
    }
OPENER(open)
OPENER(open64)
