/* A disk that fails: calls that write below a folder, from the nth of a kind on. Preloaded (LD_PRELOAD); the process
   itself arms it, by ctypes. What a C library writes by itself (fwrite) is not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAKE, WRITE, SYNC, CLOSE, RENAME, KINDS };

static char root[PATH_MAX];
static int armed = -1, code, goes_on;
static long number, seen[KINDS], failed;

/* folder: "" for none. kind: -1 counts alone. which: the call of this kind that fails, from 1; for_ever: and all later. */
void disk_faults_arm(const char *folder, int kind, long which, int error, int for_ever) {
    strncpy(root, folder, sizeof root - 1);
    armed = kind, number = which, code = error, goes_on = for_ever, failed = 0;
    memset(seen, 0, sizeof seen);
}
long disk_faults_seen(int kind) { return kind < 0 ? failed : seen[kind]; }

static int fails(int kind) {
    long now = __sync_add_and_fetch(&seen[kind], 1);
    if (armed != kind || !(now == number || (goes_on && now > number))) return 0;
    __sync_add_and_fetch(&failed, 1);
    errno = code;
    return 1;
}
static int below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && path[length] == '/';
}
static int path_below(int folder, const char *path) {
    char link[64], whole[2 * PATH_MAX];
    if (!root[0] || !path) return 0;
    if (path[0] == '/') return below(path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t got = readlink(link, whole, PATH_MAX - 1);
        if (got < 0) return 0;
        whole[got] = 0;
    }
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX - 1);
    return below(whole);
}
static int file_below(int file) {
    char link[64], whole[PATH_MAX];
    if (!root[0]) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t got = readlink(link, whole, sizeof whole - 1);
    errno = before;
    if (got < 0) return 0;
    whole[got] = 0;
    return below(whole);
}
static int written_below(int file) { return file_below(file) && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY; }

#define REAL(name) (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(kind, where) if ((where) && fails(kind)) return -1

#define OPENS(name, at, ...) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, int); va_end(more); } \
    FAIL(MAKE, (flags & O_CREAT) && path_below(at, path)); \
    return (REAL(name))(__VA_ARGS__, flags, mode)
int open(const char *path, int flags, ...) { OPENS(open, AT_FDCWD, path); }
int open64(const char *path, int flags, ...) { OPENS(open64, AT_FDCWD, path); }
int openat(int at, const char *path, int flags, ...) { OPENS(openat, at, at, path); }
int openat64(int at, const char *path, int flags, ...) { OPENS(openat64, at, at, path); }
int mkdir(const char *path, mode_t mode) { FAIL(MAKE, path_below(AT_FDCWD, path)); return (REAL(mkdir))(path, mode); }

ssize_t write(int file, const void *data, size_t size) { FAIL(WRITE, file_below(file)); return (REAL(write))(file, data, size); }
ssize_t writev(int file, const struct iovec *data, int count) { FAIL(WRITE, file_below(file)); return (REAL(writev))(file, data, count); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { FAIL(WRITE, file_below(file)); return (REAL(pwrite))(file, data, size, at); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { FAIL(WRITE, file_below(file)); return (REAL(pwrite64))(file, data, size, at); }
ssize_t sendfile(int to, int from, off_t *at, size_t size) { FAIL(WRITE, file_below(to)); return (REAL(sendfile))(to, from, at, size); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) { FAIL(WRITE, file_below(to)); return (REAL(copy_file_range))(from, a, to, b, size, flags); }
int ftruncate(int file, off_t size) { FAIL(WRITE, file_below(file)); return (REAL(ftruncate))(file, size); }
int ftruncate64(int file, off64_t size) { FAIL(WRITE, file_below(file)); return (REAL(ftruncate64))(file, size); }

int fsync(int file) { FAIL(SYNC, file_below(file)); return (REAL(fsync))(file); }
int fdatasync(int file) { FAIL(SYNC, file_below(file)); return (REAL(fdatasync))(file); }
int close(int file) {
    int bad = written_below(file) && fails(CLOSE), told = errno;
    int found = (REAL(close))(file);
    if (bad) errno = told;
    return bad ? -1 : found;
}
int rename(const char *a, const char *b) { FAIL(RENAME, path_below(AT_FDCWD, b)); return (REAL(rename))(a, b); }
int renameat(int f, const char *a, int g, const char *b) { FAIL(RENAME, path_below(g, b)); return (REAL(renameat))(f, a, g, b); }
