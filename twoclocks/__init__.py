"""LLM latency, measured by two clocks: the client's and the server's.

``load_run`` reads a run folder. Importing the package loads neither Locust nor pandas: the one patches the standard
library, the other takes a second.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twoclocks.load import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "load_run"):
        from twoclocks import load

        return getattr(load, name)
    raise AttributeError(f"module 'twoclocks' has no attribute {name!r}")
