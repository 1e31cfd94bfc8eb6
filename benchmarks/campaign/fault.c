/* A disk that errs: counts calls on paths that hold a text, and fails one of them, or all from it on.
   Built and preloaded by disks.py (LD_PRELOAD); armed by the child through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char part[512];
static long left = -1, calls = 0; /* calls until the fault; < 0: none */
static int number = 0, lasting = 0;

void fault_arm(const char *path_part, long after, int err, int all_from_it) {
  snprintf(part, sizeof part, "%s", path_part);
  number = err, lasting = all_from_it, calls = 0, left = after;
}
long fault_calls(void) { return calls; }

static int due(const char *path) {
  if (left < 0 || !path || !strstr(path, part)) return 0;
  long mine = __sync_fetch_and_add(&calls, 1);
  if (mine == left || (lasting && mine > left)) {
    errno = number;
    return 1;
  }
  return 0;
}

static int due_of(int fd) {
  if (left < 0) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return due(path);
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  return due_of(fd) ? -1 : NEXT(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  return due_of(fd) ? -1 : NEXT(pwrite64)(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  return due_of(fd) ? -1 : NEXT(pwrite)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  return due_of(fd) ? -1 : NEXT(writev)(fd, parts, count);
}
int fsync(int fd) { return due_of(fd) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return due_of(fd) ? -1 : NEXT(fdatasync)(fd); }
int rename(const char *from, const char *to) { return due(to) ? -1 : NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return due(path) ? -1 : NEXT(mkdir)(path, mode); }

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY; }
int open(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return writes(flags) && due(path) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return writes(flags) && due(path) ? -1 : NEXT(open64)(path, flags, mode);
}
