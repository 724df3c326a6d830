"""Loaded by every Python of a run whose PYTHONPATH begins with this folder: names that cannot be resolved, and a wall
clock that is set, while a test says so. The machine's own resolver and clock stay as they are.
"""

import _socket
import os
import time
from pathlib import Path

DNS, CLOCK = (Path(os.environ.get(name, "/nowhere")) for name in ("FAULT_DNS", "FAULT_CLOCK"))
SET_BY_S = 3600
_getaddrinfo, _time, _time_ns = _socket.getaddrinfo, time.time, time.time_ns


def getaddrinfo(host, *arguments, **keywords):
    """While the file FAULT_DNS is there, no name is known, and each question is a line of it."""
    if DNS.exists():
        with DNS.open("a") as file:
            file.write(f"{host}\n")
        raise _socket.gaierror(_socket.EAI_AGAIN, "Temporary failure in name resolution")
    return _getaddrinfo(host, *arguments, **keywords)


def _ahead_s() -> int:
    """An hour as soon as the file FAULT_CLOCK is there."""
    return SET_BY_S if CLOCK.exists() else 0


_socket.getaddrinfo = getaddrinfo
time.time = lambda: _time() + _ahead_s()
time.time_ns = lambda: _time_ns() + _ahead_s() * 10**9
