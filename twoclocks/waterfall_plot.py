"""The waterfall as a picture: waterfalls and decodes -> waterfall.png. Milliseconds shown.

What the client alone sees is grey and blue, what the server tells is in warm colours; both kinds stay apart for
colour-blind readers, and neighbours differ in hatching too.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from twoclocks.units import number
from twoclocks.waterfall import PERCENTILES, ROUNDING_S, Bar, Decode, Waterfall, dominant, parting, stacks

CLIENT, SERVER, INK, QUIET = "#0072B2", "#D55E00", "#222222", "#6b6b6b"
LEAST_SHARE = 0.05
"""Waterfalls of fewer of the requests are left to the table."""
LABELLED_SHARE = 0.055
"""A bar as wide as this share of the axis carries its value."""

_STYLES: dict[str, tuple[str, str]] = {
    "late": ("#3d3d3d", ""),
    "connect": ("#8c8c8c", "//"),
    "send": ("#c4c4c4", ""),
    "template+tokenize": ("#F0E442", ""),
    "tokenize": ("#F0E442", ""),
    "queue": (SERVER, ""),
    "prefill": ("#E69F00", "\\\\"),
}
_AROUND = ("#56B4E9", "")  # HTTP and delivery, with whatever the server does not tell apart
_HOPS = (("#009E73", "--"), ("#66C2A5", ""), ("#00543d", "//"))  # between the stages
_INSIDE = ("#CC79A7", "..")  # in the server, not told apart


def waterfall_plot(cut: Sequence[Waterfall], tpots: Sequence[Decode], path: Path, title: str) -> None:
    """Where the time until the first token went, and the time per output token by both clocks, as a PNG."""
    count = sum(len(one.rows) for one in cut)
    shown = [one for one in cut if len(one.rows) >= LEAST_SHARE * count]
    heights = [1.8 if one.is_window else 3.6 for one in shown] or [3.6]
    heights += [2.5] * len(tpots)
    figure = Figure(figsize=(12, 1.0 + sum(heights)), dpi=110, layout="constrained")
    figure.suptitle(_printable(textwrap.shorten(title, 108)), fontsize=14, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if not shown:
        panels[0].set_axis_off()
        nothing = "no measured request that ended ok got a token"
        panels[0].text(0.5, 0.5, nothing, transform=panels[0].transAxes, ha="center", color=QUIET)
    for axes, one in zip(panels, shown, strict=False):
        _waterfall(axes, one)
    for axes, tpot in zip(panels[max(1, len(shown)) :], tpots, strict=True):
        _tpot(axes, tpot)
    figure.savefig(path)


def _waterfall(axes: Axes, waterfall: Waterfall) -> None:
    """A stack a request: the mean one and those at the percentiles. What is negative goes to the left of 0."""
    stacked = stacks(waterfall)
    styles = _styles(waterfall.bars)
    # the widest stack decides, so that no bar of it is cut
    width = max(sum(abs(seconds) for seconds in stack["bars"].values()) for stack in stacked) or 1e-3
    for y, stack in enumerate(stacked):
        right = left = 0.0
        for bar in waterfall.bars:
            seconds = stack["bars"][bar.name]
            colour, hatch = styles[bar.name]
            begin = right if seconds >= 0 else left
            axes.barh(y, seconds, left=begin, height=0.62, color=colour, hatch=hatch, edgecolor="white", lw=0.8)
            if abs(seconds) >= LABELLED_SHARE * width:
                axes.text(
                    begin + seconds / 2, y, number(seconds, "s"), ha="center", va="center", fontsize=9,
                    color=INK, bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
                )  # fmt: skip
            if seconds >= 0:
                right += seconds
            else:
                left += seconds
        axes.annotate(
            f"{number(stack['total'], 's')} ms", (right, y), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=10, fontweight="bold", color=INK,
        )  # fmt: skip
    mean = "mean over\nthe window" if waterfall.is_window else "mean request"
    names = [mean if stack["name"] == "mean" else f"request at {stack['name']}" for stack in stacked]
    axes.set_yticks(
        range(len(names)), [f"{name}\n(of {stack['n']:,})" for name, stack in zip(names, stacked, strict=True)]
    )
    axes.set_ylim(len(names) - 0.45, -0.55)
    negative = min(0.0, *(sum(min(0.0, s) for s in stack["bars"].values()) for stack in stacked))
    axes.set_xlim(negative * 1.05, width * 1.12)
    who = (
        f"server's part from {waterfall.source} ({waterfall.server})"
        if waterfall.source
        else "the server tells nothing"
    )
    axes.set_title(
        f"Where the time to the first token went: {len(waterfall.rows):,} requests, {who}",
        loc="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    handles = [
        Patch(facecolor=styles[bar.name][0], hatch=styles[bar.name][1], edgecolor="white", label=_printable(bar.label))
        for bar in waterfall.bars
    ]
    legend = axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, handleheight=1.3,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_text(textwrap.fill(text.get_text(), 26))
    below = sum(int((bar.seconds < -ROUNDING_S).sum()) for bar in waterfall.bars)
    words = dominant(waterfall) + (f" In {below} requests a part is negative." if below else "")
    _finish(axes, "ms since the request was meant to go out", words)


def _tpot(axes: Axes, tpot: Decode) -> None:
    """Client and server bar by bar: mean and percentiles of the time per output token."""
    names = ["mean", *(f"p{p}" for p in PERCENTILES)]
    for offset, (label, colour, values) in enumerate(
        (("client: as chunks arrived", CLIENT, tpot.client), ("server: as it says", SERVER, tpot.on_server))
    ):
        shown = [float(values.mean()), *np.percentile(values, PERCENTILES)]
        places = np.arange(len(names)) + (offset - 0.5) * 0.38
        bars = axes.barh(places, shown, height=0.36, color=colour, alpha=0.85, label=label)
        axes.bar_label(bars, [f"{number(float(value), 's')}" for value in shown], padding=4, fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.margins(x=0.1)
    axes.set_title(
        f"Time per output token (TPOT) of the same {len(tpot.client):,} requests, {tpot.source} ({tpot.server})",
        loc="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    _finish(axes, "ms a token", parting(tpot))


def _styles(bars: Sequence[Bar]) -> dict[str, tuple[str, str]]:
    """Colour and hatching of each bar."""
    hops = [bar.name for bar in bars if bar.name.startswith("to ")]
    return {
        bar.name: _HOPS[hops.index(bar.name) % len(_HOPS)]
        if bar.name in hops
        else _STYLES.get(bar.name) or (_AROUND if "http" in bar.name else _INSIDE)
        for bar in bars
    }


def _finish(axes: Axes, label: str, words: str) -> None:
    axes.set_xlabel(f"{label}\n{_printable(textwrap.fill(words, 118))}", fontsize=9, color=QUIET, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:,g}"))
    axes.grid(axis="x", color="#000000", alpha=0.12, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0, color=INK, lw=0.8)


def _printable(text: str) -> str:
    """Without matplotlib's own mark-up, which a ``$`` in a name would start."""
    return text.replace("$", r"\$")
