"""Histogram plot: the histograms of a run's server -> server_histograms.png. Milliseconds shown.

In each panel the server's buckets, and the client's values of the same window counted into the same buckets.
"""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from twoclocks import buckets, scraped
from twoclocks.buckets import Distribution, Reason, StepDensity
from twoclocks.load import Run
from twoclocks.metrics import Floats
from twoclocks.plots import CLIENT, INK, LOG_SPREAD, QUIET, SERVER, TAIL, printable
from twoclocks.units import edge, number


def server_histograms(run: Run, path: Path) -> bool:
    """Each histogram of the server's /metrics beside the client's values of the same window, as a PNG.

    As two step densities on the server's own buckets where these have a shape; else means and percentile intervals.
    Draws nothing, and returns False, where the server told none.
    """
    told = scraped.told(run)
    if not told:
        return False
    columns = min(2, len(told))
    rows = -(-len(told) // columns)
    width, height = (15.0 if columns > 1 else 10.0), 4.2 * rows
    engine = ConstrainedLayoutEngine(hspace=0.08, wspace=0.05)
    figure = Figure(figsize=(width, height + 0.8), dpi=110, layout=engine)
    (head,), (body,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(0.8, height))
    title = textwrap.shorten(f"{run.name}: what the server's /metrics say of the window", int(9 * width))
    head.text(0.01, 0.94, printable(title), fontsize=14, fontweight="bold", va="top")
    handles = [
        Patch(facecolor=SERVER, edgecolor=SERVER, alpha=0.45),
        Line2D([], [], color=SERVER, marker="D", lw=0, ms=7),
        Line2D([], [], color=CLIENT, lw=1.8),
        Line2D([], [], color=CLIENT, marker="o", lw=0, ms=7),
    ]
    labels = [
        "server: share of a bucket, or the bucket of a percentile (line: estimate)",
        "server's mean, exact",
        "client, counted into the same buckets",
        "client's mean, or its value of the same rank",
    ]
    head.legend(handles, labels, loc="lower left", ncols=2, frameon=False, fontsize=10)
    on_client = scraped.client_values(run)
    panels = body.subplots(rows, columns, squeeze=False).flat
    for axes, (_, name, gained) in zip(panels, told, strict=False):
        values, meaning = scraped.beside(gained, on_client)
        _histogram(axes, name, gained, values, meaning, footnote_width=int(16 * width / columns))
    for axes in list(panels)[len(told) :]:
        axes.set_visible(False)
    figure.savefig(path)
    return True


def _histogram(axes: Axes, name: str, gained: Distribution, values: Floats, meaning: str, footnote_width: int) -> None:
    """One panel: its shape if it has one, else its mean and percentiles; and its definition, with n."""
    shape = buckets.step_density(gained)
    since = ", since the server's restart" if gained.since_restart else ""
    axes.set_title(f"{name}{since}", loc="left", fontsize=12, fontweight="bold")
    notes = [f"Server, n = {gained.count:,.0f}: {gained.definition} ({', '.join(gained.names)})."]
    notes.append(f"Client, n = {len(values):,}: {meaning}" if len(values) else f"Client: {meaning}.")
    if isinstance(shape, Reason):
        _intervals(axes, gained, values)
        notes.append(f"No shape drawn: {shape.text}.")
    else:
        client = buckets.as_density(buckets.binned(values, gained.bounds), gained.bounds)
        _shapes(axes, shape, client if len(values) else None)
        _means(axes, gained, values)
        notes.append(f"From histogram buckets, {np.count_nonzero(gained.counts)} of them occupied.")
    notes += [f"{caveat[0].upper()}{caveat[1:]}." for caveat in gained.caveats]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: edge(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#000000", alpha=0.12, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    unit = "ms, logarithmic" if axes.get_xscale() == "log" else "ms"
    wrapped = "\n".join(textwrap.fill(printable(note), footnote_width, subsequent_indent="   ") for note in notes)
    axes.set_xlabel(unit, fontsize=10, labelpad=2)
    axes.annotate(
        wrapped, (0, 0), xytext=(0, -34), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
        color=QUIET, va="top",
    )  # fmt: skip


def _shapes(axes: Axes, server: StepDensity, client: StepDensity | None) -> None:
    """Two step curves on one axis. An area is a share; on a logarithmic axis a share per decade."""
    both = [server, *([client] if client else [])]
    reach = np.flatnonzero(np.any([shape.shares > 0 for shape in both], axis=0))
    enough = max(int(np.searchsorted(np.cumsum(shape.shares), TAIL / 100 * (1 - shape.beyond))) for shape in both)
    first, last = int(reach[0]), min(int(reach[-1]), enough)
    edges = server.edges[first : last + 2]
    log = edges[0] > 0 and edges[-1] / edges[0] > LOG_SPREAD
    widths = np.diff(np.log10(edges)) if log else np.diff(edges) * 1e3
    if log:
        axes.set_xscale("log")
    heights = [shape.shares[first : last + 1] / widths * 100 for shape in both]
    axes.stairs(heights[0], edges, color=SERVER, fill=True, alpha=0.3, lw=0)
    axes.stairs(heights[0], edges, color=SERVER, lw=1.6)
    if client:
        axes.stairs(heights[1], edges, color=CLIENT, lw=1.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.18 * max(float(height.max()) for height in heights))
    axes.set_ylabel("% per decade" if log else "% per ms", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    beyond = [float(shape.shares[last + 1 :].sum()) + shape.beyond for shape in both]
    if any(beyond):
        words = [
            f"{who} {number(share, 'share')}" for who, share in zip(("server", "client"), beyond, strict=False) if share
        ]
        axes.text(
            0.995, 0.86, f"beyond {edge(float(edges[-1]))} ms ▶\n{', '.join(words)}", transform=axes.transAxes,
            fontsize=8, color=QUIET, ha="right", va="top",
        )  # fmt: skip


def _means(axes: Axes, gained: Distribution, values: Floats) -> None:
    """Both means at the top of a panel of shapes, each on a line of its own, their texts in the wider half."""
    height, (start, end) = axes.get_ylim()[1], axes.get_xlim()
    told = [
        ("server", gained.mean, SERVER, "D"),
        ("client", float(values.mean()) if len(values) else None, CLIENT, "o"),
    ]
    known = [(mean, who, colour, mark) for who, mean, colour, mark in told if mean is not None]
    shown = sorted(each for each in known if start <= each[0] <= end)
    if not shown:
        return
    place_of_first = axes.transLimits.transform(axes.transScale.transform((shown[0][0], 0.0)))[0]
    leftwards = bool(place_of_first > 0.5)
    # the text that leads over the other mean stands above that one's line
    for row, (mean, who, colour, mark) in enumerate(reversed(shown) if leftwards else shown):
        top = (0.95, 0.86)[row] * height
        axes.plot([mean, mean], [0, top], color=colour, lw=1.1, ls=(0, (4, 3)), zorder=3)
        axes.plot(mean, top, mark, color=colour, ms=6, zorder=4)
        axes.annotate(
            f"{who} mean {number(mean, 's')}", (mean, top), xytext=(-8 if leftwards else 8, 0),
            textcoords="offset points", fontsize=9, fontweight="bold", color=INK,
            ha="right" if leftwards else "left", va="center",
        )  # fmt: skip


def _intervals(axes: Axes, gained: Distribution, values: Floats) -> None:
    """The mean, and for each percentile the bucket in which the server's lies, with the client's own beside it."""
    intervals = {p: gained.percentile(p / 100) for p in scraped.PERCENTILES}
    names = ["mean", *(f"p{p}" for p, interval in intervals.items() if interval)]
    # the value of the same rank as the server's bucket: interpolated between two, it could lie beside that bucket
    ranks = np.percentile(values, scraped.PERCENTILES, method="inverted_cdf") if len(values) else np.array([])
    on_client = [float(values.mean()), *ranks.tolist()] if len(values) else []
    finite = [edge for one in intervals.values() if one for edge in (one.lower, one.upper) if np.isfinite(edge)]
    shown = [value for value in (gained.mean, *on_client[: len(names)], *finite) if np.isfinite(value)]
    right = 1.3 * max(shown, default=0.0)
    right = right if right > 0 else 1.0
    axes.set_xlim(0, right)
    for row, interval in enumerate((one for one in intervals.values() if one), 1):
        upper = min(interval.upper, right)
        axes.barh(row - 0.14, upper - interval.lower, left=interval.lower, height=0.26, color=SERVER, alpha=0.45, lw=0)
        if interval.estimate is not None:
            axes.plot([interval.estimate] * 2, [row - 0.27, row - 0.01], color=SERVER, lw=2)
        text = f"{edge(interval.lower)} .. {edge(interval.upper)}"
        text = text if np.isfinite(interval.upper) else f"> {edge(interval.lower)} ▶"
        axes.annotate(
            text, (min(upper, right), row - 0.14), xytext=(4 if upper < right else -4, 0), textcoords="offset points",
            fontsize=8.5, color=INK, va="center", ha="left" if upper < right else "right",
        )  # fmt: skip
    mean = gained.mean if np.isfinite(gained.mean) else 0.0  # a histogram without a sum has none: a dash stands there
    axes.plot(gained.mean, -0.14, "D", color=SERVER, ms=7, zorder=4)
    error = f" ± {number(gained.mean_error, 's')}" if gained.mean_error else ""
    axes.annotate(
        f"{number(gained.mean, 's')}{error}", (mean, -0.14), xytext=(8, 0), textcoords="offset points",
        fontsize=9, fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    for row, value in enumerate(on_client[: len(names)]):
        axes.plot(value, row + 0.17, "o", color=CLIENT, ms=6, zorder=4)
        axes.annotate(
            number(value, "s"), (value, row + 0.17), xytext=(7, 0), textcoords="offset points", fontsize=8.5,
            fontweight="bold" if row == 0 else "normal", color=INK, va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
