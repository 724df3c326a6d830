"""The plots of a study, from its rows: cells in order of time, curves over load, memory, KV cache over n.

Targets keep their colour in every plot (Okabe and Ito's palette, told apart by colour-blind readers too) and their
marker, which tells them apart without colour.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from twoclocks.plots import INK, QUIET, printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a7500")
MARKERS = "osD^vP*X"
GIB = 2.0**30
SHARED = {"sampling": ("one request of n choices", "-"), "beam search": ("one beam search of n", "-.")}


def drift_plot(rows: Sequence[dict[str, Any]], labels: dict[str, tuple[str, str]], path: Path) -> None:
    """Each figure that is followed, cell after cell. ``labels``: figure -> its label and unit."""
    names = [name for name in labels if sum(row["values"].get(name) is not None for row in rows) > 0]
    figure, panels = _canvas("Every cell in the order in which it was run", max(1, len(names)))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, name in zip(panels, names, strict=False):
        label, unit = labels[name]
        factor = 1e3 if unit == "s" else 1.0
        for target in targets:
            for variant in variants:
                mine = [
                    (place, row["values"][name] * factor) for place, row in enumerate(rows, 1)
                    if (row["target"], row["variant"]) == (target, variant) and row["values"].get(name) is not None
                ]  # fmt: skip
                if mine:
                    look = _look(targets.index(target)) | {"linestyle": _dash(variants.index(variant))}
                    axes.plot(*zip(*mine, strict=True), lw=1, label=_name(target, variant), **look)
        values = [value for row in rows if (value := row["values"].get(name)) is not None]
        if min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(LogFormatter(minor_thresholds=(1.5, 0.5)))
        else:
            axes.set_ylim(0, 1.15 * max(values) * factor or 1)
        _finish(axes, label, "cell, in order of time", "ms" if unit == "s" else unit)
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend(figure, panels)
    figure.savefig(path)


def curves_plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput over what was asked for, and latency over what was achieved; one line a target (and repeat)."""
    figure, (throughput, ttft, e2e) = _canvas("Over load", 3)
    targets = list(dict.fromkeys(line["target"] for line in lines))
    for line in lines:
        look = _look(targets.index(line["target"]))
        label = _name(line["target"], line["variant"])
        rows = [row for row in line["levels"] if row.get("achieved") is not None]
        told = [row for row in rows if row["tokens_per_s"] is not None]
        throughput.plot([row["value"] for row in told], [row["tokens_per_s"] for row in told], label=label, **look)
        if line["knee"]["reached"]:
            throughput.axvspan(line["knee"]["low"], line["knee"]["high"], color=look["color"], alpha=0.15, lw=0)
        for axes, key in ((ttft, "ttft_p50"), (e2e, "e2e_p50")):
            told = [row for row in rows if row.get(key) is not None]
            axes.plot([row["achieved"] for row in told], [row[key] * 1e3 for row in told], label=label, **look)
    unit = lines[0]["unit"] if lines else ""
    _finish(throughput, "Output throughput (shaded: saturation)", f"{unit} asked for", "tokens/s")
    _finish(ttft, "TTFT p50 over achieved rate", "requests/s that ended in the window", "ms")
    _finish(e2e, "E2E p50 over achieved rate", "requests/s that ended in the window", "ms")
    for axes in (throughput, ttft, e2e):
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    _legend(figure, [throughput, ttft, e2e])
    figure.savefig(path)


def memory_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Weights, KV cache reserved and KV cache used, side by side; what is not told has no bar and says so."""
    kinds = {
        "weights": "weights in memory", "weights_on_disk": "weights on disk", "kv_reserved": "KV cache reserved",
        "kv_used_peak": "KV cache used, peak",
    }  # fmt: skip
    kinds = {key: label for key, label in kinds.items() if any(row[key] is not None for row in rows)}
    step = 0.8 / len(kinds)
    figure = Figure(figsize=(11, 1.4 + 0.75 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for kind, (key, label) in enumerate(kinds.items()):
        places = [place + (kind - (len(kinds) - 1) / 2) * step for place in range(len(rows))]
        widths = [(row[key] or 0.0) / GIB for row in rows]
        bars = axes.barh(places, widths, height=0.92 * step, color=COLOURS[kind], label=label)
        texts = ["not told" if row[key] is None else _size(row[key]) for row in rows]
        axes.bar_label(bars, texts, padding=4, fontsize=9, color=QUIET)
    axes.set_yticks(range(len(rows)), [printable(textwrap.fill(row["name"], 30)) for row in rows])
    _finish(axes, "Memory", "GiB", "")
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.margins(x=0.18)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def sharing_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KV cache used at its peak over sequences at once; dotted: what one sequence uses, times as many.

    Of what the gauge was seen to miss (`study_series.sharing`) no point is drawn.
    """
    rows = [row for row in rows if not row["missed"]]
    figure, (axes,) = _canvas("KV cache used at its peak", 1)
    factor = {"bytes": 1 / 2.0**20, "share": 100.0}.get(rows[0]["unit"], 1.0)
    targets = list(dict.fromkeys(row["target"] for row in rows))
    for place, target in enumerate(targets):
        look = _look(place)
        of_target = [row for row in rows if row["target"] == target]
        alone = [row for row in of_target if row["sequences"] == 1]
        several = {how: [row for row in of_target if row["choices"] > 1 and row["how"] == how] for how in SHARED}
        apart = [row for row in of_target if row["choices"] == 1 and row["sequences"] > 1]
        for mine, words, dash in [
            *((several[how], text, dash) for how, (text, dash) in SHARED.items()),
            (apart, "n separate requests", "--"),
        ]:
            if mine:
                of_line = [*alone, *mine]
                style = look | {"linestyle": dash, "markerfacecolor": "white" if mine is apart else look["color"]}
                at, used = [row["sequences"] for row in of_line], [row["used"] * factor for row in of_line]
                axes.plot(at, used, label=_name(target, words), **style)
        if alone:
            most = max(row["sequences"] for row in rows)
            used = [alone[0]["used"] * factor * n for n in (1, most)]
            axes.plot([1, most], used, color=look["color"], ls=":", lw=1, label=_name(target, "one alone, times n"))
    _finish(axes, "", "sequences at once", "MiB" if rows[0]["unit"] == "bytes" else "% of the cache")
    axes.set_ylim(bottom=0)
    _legend(figure, [axes])
    figure.savefig(path)


def _canvas(title: str, panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(13 if panels > 1 else 9, 4.6), dpi=110, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, list(figure.subplots(1, panels, squeeze=False).flat)


def _look(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 6}


def _dash(place: int) -> Any:
    return ("-", "--", ":", "-.")[place % 4]


def _name(*parts: str) -> str:
    return printable(", ".join(textwrap.shorten(part, 30, placeholder=" ...") for part in parts if part))


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _finish(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(printable(title), loc="left", fontsize=10.5)
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for the whole figure, below it, of the lines of all panels."""
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 3 if len(panels) > 1 else 2  # a single panel is narrower
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
