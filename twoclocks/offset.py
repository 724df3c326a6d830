"""Offset: how far this process's clock is from the master's, from exchanges of short messages. Pure arithmetic.

As in NTP: a worker says when it asked, the master when it answered, and the worker sees when the answer came. The
answer was made somewhere between the two, so each exchange says where the master's clock stands to within half its
round trip, whatever took how long on the way. Many exchanges, the fast ones above all, say more, and how it drifts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

KEPT = 128  # exchanges that an estimate rests on: those of about the last minute
DRIFT_SD = 2e-4
"""Clocks of machines seldom run apart faster than this (s/s): what is believed before a drift has been seen. Crystals
are off by 1e-5 to 1e-4, and Linux corrects them by at most 5e-4."""
LEAST_ERROR_S = 1e-6


class Exchange(NamedTuple):
    """One question and its answer, in seconds."""

    sent: float  # this process's clock, right before the question went out
    told: float  # the master's clock, as its answer says
    back: float  # this process's clock, right after the answer came

    @property
    def at(self) -> float:
        """The middle of it, on this process's clock."""
        return (self.sent + self.back) / 2

    @property
    def offset_s(self) -> float:
        """The master's clock minus ours, if both ways took equally long."""
        return self.told - self.at

    @property
    def error_s(self) -> float:
        """By how much that may be wrong at most: half the round trip."""
        return max((self.back - self.sent) / 2, LEAST_ERROR_S)


class Offset(msgspec.Struct, frozen=True):
    """What to add to this process's clock to have the master's."""

    at: float  # this process's clock: when it was estimated
    offset_s: float  # at that time
    error_s: float  # half the least round trip, and for want of better knowledge of the drift as below
    drift: float  # seconds per second that the offset grows by
    round_trip_s: float  # the least
    exchanges: int


def estimate(exchanges: Sequence[Exchange], now: float) -> Offset:
    """The offset at ``now``: a straight line through at least one exchange, the fast ones weighing most (1/error²).

    The drift is shrunk towards none as long as the exchanges say little of it (a prior of DRIFT_SD), so that the first
    ones, which lie close together, do not make one up. The error is that of the fastest exchange, and twice what the
    drift is uncertain by, over the time since the middle of them. Where a clock jumps or bends, the line misses the
    exchanges by more than they can be wrong, and the error grows by that.
    """
    weights = [1 / one.error_s**2 for one in exchanges]
    total = sum(weights)
    middle = sum(weight * one.at for weight, one in zip(weights, exchanges, strict=True)) / total
    level = sum(weight * one.offset_s for weight, one in zip(weights, exchanges, strict=True)) / total
    spread = sum(weight * (one.at - middle) ** 2 for weight, one in zip(weights, exchanges, strict=True))
    rise = sum(
        weight * (one.at - middle) * (one.offset_s - level) for weight, one in zip(weights, exchanges, strict=True)
    )
    drift = rise / (spread + 1 / DRIFT_SD**2)
    unsure = 2 * (spread + 1 / DRIFT_SD**2) ** -0.5 * abs(now - middle)
    missed = max(abs(one.offset_s - level - drift * (one.at - middle)) - one.error_s for one in exchanges)
    best = min(one.error_s for one in exchanges)
    return Offset(
        now, level + drift * (now - middle), best + unsure + max(0.0, missed), drift, 2 * best, len(exchanges)
    )


def same_clock(exchanges: Sequence[Exchange]) -> bool:
    """Could both have read one clock? Then each answer was made between its question and its arrival."""
    return all(one.sent <= one.told <= one.back for one in exchanges)
