"""A server of one answer behind a tunnel device, which sends its segments in any order, as if one had been lost.

Run in a network of its own: unshare --map-root-user --net python lost_segments.py. For each order it prints how the
arrivals of a record compare with when the chunks could be read at the earliest: when all before them had come, too.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from itertools import accumulate

from fake_server import DONE, END, HEAD, chunked, delta, usage

from twoclocks.client import Origin, send
from twoclocks.endpoint import make_endpoint
from twoclocks.experiment import Target, Timeouts
from twoclocks.reader import connect
from twoclocks.workload import Plan, Prompt

IP = shutil.which("ip") or "ip"
HERE, THERE = "10.9.0.1", "10.9.0.2"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SYN, PSH, ACK = 0x02, 0x08, 0x10
FIRST = 1000  # sequence number
HELD_S = 0.25
SEGMENTS = [HEAD + chunked(delta(role="assistant", content="")), *(chunked(delta(content=word)) for word in "abcd")]
SEGMENTS += [chunked(delta(content="e", finish_reason="stop")), chunked(usage(5)) + chunked(DONE) + END]
ORDERS = {"none is late": [0, 1, 2, 3, 4, 5, 6], "the head is late": [1, 0, 2, 3, 4, 5, 6]}
ORDERS |= {"a token is late": [0, 1, 3, 2, 4, 5, 6], "two are late": [0, 2, 4, 1, 3, 5, 6]}


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class LateHost:
    """Just enough of TCP for one request a connection."""

    def __init__(self) -> None:
        self.device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self.device, TUNSETIFF, struct.pack("16sH", b"tun0", IFF_TUN | IFF_NO_PI))
        for words in ("link set lo up", f"addr add {HERE}/24 dev tun0", "link set tun0 up"):
            subprocess.run([IP, *words.split()], check=True)
        self.order: list[int] = []
        self.sent: dict[int, float] = {}
        threading.Thread(target=self.serve, daemon=True).start()

    def send(self, port: int, number: int, acknowledged: int, flags: int, data: bytes = b"") -> None:
        ends = socket.inet_aton(THERE) + socket.inet_aton(HERE)
        tcp = struct.pack("!HHIIBBHHH", 80, port, number, acknowledged, 5 << 4, flags, 65535, 0, 0) + data
        sum_ = checksum(ends + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", sum_) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
        os.write(self.device, ip[:10] + struct.pack("!H", checksum(ip + ends)) + ends + tcp)

    def serve(self) -> None:
        while True:
            packet = os.read(self.device, 65536)
            if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
                continue
            tcp = packet[(packet[0] & 15) * 4 :]
            port, _, number, _, offset, flags = struct.unpack("!HHIIBB", tcp[:14])
            data = tcp[(offset >> 4) * 4 :]
            if flags & SYN:
                self.send(port, FIRST, number + 1 & 0xFFFFFFFF, SYN | ACK)
            elif data:  # the request is of one segment
                self.answer(port, number + len(data) & 0xFFFFFFFF)

    def answer(self, port: int, acknowledged: int) -> None:
        begins = [FIRST + 1, *accumulate(map(len, SEGMENTS), initial=FIRST + 1)][1:]
        for position, segment in enumerate(self.order):
            # one that fills a hole comes late; all others on time
            time.sleep(HELD_S if segment < max(self.order[:position], default=0) else 0.02)
            self.sent[segment] = time.monotonic()
            self.send(port, begins[segment], acknowledged, PSH | ACK, SEGMENTS[segment])


def main() -> None:
    host = LateHost()
    for name, order in ORDERS.items():
        host.order, host.sent = order, {}
        connection = connect(make_endpoint(Target(url=f"http://{THERE}"), Timeouts()))
        record = send(connection, Plan("0" * 32, Prompt("p", {}), b"{}"), Origin(zero_ns=0), "measure")
        connection.close()
        assert record.status == "ok", record.error_message
        arrived = [record.sent_at + at / 1e6 for at in accumulate(record.chunk_us)][: len(SEGMENTS)]
        readable = accumulate((host.sent[segment] for segment in range(len(SEGMENTS))), max)
        late_s = [at - could for at, could in zip(arrived, readable, strict=True)]
        sys.stdout.write(json.dumps({"order": name, "late_s": late_s}) + "\n")


if __name__ == "__main__":
    main()
