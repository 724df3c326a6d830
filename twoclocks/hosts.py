"""Hosts: which addresses only this machine reaches, which are the user's own, and which are asked about before load is
sent there.
"""

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from twoclocks.errors import ExperimentError
from twoclocks.proxy import find_proxy

NEAR_NAMES = (".localhost", ".local", ".internal", ".svc", ".cluster.local", ".home.arpa")
"""Names that are given out in a local network or cluster alone, beside those without a dot."""


def is_wide(host: str) -> bool:
    """Can others than this machine reach what listens there?"""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def shown(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host or "*"


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, also in the short forms that the system takes (127.1); None for a name."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return getattr(address, "ipv4_mapped", None) or address
    with contextlib.suppress(OSError, UnicodeEncodeError):
        return ipaddress.ip_address(socket.inet_aton(host))
    return None


def is_near_name(name: str) -> bool:
    """Is it a name that nobody outside can own?"""
    name = name.lower().rstrip(".")
    return "." not in name or name.endswith(NEAR_NAMES)


def is_public(host: str, look_up: Callable[[str], list[str]]) -> bool:
    """Is it neither this machine nor in a private network? A name by what ``look_up`` says are its addresses; one that
    has none leads nowhere.
    """
    address = address_of(host)
    if address is not None:
        return address.is_global
    if is_near_name(host):
        return False
    return any(ipaddress.ip_address(one).is_global for one in look_up(host))


def addresses(name: str) -> list[str]:
    """What the system's resolver says; nothing if it knows no such name."""
    try:
        return sorted({str(told[4][0]) for told in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def is_far(url: str) -> bool:
    """Does the load for this address leave the user's own machines and networks?"""
    host = urlsplit(url).hostname or ""
    if address_of(host) is None and not is_near_name(host):
        with contextlib.suppress(ValueError):
            if find_proxy(url) is not None:  # which looks the name up itself
                return True
    return is_public(host, addresses)


def somebody_is_there() -> bool:
    """Does a person see what is said, and can the person answer?"""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


class Agreed:
    """The far hosts to which the user has agreed, one a line in a file of the user's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def knows(self, host: str) -> bool:
        """Was it agreed to before?"""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return host in self.path.read_text(encoding="utf-8").splitlines()
        return False

    def add(self, host: str) -> None:
        """From now on. Where the file cannot be written, the next run asks again."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{host}\n")


def agreed_hosts() -> Agreed:
    """In $XDG_STATE_HOME/twoclocks, else ~/.local/state/twoclocks."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Agreed(Path(state).expanduser() / "twoclocks" / "agreed-hosts.txt")


def agree(url: str, agreed: Agreed, *, yes: bool, interactive: bool, say: Callable[[str], None]) -> None:
    """See that load for a far host is meant. ``yes`` agrees to it, for good.

    Raises ExperimentError for a host that was never agreed to, where there is somebody to ask; elsewhere ``say`` is
    told, since a job that nobody watches must not hang.
    """
    host = urlsplit(url).hostname or ""
    if not is_far(url) or agreed.knows(host):
        return
    if yes:
        agreed.add(host)
    elif interactive:
        raise ExperimentError(
            f"{url}: is neither this machine nor in a private network; load costs whoever runs it. If it is meant, "
            f"repeat with --yes, once for each host ({agreed.path} remembers)"
        )
    else:
        say(f"the load goes to {host}, which is neither this machine nor in a private network")


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
