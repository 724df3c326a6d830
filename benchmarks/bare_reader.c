/* The limit: what reading paced streams costs when nothing but the system calls is done. One thread, epoll, recvmsg with
 * the kernel's receive stamps, a closed loop of N streams. Finds where events and answers end, parses nothing.
 *
 *     bare_reader PORT STREAMS SECONDS BODY_FILE OUT_FILE
 *
 * OUT_FILE gets rows of three int64: request number, events in this read (0: the request was sent), ns of CLOCK_MONOTONIC.
 * Requests carry their number as X-Request-Id, in 32 hex digits.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define READ_BYTES 65536
#define END "\r\n0\r\n\r\n"
#define END_BYTES 7

struct stream {
    int fd;
    int64_t request;
    char last; /* byte of the read before, for an event's end that falls between two reads */
    char tail[END_BYTES];
};

static int64_t (*rows)[3];
static size_t row_count, row_room;
static char body[1 << 20], message[(1 << 20) + 512], buffer[READ_BYTES];
static size_t body_bytes;
static int64_t requests;

static void fail(const char *what) {
    fprintf(stderr, "bare_reader: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void keep(int64_t request, int64_t events, int64_t at) {
    if (row_count == row_room) {
        row_room = row_room ? 2 * row_room : 1 << 20;
        rows = realloc(rows, row_room * sizeof *rows);
        if (!rows) fail("memory");
    }
    rows[row_count][0] = request, rows[row_count][1] = events, rows[row_count++][2] = at;
}

static void send_request(struct stream *stream) {
    stream->request = requests++;
    stream->last = 0;
    memset(stream->tail, 0, END_BYTES);
    int head = snprintf(message, 512,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                        "X-Request-Id: %032llx\r\nContent-Length: %zu\r\n\r\n",
                        (unsigned long long)stream->request, body_bytes);
    memcpy(message + head, body, body_bytes);
    keep(stream->request, 0, now_ns(CLOCK_MONOTONIC));
    if (send(stream->fd, message, head + body_bytes, 0) != (ssize_t)(head + body_bytes)) fail("send");
}

static int64_t count_events(const char *data, size_t bytes, char last) {
    int64_t events = last == '\n' && data[0] == '\n';
    const char *end = data + bytes, *at = data;
    while ((at = memchr(at, '\n', end - at)) && at + 1 < end) {
        events += at[1] == '\n';
        at++;
    }
    return events;
}

/* One read; whether it brought the end of the answer. */
static int read_stream(struct stream *stream) {
    char control[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec part = {buffer, READ_BYTES};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t bytes = recvmsg(stream->fd, &header, MSG_DONTWAIT);
    if (bytes < 0 && errno == EAGAIN) return 0;
    if (bytes <= 0) fail("the server closed a stream");
    int64_t at = now_ns(CLOCK_MONOTONIC), wall = now_ns(CLOCK_REALTIME);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec stamp;
            memcpy(&stamp, CMSG_DATA(c), sizeof stamp);
            at -= wall - (stamp.tv_sec * 1000000000LL + stamp.tv_nsec);
        }
    int64_t events = count_events(buffer, bytes, stream->last);
    if (events) keep(stream->request, events, at);
    stream->last = buffer[bytes - 1];
    if (bytes >= END_BYTES) {
        memcpy(stream->tail, buffer + bytes - END_BYTES, END_BYTES);
    } else {
        memmove(stream->tail, stream->tail + bytes, END_BYTES - bytes);
        memcpy(stream->tail + END_BYTES - bytes, buffer, bytes);
    }
    return !memcmp(stream->tail, END, END_BYTES);
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: bare_reader PORT STREAMS SECONDS BODY_FILE OUT_FILE\n");
        return 2;
    }
    int count = atoi(argv[2]), open = 0, on = 1;
    FILE *file = fopen(argv[4], "rb");
    if (!file) fail(argv[4]);
    body_bytes = fread(body, 1, sizeof body, file);
    fclose(file);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct stream *streams = calloc(count, sizeof *streams);
    struct epoll_event events[256];
    int epoll = epoll_create1(0);
    for (int i = 0; i < count; i++, open++) {
        int fd = streams[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on)) fail("SO_TIMESTAMPNS");
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &streams[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    }
    int64_t end = now_ns(CLOCK_MONOTONIC) + (int64_t)(atof(argv[3]) * 1e9);
    for (int i = 0; i < count; i++) send_request(&streams[i]);
    while (open) {
        int ready = epoll_wait(epoll, events, 256, 10000);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct stream *stream = events[i].data.ptr;
            if (!read_stream(stream)) continue;
            if (now_ns(CLOCK_MONOTONIC) < end) {
                send_request(stream);
            } else {
                close(stream->fd);
                open--;
            }
        }
    }
    file = fopen(argv[5], "wb");
    if (!file || fwrite(rows, sizeof *rows, row_count, file) != row_count || fclose(file)) fail(argv[5]);
    return 0;
}
