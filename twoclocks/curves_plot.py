"""The curves of a sweep or search, from its summary: latency over achieved rate, throughput and goodput over levels."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twoclocks.plots import CLIENT, INK, QUIET, SERVER, printable


def curves_plot(summary: dict[str, Any], path: Path) -> None:
    """Four panels as a PNG; a panel without figures says so."""
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    figure.suptitle(
        printable(textwrap.shorten(summary["name"], 100)), x=0.01, ha="left", fontsize=14, fontweight="bold"
    )
    ((ttft, tpot), (tokens, good)) = figure.subplots(2, 2)
    rows = [row for row in summary["levels"] if row.get("achieved") is not None]
    _latency(ttft, rows, "ttft", "TTFT", summary["limits"])
    _latency(tpot, rows, "tpot", "TPOT", summary["limits"])
    _throughput(tokens, rows, summary)
    _goodput(good, rows, summary)
    for axes in (ttft, tpot, tokens, good):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=10)
        else:
            axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", color=QUIET)
    figure.savefig(path)


def _latency(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, limits: dict[str, float]) -> None:
    """In the order of the levels: past saturation the curve turns back, since more load gets no more through."""
    for percentile, colour, marker in (("p50", CLIENT, "o"), ("p95", SERVER, "s")):
        told = [row for row in rows if row[f"{name}_{percentile}"] is not None]
        at = [row["achieved"] for row in told]
        values = [row[f"{name}_{percentile}"] * 1e3 for row in told]
        if told:
            axes.plot(at, values, marker=marker, color=colour, label=percentile)
        if percentile == "p95":  # the upper of the two, whose markers cover no name
            room, named = max(at, default=0.0) / 15, -1.0  # levels past saturation lie over each other
            for row, x, y in zip(told, at, values, strict=True):
                if x - named < room and named >= 0:
                    continue
                named = x
                axes.annotate(
                    f"{row['value']:.3g}", (x, y), (0, 9), textcoords="offset points", fontsize=8, color=QUIET,
                    ha="center",
                )  # fmt: skip
    if name in limits and rows:
        axes.axhline(limits[name] * 1e3, color=INK, linestyle="--", linewidth=1, label="SLO")
    axes.set_title(f"{label} over achieved rate (small figures: the level)", loc="left", fontsize=11)
    axes.set_xlabel("requests/s that ended in the window")
    axes.set_ylabel(f"{label}, ms")


def _throughput(axes: Axes, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    told = [row for row in rows if row["tokens_per_s"] is not None]
    if told:
        at = [row["value"] for row in told]
        axes.plot(at, [row["tokens_per_s"] for row in told], marker="o", color=CLIENT, label="output tokens/s")
        point = summary["knee"]
        if point["reached"]:
            axes.axvspan(point["low"], point["high"], color=SERVER, alpha=0.2, label="saturation point, interval")
    axes.set_title(f"Output throughput over {summary['unit']}", loc="left", fontsize=11)
    axes.set_xlabel(f"{summary['unit']} asked for" if summary["over"] == "rate" else "users")
    axes.set_ylabel("tokens/s")


def _goodput(axes: Axes, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    at = [row["value"] for row in rows]
    if rows:
        axes.plot(at, [row["achieved"] for row in rows], marker="s", color=QUIET, label="ended ok in the window")
    told = [row for row in rows if row["goodput"] is not None]
    if told:
        values = [row["goodput"] for row in told]
        axes.plot([row["value"] for row in told], values, marker="o", color=CLIENT, label="within the SLO (goodput)")
    if rows and summary["over"] == "rate":
        axes.plot([0, max(at)], [0, max(at)], color=INK, linestyle=":", linewidth=1, label="all that was asked for")
    axes.set_title("Requests/s of each level", loc="left", fontsize=11)
    axes.set_xlabel(f"{summary['unit']} asked for" if summary["over"] == "rate" else "users")
    axes.set_ylabel("requests/s")
