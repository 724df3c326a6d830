"""What every rule of the verdict gives: a Reason. See twoclocks.verdict."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["SUSPECT", "INVALID"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a run is not simply valid."""

    level: Level
    name: str
    reason: str  # what was seen, in words, with the figure
    figure: float | None
    remedy: str  # how to go on
