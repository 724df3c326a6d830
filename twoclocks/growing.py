"""Growing: whole lines of a file to which somebody else appends, a part at a time."""

from pathlib import Path

STAND_BACK = 10
"""The nice value of processes that read a run while it goes on: who sends comes first on a core that both want."""


class Growing:
    """Remembers how far the file has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self, about: int) -> bytes:
        """The next whole lines, about so many bytes of them; empty where there is none, or no such file, yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                part = file.read(about)
                if b"\n" not in part:  # one that is longer
                    part += file.readline()
        except OSError:
            return b""
        whole = part[: part.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole

    @property
    def behind(self) -> int:
        """Bytes that have not been read."""
        try:
            return self.path.stat().st_size - self._offset
        except OSError:
            return 0
