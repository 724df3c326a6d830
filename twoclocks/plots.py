"""Plots: runs -> client_vs_server_violin.png and timeline.png. Milliseconds shown.

Client and server keep their colour and their side in every panel; both colours stay apart for colour-blind readers, and
left and right tell them apart without colour.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.mlab import GaussianKDE
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from twoclocks import expositions, metrics
from twoclocks.clocks import CLOCKS
from twoclocks.errors import plain
from twoclocks.expositions import Scrapes
from twoclocks.load import Run
from twoclocks.metrics import Floats, definition
from twoclocks.timeline import Panel as TimePanel
from twoclocks.timeline import timeline_of
from twoclocks.units import number
from twoclocks.wording import LABELS

CLIENT, SERVER, INK, QUIET = "#0072B2", "#D55E00", "#222222", "#6b6b6b"
_SIDES = {"client": CLIENT, "server": SERVER, "users": QUIET}
TAIL = 99.5  # percentile at which an axis may be cut
LOG_SPREAD = 100.0  # ratio from which an axis is logarithmic
HALF = 0.28  # width of half a violin; runs stand 1 apart, which leaves room for the medians between them
FEW = 8  # below this many values no density is drawn, only the values
MANY = 2000  # a density is drawn from this many evenly spaced quantiles at most


class Shown(Protocol):
    """What violins are drawn of: a run, or several runs taken together."""

    @property
    def shown_name(self) -> str: ...
    @property
    def ok(self) -> pd.DataFrame: ...
    @property
    def gaps(self) -> metrics.Gaps: ...
    @property
    def scrapes(self) -> list[Scrapes]: ...
    @property
    def first_scrapes(self) -> list[int]: ...


@dataclass(frozen=True)
class Side:
    """One half of a violin: values in seconds, or why there are none."""

    values: Floats
    silence: str = ""
    meaning: str = ""  # start, stop and weight of what the server told
    told_by: tuple[str, str] | None = None  # (source, server) of the server's values: one clock's, never several
    left_out: int = 0  # requests whose figure another clock told


@dataclass(frozen=True)
class Panel:
    """One metric over all runs: (client, server) a run."""

    title: str
    pairs: list[tuple[Side, Side]]
    footnotes: list[str]


def violins(runs: Sequence[Shown], path: Path, title: str) -> None:
    """TTFT, TPOT, E2E and ITL of each run, client left and server right, as a PNG."""
    rows, columns = (2, 2) if len(runs) <= 2 else (4, 1)
    width, height = max(12.0, 2.2 * len(runs) + 2), 5.2 * rows
    engine = ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(width, height + 0.6), dpi=110, layout=engine)
    (head,), (body,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(0.6, height))
    head.text(0.01, 0.95, printable(textwrap.shorten(title, int(9 * width))), fontsize=14, fontweight="bold", va="top")
    handles = [Patch(color=CLIENT, alpha=0.55), Patch(color=SERVER, alpha=0.55), Line2D([], [], color=INK, lw=2)]
    labels = ["client (left half): as it arrived", "server (right half): as it says", "median"]
    head.legend(handles, labels, loc="lower left", ncols=3, frameon=False, fontsize=11)
    for axes, panel in zip(body.subplots(rows, columns).flat, violin_panels(runs), strict=True):
        _draw(axes, panel, [run.shown_name for run in runs], footnote_width=int(15.5 * width / columns))
    figure.savefig(path)


def timeline(run: Run, path: Path) -> None:
    """Users and requests over the run, tokens a second, TTFT, and KV cache usage where a server tells it, as a PNG."""
    shown = timeline_of(run)
    figure = Figure(figsize=(12, 2.2 + 2.3 * len(shown)), dpi=110, layout="constrained")
    figure.suptitle(printable(f"{run.name}: the run over time"), fontsize=14, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(len(shown), 1, sharex=True)
    for axes, panel in zip(panels, shown, strict=True):
        _over_time(axes, panel)
        if np.isfinite(run.window).all():
            axes.axvspan(*run.window, color="#000000", alpha=0.04, lw=0, zorder=0)
    panels[-1].set_xlabel("seconds since the run's start; the measuring window is shaded")
    figure.savefig(path)


def violin_panels(runs: Sequence[Shown]) -> list[Panel]:
    """TTFT, TPOT, E2E and ITL of each run by both clocks."""
    panels = []
    for metric, function in (("ttft", metrics.ttft), ("tpot", metrics.tpot), ("e2e", metrics.e2e)):
        pairs = [(Side(run.ok[metric].dropna().to_numpy(), "no value"), _server_side(run, metric)) for run in runs]
        panels.append(Panel(LABELS[metric], pairs, [f"Client: {definition(function)}", *_told_notes(runs, pairs)]))
    silence = "no server tells\nsingle gaps"
    pairs = [(Side(run.gaps.seconds, "no value"), _window_mean(run, "itl", silence)) for run in runs]
    notes = [f"Client: {definition(metrics.chunk_gaps)}", *_told_notes(runs, pairs)]
    panels.append(Panel(LABELS["itl"], pairs, notes))
    return panels


def _told_notes(runs: Sequence[Shown], pairs: Sequence[tuple[Side, Side]]) -> list[str]:
    """What the server's figures in a panel mean, each once, and how many requests another clock told of."""
    sides = [server for _, server in pairs]
    notes = list(dict.fromkeys(side.meaning for side in sides if side.meaning))
    for run, side in zip(runs, sides, strict=True):
        if side.left_out:
            of = f" of {run.shown_name}" if len(runs) > 1 else ""
            notes.append(f"Left out{of}: {side.left_out:,} requests whose figure another clock of the server told.")
    return notes


def _server_side(run: Shown, metric: str) -> Side:
    """What the server says of single requests; where it told them by several clocks, the one that told most."""
    told = run.ok[run.ok[f"server_{metric}"].notna()]
    if len(told):
        clocks = Counter(zip(told["server_source"], told["server_kind"], strict=True))
        ((source, kind), _), *_ = clocks.most_common(1)
        own = told[(told["server_source"] == source) & (told["server_kind"] == kind)]
        values = own[f"server_{metric}"].to_numpy(dtype=np.float64)
        meaning = f"Server ({source}, {kind}): {CLOCKS[source, kind][metric].text}."
        return Side(values, meaning=meaning, told_by=(source, kind), left_out=len(told) - len(own))
    return _window_mean(run, metric, "no per-request figure\nfrom a server")


def _window_mean(run: Shown, metric: str, nothing: str) -> Side:
    """No values, but the mean that the server's /metrics tell of the window, if they do."""
    gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, metric)
    if gained is None or not gained.count:
        return Side(np.array([]), nothing)
    silence = f"{nothing};\nits /metrics mean:\n{number(gained.mean, 's')} ms"
    return Side(np.array([]), silence, f"Server (/metrics): {gained.definition}.")


def _draw(axes: Axes, panel: Panel, names: list[str], footnote_width: int) -> None:
    everything = np.concatenate([side.values for pair in panel.pairs for side in pair])
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
    if len(everything):
        low, high, log = limits([side.values for pair in panel.pairs for side in pair])
        if log:
            axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for x, pair in enumerate(panel.pairs):
            for side, colour, sign in zip(pair, (CLIENT, SERVER), (-1, 1), strict=True):
                _half(axes, x, side, colour, sign, (low, high), log)
        axes.set_ylabel("ms, logarithmic" if log else "ms, not from 0" if low > 0 else "ms")
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no measured request has a value", transform=axes.transAxes, ha="center", color=QUIET)
    axes.set_xlim(-0.62, len(names) - 0.38)
    counts = [" | ".join(f"{len(side.values):,}" for side in pair if len(side.values)) or "0" for pair in panel.pairs]
    clocks = [server.told_by for _, server in panel.pairs]
    # where runs were told by different clocks, each says by which
    whose = [f" ({', '.join(clock)})" if clock and len({*clocks} - {None}) > 1 else "" for clock in clocks]
    labels = [
        f"{printable(textwrap.fill(name, 28))}\nn = {n}{clock}"
        for name, n, clock in zip(names, counts, whose, strict=True)
    ]
    axes.set_xticks(range(len(names)), labels, fontsize=10)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#000000", alpha=0.12, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    wrapped = "\n".join(textwrap.fill(note, footnote_width, subsequent_indent="   ") for note in panel.footnotes)
    axes.set_xlabel(wrapped, fontsize=7.5, color=QUIET, loc="left", labelpad=6)


def _half(axes: Axes, x: int, side: Side, colour: str, sign: int, limits: tuple[float, float], log: bool) -> None:
    """Half a violin with its median and its value; a note where values lie beyond the axis."""
    low, high = limits
    if not len(side.values):
        axes.text(
            x + sign * 0.06, 0.5, side.silence, transform=axes.get_xaxis_transform(), fontsize=8.5, color=QUIET,
            ha="left" if sign > 0 else "right", va="center", style="italic",
        )  # fmt: skip
        return
    shown = side.values[(side.values >= low) & (side.values <= high)]
    if len(shown) >= FEW and np.ptp(shown) > 0:
        grid, width = density(shown, log)
        axes.fill_betweenx(grid, x, x + sign * HALF * width, color=colour, alpha=0.45, lw=0)
        outline = np.concatenate([[0.0], width, [0.0]])
        axes.plot(x + sign * HALF * outline, grid[[0, *range(len(grid)), -1]], color=colour, lw=1.2)
    if len(shown) <= 300:
        jitter = np.random.default_rng(0).uniform(0.015, 0.09, len(shown))
        axes.scatter(x + sign * jitter, shown, s=7, color=colour, alpha=0.55, lw=0, zorder=3)
    median = float(np.median(side.values))
    axes.plot([x, x + sign * HALF], [median, median], color=INK, lw=2, solid_capstyle="butt", zorder=4)
    axes.annotate(
        f"{number(median, 's')}", (x + sign * (HALF + 0.02), median), fontsize=9.5, fontweight="bold", color=INK,
        ha="left" if sign > 0 else "right", va="center", zorder=5,
    )  # fmt: skip
    for beyond, worst, y, va in (
        (side.values > high, side.values.max(), 0.995, "top"),
        (side.values < low, side.values.min(), 0.005, "bottom"),
    ):
        if beyond.any():
            word, arrow = ("up to", "▲") if va == "top" else ("down to", "▼")
            axes.text(
                x + sign * 0.06, y, f"{arrow} {int(beyond.sum()):,} beyond,\n{word} {number(float(worst), 's')}",
                transform=axes.get_xaxis_transform(), fontsize=8, color=colour,
                ha="left" if sign > 0 else "right", va=va,
            )  # fmt: skip


def limits(groups: Sequence[Floats]) -> tuple[float, float, bool]:
    """(low, high, logarithmic) of an axis that shows nearly all of every group: a long tail is cut at TAIL."""
    groups = [group for group in groups if len(group)]
    tail = max(float(np.percentile(group, TAIL)) for group in groups)
    top = max(float(group.max()) for group in groups)
    high = tail if top > 1.5 * tail else top
    positive = [group[group > 0] for group in groups if (group > 0).any()]
    floor = min((float(np.percentile(group, 100 - TAIL)) for group in positive), default=0.0)
    if floor > 0 and high / floor > LOG_SPREAD:
        return floor / 1.3, (tail if top > 10 * tail else top) * 1.3, True
    low = min(float(group.min()) for group in groups)
    if low < 0.5 * high or low == high:
        return 0.0, high * 1.06 or 1.0, False
    margin = 0.08 * (high - low)
    return low - margin, high + margin, False


def density(values: Floats, log: bool) -> tuple[Floats, Floats]:
    """(grid, width in 0..1) of a kernel density (Scott's bandwidth), on the logarithm where the axis is logarithmic."""
    if len(values) > MANY:
        values = np.quantile(values, np.linspace(0, 1, MANY))
    scaled = np.log10(values) if log else values
    grid = np.linspace(scaled.min(), scaled.max(), 200)
    width = np.asarray(GaussianKDE(scaled).evaluate(grid))
    return (10**grid if log else grid), width / width.max()


def _over_time(axes: Axes, panel: TimePanel) -> None:
    factor, unit = {"s": (1e3, "ms"), "share": (1e2, "%")}.get(panel.unit, (1.0, panel.unit))
    for line in panel.lines:
        label, values = (line.label if line.named else None), line.values * factor
        look = ":" if line.dashed else "-"
        if line.look == "area":
            axes.fill_between(line.at, values, step="post", color=QUIET, alpha=0.18, lw=0, label=label)
        elif line.look == "steps":
            axes.stairs(values, line.at, color=_SIDES[line.side], lw=1.6, label=label, baseline=None)
        else:
            alone = line.look == "points"
            axes.plot(
                line.at, values, color=_SIDES[line.side], ls="none" if alone else look, lw=1.6, label=label,
                marker="o" if alone else "", ms=4.5, mfc="none" if line.dashed else _SIDES[line.side],
            )  # fmt: skip
    axes.set_ylabel(unit if unit in panel.title else f"{panel.title.split(',')[0]} ({unit})")
    axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=panel.whole))
    axes.grid(color="#000000", alpha=0.12, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def printable(text: str) -> str:
    """Without control characters and matplotlib's own mark-up, which a ``$`` in a name would start."""
    return plain(text).replace("$", r"\$")
