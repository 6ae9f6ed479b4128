/* Makes one system call fail for the files below a folder, as file systems do that lack it:
 *   REFUSE_CALL   mmap, open, read or flock
 *   REFUSE_ERRNO  a number
 *   REFUSE_PATH   part of the file's path
 * The variables are read at each call, so a process can change them while it runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int refuses(const char *call, const char *path) {
    const char *refused = getenv("REFUSE_CALL"), *part = getenv("REFUSE_PATH"), *number = getenv("REFUSE_ERRNO");
    if (!refused || !part || !number || !path || strcmp(refused, call) || !strstr(path, part)) return 0;
    errno = atoi(number);
    return 1;
}

static int refuses_fd(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return refuses(call, path);
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && refuses_fd("mmap", fd)) return MAP_FAILED;
    return NEXT(mmap)(at, length, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off64_t offset) {
    if (fd >= 0 && refuses_fd("mmap", fd)) return MAP_FAILED;
    return NEXT(mmap64)(at, length, protection, flags, fd, offset);
}
#define OPEN(name)                                             \
    int name(const char *path, int flags, ...) {               \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                          \
        if (refuses("open", path)) return -1;                  \
        return NEXT(name)(path, flags, mode);                  \
    }
OPEN(open)
OPEN(open64)
ssize_t read(int fd, void *data, size_t count) {
    if (refuses_fd("read", fd)) return -1;
    return NEXT(read)(fd, data, count);
}
ssize_t pread(int fd, void *data, size_t count, off_t offset) {
    if (refuses_fd("read", fd)) return -1;
    return NEXT(pread)(fd, data, count, offset);
}
ssize_t pread64(int fd, void *data, size_t count, off64_t offset) {
    if (refuses_fd("read", fd)) return -1;
    return NEXT(pread64)(fd, data, count, offset);
}
int flock(int fd, int operation) {
    if (refuses_fd("flock", fd)) return -1;
    return NEXT(flock)(fd, operation);
}
