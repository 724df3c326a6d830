/* The native reader: receives, stamps and frames the responses of many connections; no Python runs while they stream.
 *
 * One Reader a process. A connected plain socket on which the request was just written is added; epoll and recvmsg
 * bring its bytes with the kernel's receive stamps, HTTP/1.1 framing (the rules and bounds of http1.py) says which are
 * body and when the response is over, and timeouts are kept. The hub drives it through poll(), or a thread of its own
 * does, which never takes the interpreter's lock and says through an eventfd that responses have ended. Linux only.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifndef NATIVE_CORE_ONLY /* tests compile the core without Python, under sanitizers */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    READ_BYTES = 64 * 1024,
    MAX_HEAD_BYTES = 64 * 1024,
    MAX_BODY_BYTES = 64 * 1024 * 1024,
    MAX_EVENT_BYTES = 4 * 1024 * 1024,
    MAX_LINE_BYTES = 1024,
    MAX_TRAILER_BYTES = 64 * 1024,
    LINE_SHOWN = 40, /* bytes of a bad line that its error message shows */
    BATCH = 256,
    MAX_PAUSE_NS = 2 * 1000 * 1000,
    MAX_HELD_NS = 5 * 1000 * 1000,
};
#define TCP_INFO 11         /* linux/tcp.h; the C library's own header for it may be older than the field below */
#define TCP_INFO_OOOPACK 56 /* tcpi_rcv_ooopack, the word of that number: Linux 5.5 */
#define SECOND INT64_C(1000000000)
#define SWEEP_NS (SECOND / 100) /* how late a timeout may be told, so that many of them cannot keep the reader busy */
#define TIMER UINT64_MAX
#define EDGES (EPOLLIN | EPOLLRDHUP | EPOLLET) /* a level would look at each stream twice */

enum mode { HEAD, LENGTH, CLOSE, SIZE, CHUNK, CHUNK_END, TRAILER };
enum syntax { LEAD, DIGITS, BLANK, EXTENSION, RETURN, BAD }; /* where in a chunk-size line the bytes so far have led */
enum why {
    RUNNING, COMPLETE, CLOSED, RESET, TOO_LARGE, NO_MEMORY, TOTAL, FIRST_TOKEN, IDLE, CANCELLED,
    BAD_HEAD, BAD_SIZE, BAD_END, BAD_LINE, BAD_TRAILER
};

typedef struct {
    char *data;
    size_t len, cap;
} Buffer;

typedef struct {
    int64_t token; /* 0: the slot is free */
    int next_free, fd, error, reusable, only_returns, digits;
    enum mode mode;
    enum why why;
    enum syntax syntax;
    char line[LINE_SHOWN + 1];
    size_t line_len, trailer_bytes;
    size_t events, seen; /* bytes of the body in whole events, and those looked at, while the first token is awaited */
    int64_t left;        /* bytes of the body, or of the current chunk, still to come */
    int64_t user_stamps; /* reads that the kernel did not stamp */
    int64_t total, first_token, idle; /* deadlines; the silence allowed once the first token came (first_token = 0) */
    int64_t first_byte, last, ended;
    Buffer head, body, reads; /* reads: pairs of int64, (time, length of the body after it) */
} Stream;

typedef struct {
    pthread_mutex_t lock;
    pthread_t thread;
    pid_t owner;
    int epoll, timer, event, threaded, stopping, running, slots, free;
    int stepped; /* the wall clock was set since the turn before this one */
    int64_t counter, due, pause, offset, compared_at;
    Stream **stream;
    Buffer ended; /* tokens of responses that are over and were not told yet */
    char buffer[READ_BYTES];
} Reader;

static int64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static int reserve(Buffer *in, size_t len) {
    if (in->cap - in->len >= len) return 1;
    size_t cap = in->cap ? in->cap : 512;
    while (cap - in->len < len) cap *= 2;
    char *grown = realloc(in->data, cap);
    if (grown) in->data = grown, in->cap = cap;
    return grown != NULL;
}

static int append(Buffer *to, const void *data, size_t len) {
    if (!reserve(to, len)) return 0;
    memcpy(to->data + to->len, data, len);
    to->len += len;
    return 1;
}

/* Framing. Each function says why the stream has ended, or RUNNING. */

static int is_space(char byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

static int is_word(const char *text, size_t len, const char *word) {
    return len == strlen(word) && !strncasecmp(text, word, len);
}

static int contains(const char *text, size_t len, const char *word) {
    for (size_t size = strlen(word); len >= size; text++, len--)
        if (!strncasecmp(text, word, size)) return 1;
    return 0;
}

static enum why parse_length(Stream *s, const char *text, size_t len) {
    if (len < 1 || len > 15) return BAD_HEAD;
    for (s->left = 0; len; text++, len--) {
        if (*text < '0' || *text > '9') return BAD_HEAD;
        s->left = s->left * 10 + (*text - '0');
    }
    s->mode = LENGTH;
    return s->left ? RUNNING : COMPLETE;
}

/* The head is whole. An interim one is dropped and the next awaited. */
static enum why parse_head(Stream *s) {
    static const char *const NAMES[] = {"connection", "content-encoding", "transfer-encoding", "content-length"};
    struct { const char *text; size_t len; } value[4] = {{0}};
    const char *p = s->head.data, *end = p + s->head.len, *eol = memchr(p, '\n', s->head.len);
    size_t len = eol - p - (eol > p && eol[-1] == '\r');
    if (len < 12 || memcmp(p, "HTTP/1.", 7) || (p[7] != '0' && p[7] != '1') || p[8] != ' ' || p[9] < '1' ||
        p[9] > '5' || p[10] < '0' || p[10] > '9' || p[11] < '0' || p[11] > '9' || (len > 12 && p[12] != ' '))
        return BAD_HEAD;
    int status = (p[9] - '0') * 100 + (p[10] - '0') * 10 + (p[11] - '0'), http_1_0 = p[7] == '0';
    if (status < 200 && status != 101) {
        s->head.len = 0;
        return RUNNING;
    }
    for (p = eol + 1; p < end; p = eol + 1) {
        eol = memchr(p, '\n', end - p);
        len = eol - p - (eol > p && eol[-1] == '\r');
        if (!len) break;
        const char *colon = memchr(p, ':', len);
        if (!colon || colon == p || is_space(p[0]) || is_space(colon[-1])) return BAD_HEAD;
        const char *from = colon + 1, *to = p + len;
        while (from < to && is_space(*from)) from++;
        while (from < to && is_space(to[-1])) to--;
        for (int i = 0; i < 4; i++)
            if (is_word(p, colon - p, NAMES[i])) value[i].text = from, value[i].len = to - from;
    }
    s->reusable = !contains(value[0].text, value[0].len, "close") &&
                  (!http_1_0 || contains(value[0].text, value[0].len, "keep-alive"));
    if (value[1].text && !is_word(value[1].text, value[1].len, "identity")) return BAD_HEAD;
    if (status == 101 || status == 204 || status == 304) return COMPLETE;
    if (value[2].text) {
        s->mode = SIZE;
        return is_word(value[2].text, value[2].len, "chunked") ? RUNNING : BAD_HEAD;
    }
    if (value[3].text) return parse_length(s, value[3].text, value[3].len);
    s->mode = CLOSE, s->reusable = 0;
    return RUNNING;
}

static enum why feed_head(Stream *s, const char *data, size_t len, size_t *used) {
    size_t before = s->head.len, at = before > 3 ? before - 3 : 0;
    if (!append(&s->head, data, len)) return NO_MEMORY;
    const char *head = s->head.data, *eol;
    for (; (eol = memchr(head + at, '\n', s->head.len - at)); at = eol - head + 1) {
        size_t next = eol - head + 1;
        next += next < s->head.len && head[next] == '\r';
        if (next >= s->head.len || head[next] != '\n') continue;
        if (next + 1 > MAX_HEAD_BYTES) return BAD_HEAD;
        s->head.len = next + 1;
        *used = s->head.len - before;
        return parse_head(s);
    }
    *used = len;
    return s->head.len > MAX_HEAD_BYTES ? BAD_HEAD : RUNNING;
}

static void size_byte(Stream *s, unsigned char byte) {
    int lower = byte | 0x20, digit = lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
    if (byte >= '0' && byte <= '9') digit = byte - '0';
    if (s->syntax == EXTENSION || s->syntax == BAD) return;
    if (s->syntax <= DIGITS && digit >= 0) {
        s->syntax = ++s->digits <= 15 ? DIGITS : BAD;
        if (s->syntax == DIGITS) s->left = s->left * 16 + digit;
    } else if (s->syntax != RETURN && (byte == ' ' || byte == '\t'))
        s->syntax = s->syntax == LEAD ? LEAD : BLANK;
    else if ((s->syntax == DIGITS || s->syntax == BLANK) && (byte == ';' || byte == '\r'))
        s->syntax = byte == ';' ? EXTENSION : RETURN;
    else
        s->syntax = BAD;
}

/* One line of the chunked coding: a size, the empty line after a chunk, or a trailer. */
static enum why feed_line(Stream *s, const char *data, size_t len, size_t *used) {
    if (!s->line_len) s->syntax = LEAD, s->digits = 0, s->only_returns = 1, s->left = 0;
    const char *eol = memchr(data, '\n', len);
    size_t line = eol ? (size_t)(eol - data) : len;
    for (size_t i = 0; i < line; i++) {
        /* a longer line is shown cut, and the mark after the cut keeps it as bad as it was */
        if (s->line_len + i <= LINE_SHOWN) s->line[s->line_len + i] = s->line_len + i < LINE_SHOWN ? data[i] : '!';
        s->only_returns &= data[i] == '\r';
        if (s->mode == SIZE) size_byte(s, data[i]);
    }
    s->line_len += line;
    *used = line + (eol != NULL);
    if (!eol) return s->line_len > MAX_LINE_BYTES ? BAD_LINE : RUNNING;
    size_t whole = s->line_len;
    if (s->mode == SIZE && (s->syntax == LEAD || s->syntax == BAD)) return BAD_SIZE;
    if (s->mode == CHUNK_END && !s->only_returns) return BAD_END;
    s->line_len = 0;
    if (s->mode == SIZE)
        s->mode = s->left ? CHUNK : TRAILER;
    else if (s->mode == CHUNK_END)
        s->mode = SIZE;
    else if ((s->trailer_bytes += whole) > MAX_TRAILER_BYTES)
        return BAD_TRAILER;
    else if (s->only_returns)
        return COMPLETE;
    return RUNNING;
}

/* Has an event with a token come? Looks at the bytes of whole events alone, for a key that carries tokens with a value
 * that is not empty. Taking too much for a token only exchanges one timeout for the other. */
static int has_token(Stream *s) {
    static const char *const KEYS[] = {
        "\"content\"", "\"text\"", "\"reasoning\"", "\"reasoning_content\"", "\"tool_calls\"", "\"function_call\""};
    const char *body = s->body.data;
    size_t blank = s->body.len; /* behind the last blank line among the new bytes */
    for (; blank > s->seen; blank--) {
        char last = body[blank - 1], before = blank > 1 ? body[blank - 2] : 0, first = blank > 2 ? body[blank - 3] : 0;
        if ((last == '\n' || last == '\r') && before == last) break;
        if (last == '\n' && before == '\r' && (first == '\n' || first == '\r')) break;
    }
    size_t from = s->events;
    int found = s->body.len - from > MAX_EVENT_BYTES, is_new = blank > s->seen;
    s->seen = s->body.len;
    if (!is_new) return found;
    s->events = blank;
    for (int i = 0; i < 6; i++)
        for (const char *p = body + from, *end = body + blank; (p = memmem(p, end - p, KEYS[i], strlen(KEYS[i])));) {
            p += strlen(KEYS[i]);
            while (p < end && (*p == ' ' || *p == ':')) p++;
            if (end - p > 1)
                found |= (*p == '"' && p[1] != '"') || (*p == '[' && p[1] != ']') || (*p == '{' && p[1] != '}');
        }
    return found;
}

/* Bytes of one read. */
static enum why feed(Stream *s, const char *data, size_t len, int64_t at) {
    size_t before = s->body.len, used;
    enum why why = RUNNING;
    if (!s->first_byte) s->first_byte = at;
    s->last = at;
    for (; len && why == RUNNING; data += used, len -= used) {
        used = len;
        if (s->mode == HEAD)
            why = feed_head(s, data, len, &used);
        else if (s->mode >= SIZE && s->mode != CHUNK)
            why = feed_line(s, data, len, &used);
        else {
            if (s->mode != CLOSE && (int64_t)used > s->left) used = s->left;
            if (!append(&s->body, data, used)) why = NO_MEMORY;
            if (s->mode != CLOSE && !(s->left -= used)) {
                if (s->mode == LENGTH)
                    why = COMPLETE;
                else
                    s->mode = CHUNK_END;
            }
        }
    }
    if (len) s->reusable = 0; /* bytes after the end of the response */
    if (s->body.len > before) {
        int64_t read[2] = {at, s->body.len};
        if (!append(&s->reads, read, sizeof read)) return NO_MEMORY;
        if (why == RUNNING && s->body.len > MAX_BODY_BYTES) return TOO_LARGE;
        if (s->first_token && has_token(s)) s->first_token = 0;
    }
    return why;
}

/* The reader. Everything down to take() is called with the lock held, but for turn() and serve(). */

static void arm(Reader *r, int64_t due) {
    struct itimerspec when = {.it_value = {.tv_sec = due / SECOND, .tv_nsec = due % SECOND}};
    r->due = due;
    timerfd_settime(r->timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static int64_t deadline(const Stream *s) {
    int64_t due = s->first_token ? s->first_token : s->last + s->idle;
    return s->total < due ? s->total : due;
}

static void finish(Reader *r, Stream *s, enum why why, int64_t now) {
    epoll_ctl(r->epoll, EPOLL_CTL_DEL, s->fd, NULL);
    r->running--;
    s->why = why, s->ended = now;
    if (why == CANCELLED) return; /* whoever cancels needs not be told */
    if (!r->ended.len && r->threaded) eventfd_write(r->event, 1);
    append(&r->ended, &s->token, sizeof s->token); /* its room was reserved when the stream was added */
}

/* End what is overdue. Deadlines move later as bytes come, so the earliest one seen here is early enough to return. */
static void sweep(Reader *r, int64_t now) {
    int64_t due = INT64_MAX;
    for (int i = 0; i < r->slots; i++) {
        Stream *s = r->stream[i];
        if (!s->token || s->why != RUNNING) continue;
        int64_t mine = deadline(s);
        if (mine <= now)
            finish(r, s, mine == s->total ? TOTAL : s->first_token ? FIRST_TOKEN : IDLE, now);
        else if (mine < due)
            due = mine;
    }
    arm(r, due < now + SWEEP_NS ? now + SWEEP_NS : due);
}

/* How far the wall clock, on which the kernel stamps, is from the monotonic one. Read between two readings of the
 * other, so that losing the processor in between is seen. No stamp is believed while that clock was just set: what
 * waited may have been stamped before or after it. Slewing, at most 0.5 ms a second, is no step. */
static void compare_clocks(Reader *r) {
    int64_t before, after, offset = 0, best = INT64_MAX;
    for (int i = 0; i < 5 && best > 1000; i++) {
        before = clock_ns(CLOCK_MONOTONIC);
        int64_t wall = clock_ns(CLOCK_REALTIME);
        after = clock_ns(CLOCK_MONOTONIC);
        if (after - before < best) best = after - before, offset = wall - before - best / 2;
    }
    r->stepped = r->compared_at && llabs(offset - r->offset) > SECOND / 1000 + best + (after - r->compared_at) / 1000;
    r->offset = offset, r->compared_at = after;
}

/* When the bytes came, on the monotonic clock; *kernel says whether the kernel stamped them. */
static int64_t arrival(const Reader *r, struct msghdr *message, int64_t now, int *kernel) {
    *kernel = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c && !r->stepped; c = CMSG_NXTHDR(message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec stamp;
            memcpy(&stamp, CMSG_DATA(c), sizeof stamp);
            int64_t age = now - (stamp.tv_sec * SECOND + stamp.tv_nsec - r->offset);
            if ((*kernel = age > -SECOND / 1000 && age < 60 * SECOND)) return age > 0 ? now - age : now;
        }
    return now;
}

/* Has anything come out of order on this connection? */
static int is_reordered(int fd) {
    uint32_t info[TCP_INFO_OOOPACK + 1] = {0};
    socklen_t len = sizeof info;
    return !getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &len) && info[TCP_INFO_OOOPACK];
}

/* One read. Edges tell of news alone, so what may be left after it (more than the buffer takes, or the end of input
 * that was told together with the last bytes) is asked for again. */
static void receive(Reader *r, Stream *s, uint32_t events) {
    union { struct cmsghdr align; char data[CMSG_SPACE(sizeof(struct timespec))]; } control;
    struct iovec part = {r->buffer, READ_BYTES};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.data, .msg_controllen = sizeof control.data};
    ssize_t len;
    do len = recvmsg(s->fd, &message, MSG_DONTWAIT);
    while (len < 0 && errno == EINTR);
    if (len < 0 && errno == EAGAIN) return;
    int kernel;
    enum why why = s->mode == CLOSE ? COMPLETE : CLOSED;
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    if (len < 0)
        s->error = errno, why = RESET;
    else if (len > 0) {
        int64_t at = arrival(r, &message, now, &kernel);
        /* What came behind a lost segment had its stamp long before anybody could read it. It is not told as a stamp
         * of our own: those are taken to be as late as the event loop is. */
        if (now - at > MAX_HELD_NS && is_reordered(s->fd)) at = now;
        if (at < s->last) at = s->last; /* a stamp may be of a moment before the read whose time is our own */
        int waited = s->first_token != 0;
        s->user_stamps += !kernel;
        why = feed(s, r->buffer, len, at);
        if (waited && why == RUNNING && deadline(s) < r->due) arm(r, deadline(s)); /* silence may end it earlier */
    }
    if (why != RUNNING)
        finish(r, s, why, now);
    else if (len == READ_BYTES || events & ~EPOLLIN) {
        struct epoll_event again = {.events = EDGES, .data.u64 = s->token};
        epoll_ctl(r->epoll, EPOLL_CTL_MOD, s->fd, &again);
    }
}

static Stream *lookup(Reader *r, int64_t token) {
    uint32_t slot = (uint32_t)token;
    return token > 0 && slot < (uint32_t)r->slots && r->stream[slot]->token == token ? r->stream[slot] : NULL;
}

/* Receive what is there, wait for it up to timeout_ms. The lock is free between two reads. */
static void turn(Reader *r, int timeout_ms) {
    struct epoll_event events[BATCH];
    int count = epoll_wait(r->epoll, events, BATCH, timeout_ms);
    if (count > 0) compare_clocks(r);
    for (int i = 0; i < count; i++) {
        pthread_mutex_lock(&r->lock);
        Stream *s = lookup(r, events[i].data.u64);
        if (s && s->why == RUNNING) receive(r, s, events[i].events);
        pthread_mutex_unlock(&r->lock);
    }
    if (count == BATCH) return; /* a stream is overdue only if nothing of it is waiting to be read */
    pthread_mutex_lock(&r->lock);
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    if (now >= r->due) sweep(r, now);
    pthread_mutex_unlock(&r->lock);
}

/* The thread. It rests a little after each turn, while the kernel stamps, and one wake-up then serves many reads. The
 * rest grows with the number of streams, so evenly paced reads merge only beyond 1/pause tokens a second in all. */
static void *serve(void *arg) {
    Reader *r = arg;
    for (;;) {
        turn(r, -1);
        pthread_mutex_lock(&r->lock);
        int stopping = r->stopping;
        int64_t pause = r->pause * r->running;
        pthread_mutex_unlock(&r->lock);
        if (stopping) return NULL;
        struct timespec rest = {.tv_nsec = pause < MAX_PAUSE_NS ? pause : MAX_PAUSE_NS};
        if (pause) nanosleep(&rest, NULL);
    }
}

/* Watch a socket; returns its token, or 0 with errno set. */
static int64_t add(Reader *r, int fd, int64_t total, int64_t first_token, int64_t idle) {
    if (r->free < 0) { /* streams stay where they are, so that their slots are cheap to use again */
        Stream **grown = realloc(r->stream, (r->slots + 1) * sizeof *grown);
        if (grown) r->stream = grown;
        if (!grown || !(grown[r->slots] = calloc(1, sizeof **grown))) return 0;
        grown[r->slots]->next_free = -1;
        r->free = r->slots++;
    }
    if (!reserve(&r->ended, (r->running + 1) * sizeof(int64_t))) return 0;
    Stream *s = r->stream[r->free];
    int64_t token = ++r->counter << 32 | r->free;
    struct epoll_event event = {.events = EDGES, .data.u64 = token};
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, fd, &event)) return 0;
    r->free = s->next_free;
    *s = (Stream){.token = token, .fd = fd, .total = total, .first_token = first_token, .idle = idle};
    r->running++;
    if (deadline(s) < r->due) arm(r, deadline(s));
    return token;
}

/* Hand over what has come of a stream, ended or not, and forget it. */
static int take(Reader *r, int64_t token, Stream *taken) {
    Stream *s = lookup(r, token);
    if (!s) return 0;
    if (s->why == RUNNING) finish(r, s, CANCELLED, clock_ns(CLOCK_MONOTONIC));
    *taken = *s;
    *s = (Stream){.next_free = r->free};
    r->free = token & UINT32_MAX;
    return 1;
}

static void release(Stream *s) {
    free(s->head.data), free(s->body.data), free(s->reads.data);
}

/* Returns NULL with errno set. */
static Reader *reader_open(int threaded, int64_t pause) {
    Reader *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    pthread_mutex_init(&r->lock, NULL);
    r->owner = getpid(), r->threaded = threaded, r->pause = pause, r->free = -1, r->due = INT64_MAX;
    r->epoll = epoll_create1(EPOLL_CLOEXEC);
    r->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    r->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = TIMER}; /* edges: it need not be read */
    int failed = r->epoll < 0 || r->timer < 0 || r->event < 0 || epoll_ctl(r->epoll, EPOLL_CTL_ADD, r->timer, &event);
    if (!failed && threaded) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's main thread */
        errno = pthread_create(&r->thread, NULL, serve, r);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        failed = errno;
    }
    if (!failed) return r;
    int error = errno;
    close(r->epoll), close(r->timer), close(r->event);
    free(r);
    errno = error;
    return NULL;
}

/* In a forked child, where the thread is not and the lock may be held for ever, only the descriptors are given up. */
static void reader_close(Reader *r) {
    if (r->owner == getpid()) {
        if (r->threaded) {
            pthread_mutex_lock(&r->lock);
            r->stopping = 1;
            arm(r, 1);
            pthread_mutex_unlock(&r->lock);
            pthread_join(r->thread, NULL);
        }
        for (int i = 0; i < r->slots; i++) release(r->stream[i]), free(r->stream[i]);
        free(r->stream), free(r->ended.data);
        pthread_mutex_destroy(&r->lock);
    }
    close(r->epoll), close(r->timer), close(r->event);
    free(r);
}

#ifndef NATIVE_CORE_ONLY

typedef struct {
    PyObject_HEAD
    Reader *reader; /* NULL once closed */
} ReaderObject;

static const char *const WHY[] = {
    "running", "complete", "closed", "reset", "too_large", "no_memory", "total", "first_token", "idle", "cancelled",
    "bad_head", "bad_size", "bad_end", "bad_line", "bad_trailer"};

static Reader *opened(PyObject *self) {
    Reader *r = ((ReaderObject *)self)->reader;
    if (!r) PyErr_SetString(PyExc_ValueError, "the reader is closed");
    return r;
}

static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    int threaded;
    long long pause;
    if (!PyArg_ParseTuple(args, "pL", &threaded, &pause)) return NULL;
    ReaderObject *self = (ReaderObject *)type->tp_alloc(type, 0);
    if (self && !(self->reader = reader_open(threaded, pause))) {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return (PyObject *)self;
}

static PyObject *reader_fileno(PyObject *self, PyObject *Py_UNUSED(none)) {
    Reader *r = opened(self);
    return r ? PyLong_FromLong(r->threaded ? r->event : r->epoll) : NULL;
}

static PyObject *reader_add(PyObject *self, PyObject *args) {
    Reader *r = opened(self);
    int fd;
    long long total, first_token, idle;
    if (!r || !PyArg_ParseTuple(args, "iLLL", &fd, &total, &first_token, &idle)) return NULL;
    pthread_mutex_lock(&r->lock);
    int64_t token = add(r, fd, total, first_token, idle);
    int error = errno;
    pthread_mutex_unlock(&r->lock);
    errno = error;
    return token ? PyLong_FromLongLong(token) : PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *reader_poll(PyObject *self, PyObject *Py_UNUSED(none)) {
    Reader *r = opened(self);
    if (!r) return NULL;
    eventfd_t told;
    if (r->threaded)
        eventfd_read(r->event, &told);
    else {
        Py_BEGIN_ALLOW_THREADS
        turn(r, 0);
        Py_END_ALLOW_THREADS
    }
    Buffer ended = {0}; /* a copy: making Python objects may run other code, which must find the lock free */
    pthread_mutex_lock(&r->lock);
    int copied = !r->ended.len || append(&ended, r->ended.data, r->ended.len);
    if (copied) r->ended.len = 0;
    pthread_mutex_unlock(&r->lock);
    if (!copied) return PyErr_NoMemory();
    size_t count = ended.len / sizeof(int64_t);
    PyObject *tokens = PyList_New(count);
    for (size_t i = 0; tokens && i < count; i++) {
        PyObject *token = PyLong_FromLongLong(((int64_t *)ended.data)[i]);
        if (token)
            PyList_SET_ITEM(tokens, i, token);
        else
            Py_CLEAR(tokens);
    }
    free(ended.data);
    return tokens;
}

/* One of the two columns of the reads: 0 times, 1 bytes of the body by then. */
static PyObject *column(const Stream *s, int which) {
    size_t count = s->reads.len / (2 * sizeof(int64_t));
    PyObject *numbers = PyList_New(count);
    for (size_t i = 0; numbers && i < count; i++) {
        int64_t read[2];
        memcpy(read, s->reads.data + i * sizeof read, sizeof read);
        PyObject *number = PyLong_FromLongLong(read[which]);
        if (number)
            PyList_SET_ITEM(numbers, i, number);
        else
            Py_CLEAR(numbers);
    }
    return numbers;
}

static PyObject *reader_collect(PyObject *self, PyObject *args) {
    Reader *r = opened(self);
    long long token;
    Stream s;
    if (!r || !PyArg_ParseTuple(args, "L", &token)) return NULL;
    pthread_mutex_lock(&r->lock);
    int found = take(r, token, &s);
    pthread_mutex_unlock(&r->lock);
    if (!found) return PyErr_Format(PyExc_KeyError, "no stream has the token %lld", token);
    PyObject *times = column(&s, 0), *ends = column(&s, 1), *response = NULL;
    size_t shown = s.line_len > LINE_SHOWN ? LINE_SHOWN + 1 : s.line_len;
    if (times && ends)
        response = Py_BuildValue(
            "sy#y#OOy#LLLNi", WHY[s.why], s.head.data ? s.head.data : "", (Py_ssize_t)s.head.len,
            s.body.data ? s.body.data : "", (Py_ssize_t)s.body.len, times, ends, s.line, (Py_ssize_t)shown,
            (long long)s.first_byte, (long long)s.ended, (long long)s.user_stamps, PyBool_FromLong(s.reusable), s.error);
    Py_XDECREF(times);
    Py_XDECREF(ends);
    release(&s);
    return response;
}

static PyObject *reader_progress(PyObject *self, PyObject *Py_UNUSED(none)) {
    Reader *r = opened(self);
    if (!r) return NULL;
    Buffer streams = {0};
    int copied = 1;
    pthread_mutex_lock(&r->lock);
    for (int i = 0; copied && i < r->slots; i++) {
        const Stream *s = r->stream[i];
        if (s->token && s->why == RUNNING) copied = append(&streams, s, sizeof *s);
    }
    pthread_mutex_unlock(&r->lock);
    PyObject *rows = copied ? PyList_New(0) : PyErr_NoMemory();
    for (size_t i = 0; rows && i < streams.len / sizeof(Stream); i++) {
        Stream *s = (Stream *)streams.data + i;
        PyObject *row = Py_BuildValue(
            "LnnN", (long long)s->token, (Py_ssize_t)(s->reads.len / (2 * sizeof(int64_t))), (Py_ssize_t)s->body.len,
            PyBool_FromLong(!s->first_token));
        if (!row || PyList_Append(rows, row)) Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    free(streams.data);
    return rows;
}

static PyObject *reader_shut(PyObject *self, PyObject *Py_UNUSED(none)) {
    Reader *r = ((ReaderObject *)self)->reader;
    ((ReaderObject *)self)->reader = NULL;
    if (r) reader_close(r);
    Py_RETURN_NONE;
}

static void reader_dealloc(PyObject *self) {
    Py_XDECREF(reader_shut(self, NULL));
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef reader_methods[] = {
    {"fileno", reader_fileno, METH_NOARGS, "The descriptor that is readable when poll() has something to do."},
    {"add", reader_add, METH_VARARGS, "add(fd, total_ns, first_token_ns, idle_ns) -> token"},
    {"poll", reader_poll, METH_NOARGS, "Tokens of the responses that ended since the last call."},
    {"collect", reader_collect, METH_VARARGS, "collect(token): what has come; ends a stream that still runs."},
    {"progress", reader_progress, METH_NOARGS, "[(token, reads, body bytes, has the first token come)]"},
    {"close", reader_shut, METH_NOARGS, "Give up the descriptors, the thread and all streams."},
    {0}};

static PyTypeObject reader_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "twoclocks._native.Reader",
    .tp_doc = "Reader(threaded, pause_ns); see _native.pyi",
    .tp_basicsize = sizeof(ReaderObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = reader_new,
    .tp_dealloc = reader_dealloc,
    .tp_methods = reader_methods,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *self = PyModule_Create(&module);
    if (!self || PyType_Ready(&reader_type) || PyModule_AddObjectRef(self, "Reader", (PyObject *)&reader_type))
        Py_CLEAR(self);
    return self;
}

#endif
