/* The N-th file operation under a folder fails, or ends the process: loaded with LD_PRELOAD, armed from Python by ctypes.

   arm(folder, n, code): n counts from 1; code > 0 is the errno of that call, code < 0 kills the process instead of it; n = 0 only counts.
   Counted: open for writing, write, fsync, rename, unlink, rmdir, mkdir of paths under the folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char under[PATH_MAX];
static long at, seen;
static int code, armed;
static char where[PATH_MAX + 32];

void arm(const char *folder, long n, int error) {
    strncpy(under, folder, sizeof under - 1);
    at = n; code = error; seen = 0; where[0] = 0; armed = 1;
}
long disarm(void) { armed = 0; return seen; }
const char *failed_at(void) { return where; }

static int due(const char *call, const char *path) {
    if (!armed || !path || strncmp(path, under, strlen(under))) return 0;
    if (++seen != at) return 0;
    snprintf(where, sizeof where, "%s %s", call, path + strlen(under));
    if (code < 0) kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}
static const char *of(int fd) {
    static __thread char path[PATH_MAX];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return NULL;
    path[length] = 0;
    return path;
}
static const char *at_folder(int folder, const char *path) {
    static __thread char whole[2 * PATH_MAX];
    if (path[0] == '/' || folder == AT_FDCWD) return path;
    const char *base = of(folder);
    if (!base) return path;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return whole;
}
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE mode_t mode = 0; if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY)

int open(const char *path, int flags, ...) { MODE REAL(open); return WRITES(flags) && due("open", path) ? -1 : real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE REAL(open64); return WRITES(flags) && due("open", path) ? -1 : real(path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE REAL(openat); return WRITES(flags) && due("open", at_folder(folder, path)) ? -1 : real(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE REAL(openat64); return WRITES(flags) && due("open", at_folder(folder, path)) ? -1 : real(folder, path, flags, mode); }
ssize_t write(int fd, const void *data, size_t size) { REAL(write); return armed && fd > 2 && due("write", of(fd)) ? -1 : real(fd, data, size); }
int fsync(int fd) { REAL(fsync); return armed && due("fsync", of(fd)) ? -1 : real(fd); }
int rename(const char *from, const char *to) { REAL(rename); return due("rename", from) ? -1 : real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return due("rename", at_folder(a, from)) ? -1 : real(a, from, b, to); }
int unlink(const char *path) { REAL(unlink); return due("unlink", path) ? -1 : real(path); }
int unlinkat(int folder, const char *path, int flags) { REAL(unlinkat); return due("unlink", at_folder(folder, path)) ? -1 : real(folder, path, flags); }
int rmdir(const char *path) { REAL(rmdir); return due("rmdir", path) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return due("mkdir", path) ? -1 : real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { REAL(mkdirat); return due("mkdir", at_folder(folder, path)) ? -1 : real(folder, path, mode); }
