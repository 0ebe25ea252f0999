// Faults of the file system, below one folder of one process: LD_PRELOAD=shim.so python ...
//
// `faults_arm` starts it in a process; before every operation that changes a file or folder below
// `root`, and before every fsync, the record that it shares with its parent tells which operation
// comes, and the process stops (the parent looks and continues it), is killed at operation `at`, or
// finds the disk full from the operation `at` of those that take space on. What execs starts anew.
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
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, STOP, KILL, FULL };

struct record
{
    int mode;
    int space; // whether the operation takes space
    long at;
    long operations, takers; // so far
    char name[16];
    char path[PATH_MAX];
};

static struct record* shared;
static char root[PATH_MAX];
static _Thread_local int inside;

void faults_arm(struct record* record, char const* folder)
{
    strncpy(root, folder, sizeof root - 1);
    shared = record;
}

#define REAL(function) ((__typeof__(&function))real(#function))

static void* real(char const* name)
{
    return dlsym(RTLD_NEXT, name);
}

static int below(char const* path)
{
    size_t n = strlen(root);
    return strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

// The path of `path` beside the descriptor `folder`, or of that descriptor itself.
static int locate(int folder, char const* path, char* found)
{
    char link[64];
    size_t length = 0;
    if (!path || path[0] != '/')
    {
        if (folder == AT_FDCWD)
            strcpy(link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, found, PATH_MAX - 1);
        if (n < 0)
            return 0;
        length = (size_t)n;
    }
    if (path)
        length += (size_t)snprintf(found + length, PATH_MAX - length, "%s%s", length ? "/" : "", path);
    found[length < PATH_MAX ? length : PATH_MAX - 1] = 0;
    return below(found);
}

// Before an operation: 0 to go on, or -1 with errno set.
static int before(char const* name, int space, int folder, char const* path)
{
    char found[PATH_MAX];
    if (!shared || shared->mode == OFF || inside)
        return 0;
    inside = 1;
    int kept = errno, fails = 0;
    if (locate(folder, path, found))
    {
        strncpy(shared->name, name, sizeof shared->name - 1);
        strncpy(shared->path, found, sizeof shared->path - 1);
        shared->space = space;
        long number = __atomic_add_fetch(&shared->operations, 1, __ATOMIC_SEQ_CST);
        long taker = space ? __atomic_add_fetch(&shared->takers, 1, __ATOMIC_SEQ_CST) : 0;
        if (shared->mode == STOP) // to this thread: it does not return before all have stopped
            syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGSTOP);
        else if (shared->mode == KILL && number == shared->at)
            kill(getpid(), SIGKILL);
        else if (shared->mode == FULL && taker >= shared->at)
            fails = space;
    }
    inside = 0;
    errno = fails ? ENOSPC : kept;
    return fails ? -1 : 0;
}

static int missing(int folder, char const* path)
{
    int kept = errno, no = faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW);
    errno = kept;
    return no != 0;
}

// What opening makes or empties; a file that is there takes no space.
static int opening(int folder, char const* path, int flags)
{
    if (!shared || !(flags & (O_CREAT | O_TRUNC)))
        return 0;
    return before("open", (flags & O_CREAT) && missing(folder, path), folder, path);
}

#define OPEN(function)                                                                             \
    int function(char const* path, int flags, ...)                                                 \
    {                                                                                              \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        if (opening(AT_FDCWD, path, flags))                                                        \
            return -1;                                                                             \
        return REAL(function)(path, flags, mode);                                                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                           \
    int function(int folder, char const* path, int flags, ...)                                     \
    {                                                                                              \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        if (opening(folder, path, flags))                                                          \
            return -1;                                                                             \
        return REAL(function)(folder, path, flags, mode);                                          \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(function)                                                                            \
    FILE* function(char const* path, char const* mode)                                             \
    {                                                                                              \
        if (strpbrk(mode, "wa") && before("open", 1, AT_FDCWD, path))                              \
            return NULL;                                                                           \
        return REAL(function)(path, mode);                                                         \
    }
FOPEN(fopen)
FOPEN(fopen64)

size_t fwrite(void const* data, size_t size, size_t count, FILE* stream)
{
    if (before("write", 1, fileno(stream), NULL))
        return 0;
    return REAL(fwrite)(data, size, count, stream);
}

// name, whether it takes space, result, parameters, where, arguments
#define WRAP(function, name, space, result, parameters, folder, path, arguments)                   \
    result function parameters                                                                     \
    {                                                                                              \
        if (before(name, space, folder, path))                                                     \
            return -1;                                                                             \
        return REAL(function) arguments;                                                           \
    }
WRAP(write, "write", 1, ssize_t, (int f, void const* d, size_t n), f, NULL, (f, d, n))
WRAP(writev, "write", 1, ssize_t, (int f, struct iovec const* v, int n), f, NULL, (f, v, n))
WRAP(pwrite, "write", 1, ssize_t, (int f, void const* d, size_t n, off_t o), f, NULL, (f, d, n, o))
WRAP(pwrite64, "write", 1, ssize_t, (int f, void const* d, size_t n, off64_t o), f, NULL,
    (f, d, n, o))
WRAP(copy_file_range, "write", 1, ssize_t,
    (int a, off64_t* p, int b, off64_t* q, size_t n, unsigned g), b, NULL, (a, p, b, q, n, g))
WRAP(sendfile, "write", 1, ssize_t, (int b, int a, off_t* o, size_t n), b, NULL, (b, a, o, n))
WRAP(sendfile64, "write", 1, ssize_t, (int b, int a, off64_t* o, size_t n), b, NULL, (b, a, o, n))
WRAP(ftruncate, "truncate", 0, int, (int f, off_t n), f, NULL, (f, n))
WRAP(ftruncate64, "truncate", 0, int, (int f, off64_t n), f, NULL, (f, n))
WRAP(fsync, "fsync", 0, int, (int f), f, NULL, (f))
WRAP(fdatasync, "fsync", 0, int, (int f), f, NULL, (f))
WRAP(rename, "rename", 0, int, (char const* a, char const* b), AT_FDCWD, b, (a, b))
WRAP(renameat, "rename", 0, int, (int f, char const* a, int g, char const* b), g, b, (f, a, g, b))
WRAP(renameat2, "rename", 0, int, (int f, char const* a, int g, char const* b, unsigned n), g, b,
    (f, a, g, b, n))
WRAP(unlink, "unlink", 0, int, (char const* a), AT_FDCWD, a, (a))
WRAP(unlinkat, "unlink", 0, int, (int f, char const* a, int n), f, a, (f, a, n))
WRAP(rmdir, "rmdir", 0, int, (char const* a), AT_FDCWD, a, (a))
// The system finds that a folder is there before it looks for space.
WRAP(mkdir, "mkdir", missing(AT_FDCWD, a), int, (char const* a, mode_t m), AT_FDCWD, a, (a, m))
WRAP(mkdirat, "mkdir", missing(f, a), int, (int f, char const* a, mode_t m), f, a, (f, a, m))
WRAP(link, "link", 1, int, (char const* a, char const* b), AT_FDCWD, b, (a, b))
WRAP(linkat, "link", 1, int, (int f, char const* a, int g, char const* b, int n), g, b,
    (f, a, g, b, n))
WRAP(symlink, "link", 1, int, (char const* a, char const* b), AT_FDCWD, b, (a, b))
WRAP(symlinkat, "link", 1, int, (char const* a, int g, char const* b), g, b, (a, g, b))
