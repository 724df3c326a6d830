/* Drives the core of twoclocks/_native.c without Python, to be built under sanitizers. The first argument names a part:
 *   fuzz SEED COUNT    responses, mostly damaged, in random pieces: bounds hold, and the split does not matter
 *   streams SEED COUNT many socket pairs through one Reader, some cancelled (argument 4: "thread" or "turn")
 *   clock              a wall clock that is set while bytes wait must not enter an arrival
 * Prints what it did; exits 1 at the first thing that is wrong. */
#define _GNU_SOURCE
#include <stdint.h>
#include <time.h>

static int64_t wall_step_ns;
static int stepping_clock(clockid_t clock, struct timespec *now) {
    int result = clock_gettime(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += wall_step_ns / 1000000000; /* whole seconds */
    return result;
}
#define clock_gettime stepping_clock
#define NATIVE_CORE_ONLY
#include "../twoclocks/_native.c"

#include <netinet/in.h>
#include <stdio.h>

#define CHECK(what) \
    do { \
        if (!(what)) fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what), exit(1); \
    } while (0)

static uint64_t state;
static unsigned random_below(unsigned bound) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return bound ? (unsigned)(state >> 16) % bound : 0;
}

static void say(Buffer *to, const char *text) { CHECK(append(to, text, strlen(text))); }

/* A response as servers send it: some framing, some events. */
static void make_response(Buffer *to) {
    static const char *const EVENTS[] = {
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\r\n\r\n", "data: [DONE]\n\n", ": keep-alive\n\n",
        "data: {\"choices\":[{\"delta\":{\"tool_calls\": [{\"index\":0}]}}]}\n\n", "\"content\"", "\"text\" :", "\n"};
    int framing = random_below(3), chunks = random_below(6);
    char line[64];
    if (!random_below(4)) say(to, "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n");
    say(to, random_below(8) ? "HTTP/1.1 200 OK\r\n" : "HTTP/1.0 404 Not Found\n");
    if (!random_below(3)) say(to, "Connection: keep-alive, close\r\n");
    if (!random_below(6)) say(to, "Content-Encoding:  identity \r\n");
    Buffer body = {0};
    for (int i = 0; i < chunks; i++) {
        const char *event = EVENTS[random_below(8)];
        if (framing == 0) {
            snprintf(line, sizeof line, "%zx%s\r\n", strlen(event), random_below(3) ? "" : " ;ext=1");
            say(&body, line), say(&body, event), say(&body, "\r\n");
        } else
            say(&body, event);
    }
    if (framing == 0) say(&body, random_below(3) ? "0\r\n\r\n" : "0\r\nx-took: 3\r\n\r\n");
    if (framing == 0) say(to, "Transfer-Encoding: Chunked\r\n");
    snprintf(line, sizeof line, "%s: %zu\r\n\r\n", framing == 1 ? "Content-Length" : "x", body.len);
    say(to, line);
    if (body.len) CHECK(append(to, body.data, body.len));
    free(body.data);
}

static void damage(Buffer *of) {
    static const char *const PIECES[] = {
        "\r", "\n", "\r\n\r\n", "0", "ffffffffffffffff", "-1", ";", ":", " ", "\"", "\xff", "HTTP/1.1 "};
    for (int i = random_below(4); i > 0; i--) {
        size_t at = random_below(of->len + 1), count = random_below(8);
        if (count > of->len - at) count = of->len - at;
        switch (random_below(3)) {
        case 0:
            if (at < of->len) of->data[at] = (char)random_below(256);
            break;
        case 1:
            memmove(of->data + at, of->data + at + count, of->len - at - count), of->len -= count;
            break;
        default: {
            const char *piece = PIECES[random_below(12)];
            CHECK(reserve(of, strlen(piece)));
            memmove(of->data + at + strlen(piece), of->data + at, of->len - at);
            memcpy(of->data + at, piece, strlen(piece)), of->len += strlen(piece);
        }
        }
    }
    if (!random_below(200)) /* endless lines and heads */
        for (int i = 0; i < 300; i++) say(of, "........................................");
}

/* Each piece in memory of exactly its size, so that a sanitizer sees one byte too far. */
static enum why feed_piece(Stream *s, const char *data, size_t len, int64_t at) {
    char *piece = malloc(len);
    memcpy(piece, data, len);
    enum why why = feed(s, piece, len, at);
    free(piece);
    return why;
}

static void check_stream(const Stream *s, enum why why) {
    int64_t end = 0, at = 0, read[2];
    for (size_t i = 0; i < s->reads.len; i += sizeof read) {
        memcpy(read, s->reads.data + i, sizeof read);
        CHECK(read[0] > at && read[1] > end);
        at = read[0], end = read[1];
    }
    CHECK((size_t)end == s->body.len);
    CHECK(s->head.len <= MAX_HEAD_BYTES + READ_BYTES);
    CHECK(s->body.len <= MAX_BODY_BYTES + READ_BYTES);
    CHECK(why != COMPLETE || s->head.len > 0);
}

static void fuzz(int count) {
    int ends[BAD_TRAILER + 1] = {0};
    for (int i = 0; i < count; i++) {
        Buffer bytes = {0};
        make_response(&bytes);
        if (random_below(5)) damage(&bytes);
        enum why split_why = RUNNING, whole_why;
        Stream split = {.first_token = 1}, whole = {.first_token = 1};
        int64_t at = 0;
        for (size_t from = 0, len; from < bytes.len && split_why == RUNNING; from += len) {
            len = 1 + random_below(random_below(2) ? 4 : bytes.len);
            if (len > bytes.len - from) len = bytes.len - from;
            split_why = feed_piece(&split, bytes.data + from, len, ++at);
            check_stream(&split, split_why);
        }
        whole_why = feed_piece(&whole, bytes.data, bytes.len, 1);
        check_stream(&whole, whole_why);
        if (bytes.len < MAX_LINE_BYTES && whole_why < BAD_HEAD) {
            CHECK(split_why == whole_why && split.body.len == whole.body.len && split.head.len == whole.head.len);
            CHECK(!split.body.len || !memcmp(split.body.data, whole.body.data, split.body.len));
            CHECK(!split.first_token == !whole.first_token);
        }
        ends[split_why]++;
        release(&split), release(&whole), free(bytes.data);
    }
    printf("running %d, complete %d, bad heads %d, sizes %d, ends %d, lines %d\n", ends[RUNNING], ends[COMPLETE],
           ends[BAD_HEAD], ends[BAD_SIZE], ends[BAD_END], ends[BAD_LINE]);
    CHECK(ends[RUNNING] && ends[COMPLETE] && ends[BAD_HEAD] && ends[BAD_SIZE] && ends[BAD_END]);
}

enum { PAIRS = 24 };

static void streams(int count, int threaded) {
    Reader *r = reader_open(threaded, 1000);
    CHECK(r);
    int near[PAIRS], far[PAIRS], done = 0, cancelled = 0, late = 0;
    int64_t token[PAIRS] = {0};
    Buffer bytes[PAIRS] = {0};
    size_t sent[PAIRS] = {0};
    int silent[PAIRS] = {0};
    while (done < count) {
        for (int i = 0; i < PAIRS; i++) {
            if (!token[i]) {
                int pair[2];
                CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
                near[i] = pair[0], far[i] = pair[1], sent[i] = 0, bytes[i].len = 0;
                make_response(&bytes[i]);
                if (!random_below(3)) damage(&bytes[i]);
                silent[i] = !random_below(30);
                int64_t now = clock_ns(CLOCK_MONOTONIC), allowed = silent[i] ? SECOND / 200 : 60 * SECOND;
                pthread_mutex_lock(&r->lock);
                token[i] = add(r, near[i], now + 60 * SECOND, now + allowed, allowed);
                pthread_mutex_unlock(&r->lock);
                CHECK(token[i]);
            }
            if (silent[i]) continue;
            size_t len = 1 + random_below(60);
            if (len > bytes[i].len - sent[i]) len = bytes[i].len - sent[i];
            if (len && send(far[i], bytes[i].data + sent[i], len, MSG_NOSIGNAL) > 0) sent[i] += len;
            if (sent[i] == bytes[i].len) shutdown(far[i], SHUT_WR);
        }
        if (!threaded) turn(r, 0);
        pthread_mutex_lock(&r->lock);
        for (int i = 0; i < PAIRS; i++) {
            Stream *s = lookup(r, token[i]), taken;
            CHECK(s);
            if (s->why == RUNNING && (silent[i] || random_below(200))) continue;
            cancelled += s->why == RUNNING, late += s->why == FIRST_TOKEN;
            CHECK(take(r, token[i], &taken) && !take(r, token[i], &taken));
            check_stream(&taken, taken.why);
            release(&taken), close(near[i]), close(far[i]);
            token[i] = 0, done++;
        }
        r->ended.len = 0;
        CHECK(r->running >= 0 && r->running <= PAIRS && r->slots <= PAIRS);
        pthread_mutex_unlock(&r->lock);
        if (threaded && !random_below(4)) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    reader_close(r);
    for (int i = 0; i < PAIRS; i++) {
        if (token[i]) close(near[i]), close(far[i]);
        free(bytes[i].data);
    }
    printf("done %d, cancelled %d, timed out %d\n", done, cancelled, late);
    CHECK(cancelled && late);
}

/* The arrival of four bytes over loopback TCP, read 0.2 s after they were sent; the wall clock is set in between. */
static int64_t lateness(Reader *r, int to, int from, int64_t step, int *kernel) {
    char bytes[4], data[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec part = {bytes, sizeof bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = data, .msg_controllen = sizeof data};
    int64_t sent = clock_ns(CLOCK_MONOTONIC), offset = wall_step_ns;
    CHECK(send(to, "four", 4, 0) == 4);
    nanosleep(&(struct timespec){.tv_nsec = 200 * 1000 * 1000}, NULL);
    wall_step_ns += step;
    CHECK(recvmsg(from, &message, 0) == 4 && CMSG_FIRSTHDR(&message));
    struct timespec stamp; /* the kernel's own clock cannot be set here, so its stamp is made to have followed */
    memcpy(&stamp, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof stamp);
    stamp.tv_sec += offset / SECOND;
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &stamp, sizeof stamp);
    compare_clocks(r);
    return arrival(r, &message, clock_ns(CLOCK_MONOTONIC), kernel) - sent;
}

static void clock_steps(void) {
    static Reader r;
    compare_clocks(&r);
    int listener = socket(AF_INET, SOCK_STREAM, 0), to = socket(AF_INET, SOCK_STREAM, 0), on = 1, kernel;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    CHECK(!bind(listener, (struct sockaddr *)&address, len) && !listen(listener, 1));
    CHECK(!getsockname(listener, (struct sockaddr *)&address, &len) && !connect(to, (struct sockaddr *)&address, len));
    int from = accept(listener, NULL, NULL);
    CHECK(!setsockopt(from, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on));
    nanosleep(&(struct timespec){.tv_nsec = 200 * 1000 * 1000}, NULL); /* the kernel begins to stamp a little later */
    int64_t still = lateness(&r, to, from, 0, &kernel);
    CHECK(kernel && still >= 0 && still < SECOND / 8);
    for (int i = 0; i < 2; i++) {
        int64_t stepped = lateness(&r, to, from, (i ? -5 : 5) * SECOND, &kernel);
        CHECK(!kernel && stepped >= SECOND / 5); /* no worse than a stamp of our own */
        int64_t after = lateness(&r, to, from, 0, &kernel);
        CHECK(kernel && after >= 0 && after < SECOND / 8);
    }
    close(listener), close(to), close(from);
    printf("steps kept out\n");
}

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    if (argc > 2) state = strtoull(argv[2], NULL, 10) * 2654435769u + 88172645463325252u;
    if (!strcmp(argv[1], "fuzz"))
        fuzz(atoi(argv[3]));
    else if (!strcmp(argv[1], "streams"))
        streams(atoi(argv[3]), !strcmp(argv[4], "thread"));
    else
        clock_steps();
    return 0;
}
