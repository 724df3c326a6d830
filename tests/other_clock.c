/* Another machine's CLOCK_MONOTONIC, for one process (LD_PRELOAD): ahead by OTHER_CLOCK_AHEAD_S, and faster by
 * OTHER_CLOCK_DRIFT seconds a second since OTHER_CLOCK_SINCE_S of this machine's clock. No clock is set. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double number(const char *name)
{
    const char *text = getenv(name);
    return text ? atof(text) : 0.0;
}

static double ahead(double at)
{
    static double ahead_s, drift, since_s;
    static int known;
    if (!known) {
        ahead_s = number("OTHER_CLOCK_AHEAD_S");
        drift = number("OTHER_CLOCK_DRIFT");
        since_s = number("OTHER_CLOCK_SINCE_S");
        known = 1;
    }
    return ahead_s + drift * (at - since_s);
}

static void move(struct timespec *time, double by)
{
    long long ns = time->tv_sec * 1000000000LL + time->tv_nsec + (long long)(by * 1e9);
    time->tv_sec = ns / 1000000000LL;
    time->tv_nsec = ns % 1000000000LL;
}

int clock_gettime(clockid_t id, struct timespec *time)
{
    if (syscall(SYS_clock_gettime, id, time))
        return -1;
    if (id == CLOCK_MONOTONIC || id == CLOCK_MONOTONIC_RAW || id == CLOCK_MONOTONIC_COARSE)
        move(time, ahead(time->tv_sec + time->tv_nsec / 1e9));
    return 0;
}

int clock_nanosleep(clockid_t id, int flags, const struct timespec *until, struct timespec *left)
{
    struct timespec real = *until;
    if (id == CLOCK_MONOTONIC && (flags & TIMER_ABSTIME)) {
        struct timespec now;
        syscall(SYS_clock_gettime, id, &now);
        move(&real, -ahead(now.tv_sec + now.tv_nsec / 1e9));
    }
    return syscall(SYS_clock_nanosleep, id, flags, &real, left) ? errno : 0;
}
