"""Study report: the folder of a study -> its summary.json, report.html, report.md, summary.txt and plots.

Each cell keeps the report of its own; here they stand side by side, beside what others published.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from twoclocks import __version__, report, study_plot, study_tables, study_text
from twoclocks.errors import RunFolderError
from twoclocks.experiment import Claim
from twoclocks.plots import Shown, violins
from twoclocks.run_folder import refuse_links
from twoclocks.settings_yaml import load_yaml
from twoclocks.study import Cell, Study, read_study
from twoclocks.study_arms import Arm, pooled, read_arms
from twoclocks.study_figures import Figure, figures
from twoclocks.study_findings import answers, claims, differences, two_clocks
from twoclocks.study_series import DRIFT, by_order, drift, lines, memory_bars, sharing
from twoclocks.summary import clean

PLOTS = Path("plots")
INTERVALS = (
    "In brackets: 95 % intervals, of the requests of all repeats pooled (of a throughput: of parts of the measuring "
    "windows, none shorter than a request; in batches: of whole batches). With three repeats or more, what the repeats "
    "scatter is in them; with fewer, they tell how far chance among these requests reaches, and nothing of another "
    "run. No brackets: too few values, or a figure that a run has only once."
)
CLOCKS_WORDS = (
    "Of the same requests, one by one, where the server tells of single requests; else its /metrics tell a mean over "
    "the scraped window. What a server does not tell is “not told”."
)


@dataclass(frozen=True)
class Built:
    """What was written."""

    summary: dict[str, Any]
    html: Path
    text: Path  # markdown
    exit_code: int  # 0; 1: a cell failed; 4: a cell is INVALID


def build(folder: Path, progress: Callable[[str], None] = lambda _: None) -> Built:
    """The report of a study and of each of its cells. Raises RunFolderError."""
    study, experiment = read_study(folder), _experiment(folder)
    arms, unreadable = read_arms(folder, study, progress)
    progress("computing the figures of the study")
    pools = [pooled(arm) for arm in arms]
    of_arms = [figures(arm, pool) for arm, pool in zip(arms, pools, strict=True)]
    cells = [_cell(cell, arms, unreadable) for cell in study.cells]
    summary: dict[str, Any] = {
        "twoclocks_version": __version__,
        "kind": "study",
        "name": study.name,
        "status": study.status,
        "started_at_unix": study.started_at_unix,
        "date": _date(study.started_at_unix),
        "machine": machine(arms),
        "skipped": [{"target": one.target, "why": one.why} for one in study.skipped],
        "cells": cells,
        "partial": partial(study, cells),
        "verdicts": verdicts(cells),
        "claims": claims(_claims(experiment, folder), arms, pools, of_arms, study),
        "interval_definition": INTERVALS,
        "clocks_words": CLOCKS_WORDS,
        "arms": [
            _arm(arm, of) | {"clocks": two_clocks(arm, pool) if arm.runs else []}
            for arm, pool, of in zip(arms, pools, of_arms, strict=True)
            if arm.cells
        ],
        "differences": differences(arms, pools, of_arms),
        "drift": drift(arms, of_arms),
        "followed": {
            name: next((of[name].label, of[name].unit) for of in of_arms if name in of)
            for name in DRIFT
            if any(name in of for of in of_arms)
        },
        "repeated": any(len(arm.cells) > 1 for arm in arms),
        "order_words": order_words(study, arms),
        "lines": lines(arms, of_arms),
        "memory": memory_bars(arms, of_arms),
        "sharing": sharing(arms, of_arms),
        "answers": answers(arms, pools),
    }
    summary = clean(summary)
    try:
        refuse_links(folder)
        (folder / PLOTS).mkdir(exist_ok=True)
        report.write_json(folder / "summary.json", summary)
        (folder / "summary.txt").write_text(study_text.terminal_text(summary), encoding="utf-8")
        text = folder / "report.md"
        text.write_text(study_text.markdown(summary), encoding="utf-8")
        progress("drawing the plots of the study")
        shown = [pool for arm, pool in zip(arms, pools, strict=True) if arm.runs]
        pictures = _draw(folder, summary, shown)
        html = folder / "report.html"
        values = study_text.page_values(summary) | {"pictures": pictures, "experiment": _text(folder)}
        html.write_text(report.page("study.html", **values), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return Built(summary, html, text, exit_code(cells))


def machine(arms: Sequence[Arm]) -> str:
    """On what was measured, as the runs recorded it, as a sentence."""
    hosts = dict.fromkeys(
        f"{host.get('cpu_count')} x CPU ({host.get('cpu_model') or host.get('platform')})"
        for arm in arms
        for meta in arm.metas
        if (host := meta.get("host") or {}).get("cpu_count")
    )
    gpus = dict.fromkeys(
        str(gpu["name"]) for arm in arms for one in arm.summaries for gpu in one.get("gpu") or [] if gpu["gpu"] != "all"
    )
    if not hosts:
        return "The runs do not say on which machine they were measured."
    on = " and ".join(hosts)
    return f"Measured on {on}, {', '.join(gpus) if gpus else 'no GPU seen'}; the machine is that of the load generator."


def order_words(study: Study, arms: Sequence[Arm]) -> str:
    """In which order the targets were run, and whether a drift of the machine could be seen."""
    words = f"Order: {study.order}. Run one after the other: {by_order(arms) or 'nothing'}."
    if any(len(arm.cells) > 1 for arm in arms):
        return words
    return f"{words} Each was run once, so that a drift of the machine cannot be told from a difference."


def partial(study: Study, cells: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing from a study, a sentence each."""
    told = []
    lost = [cell for cell in cells if cell["status"] != "finished" or cell["error"]]
    if study.status != "finished" or lost:
        good = len(cells) - len(lost)
        told.append(f"The study is {study.status}: {good} of {len(cells)} cells have figures.")
    told += [f"{cell['folder']}: {cell['status']}{': ' if cell['error'] else ''}{cell['error'] or ''}" for cell in lost]
    return told + [f"{one.target} was skipped: {one.why}" for one in study.skipped]


def verdicts(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each reason once, the gravest first, with the cells that it was seen in: level, name, texts, remedy, cells."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        for reason in cell["reasons"]:
            row = found.setdefault(
                (reason["level"], reason["name"]),
                {"level": reason["level"], "name": reason["name"], "remedy": reason["remedy"], "seen": {}},
            )
            row["seen"].setdefault(reason["reason"], []).append(cell["folder"])
    return sorted(found.values(), key=lambda row: row["level"])


def exit_code(cells: Sequence[dict[str, Any]]) -> int:
    """0; 1 if a cell failed; 4 if one is INVALID."""
    if any(cell["verdict"] == "INVALID" for cell in cells):
        return 4
    return 1 if any(cell["status"] == "failed" or cell["error"] for cell in cells) else 0


def _cell(cell: Cell, arms: Sequence[Arm], unreadable: dict[int, str]) -> dict[str, Any]:
    """What became of a cell."""
    keys = ("number", "target", "variant", "repeat", "folder", "status", "exit_code", "error")
    row = {key: getattr(cell, key) for key in keys} | {"verdict": None, "reasons": []}
    row["error"] = unreadable.get(cell.number) or cell.error
    for arm in arms:
        if cell in arm.cells:
            place = arm.cells.index(cell)
            if arm.sweeps:
                told = [level for level in arm.sweeps[place]["levels"] if level.get("verdict")]
                row["verdict"] = next((of for of in LEVELS if any(of == one["verdict"] for one in told)), None)
                row["reasons"] = [
                    {"level": level["verdict"], "name": text, "reason": f"level {level['value']:g}: {text}"} | NO_REMEDY
                    for level in told
                    for text in level["reasons"]
                ]
            else:
                judged = arm.summaries[place]["verdict"]
                row |= {"verdict": judged["level"], "reasons": judged["reasons"]}
    return row


LEVELS = ("INVALID", "SUSPECT", "VALID")
NO_REMEDY = {"remedy": ""}  # it stands in the report of the sweep


def _arm(arm: Arm, of: dict[str, Figure]) -> dict[str, Any]:
    """An arm as summary.json holds it."""
    targets = [meta.get("target") or {} for meta in arm.metas]
    said = {
        key: ", ".join(dict.fromkeys(str(one[key]) for one in targets if one.get(key)))
        for key in ("server", "server_version", "model")
    }
    load = arm.experiment.get("load") or {}
    shape = f"{load.get('shape')}" if load else "sweep" if arm.sweeps else ""
    sizes = {"ramp": ("users",), "rate": ("rate",), "batch": ("batch", "batches")}.get(shape, ())
    return {
        "target": arm.target, "variant": arm.variant, "name": arm.name, "cells": len(arm.cells),
        "server": " ".join(filter(None, (said["server"], said["server_version"]))), "model": said["model"],
        "load": ", ".join([shape, *(f"{load[key]} {key}" for key in sizes if key in load)]),
        "figures": {name: figure.told() for name, figure in of.items()},
    }  # fmt: skip


def _draw(folder: Path, summary: dict[str, Any], shown: Sequence[Shown]) -> dict[str, list[dict[str, str]]]:
    """The plots that there is something for, as the page shows them: section -> image, alt, caption of each."""
    made: dict[str, list[dict[str, str]]] = {}

    def add(section: str, name: str, alt: str, caption: str) -> None:
        image = report.picture(folder / PLOTS / name)
        made.setdefault(section, []).append({"image": image, "alt": alt, "caption": caption})

    if shown:
        violins(shown, folder / report.VIOLIN, summary["name"])
        caption = "Left halves: what the client measured. Right halves: what the server said of the same requests."
        add(study_tables.VIOLINS, report.VIOLIN.name, "Violins of client and server latencies, side by side", caption)
    if summary["lines"]:
        study_plot.curves_plot(summary["lines"], folder / PLOTS / "study_curves.png")
        caption = "Each point is a run; shaded: the saturation point and its interval."
        add(study_tables.LOAD, "study_curves.png", "Throughput and latency over load", caption)
    if summary["memory"]:
        study_plot.memory_plot(summary["memory"], folder / PLOTS / "memory.png")
        add(
            study_tables.MEMORY,
            "memory.png",
            "Weights, KV cache reserved, KV cache used",
            "The largest of the repeats.",
        )
    if summary["sharing"]:
        study_plot.sharing_plot(summary["sharing"], folder / PLOTS / "kv_sharing.png")
        caption = "Dotted: what one sequence alone uses, times as many; worked out, not measured."
        add(study_tables.MEMORY, "kv_sharing.png", "KV cache used over sequences at once", caption)
    if summary["repeated"]:
        study_plot.drift_plot(summary["drift"], summary["followed"], folder / PLOTS / "drift.png")
        caption = "Where time had decided, all would rise or fall together."
        add(study_tables.DRIFT, "drift.png", "Each cell's own figures in order of time", caption)
    return made


def _experiment(folder: Path) -> dict[str, Any]:
    try:
        raw = load_yaml(_text(folder))
    except yaml.YAMLError as error:
        raise RunFolderError(f"{folder / 'experiment.yaml'}: cannot be read: {' '.join(str(error).split())}") from None
    return raw if isinstance(raw, dict) else {}


def _claims(experiment: dict[str, Any], folder: Path) -> list[Claim]:
    try:
        return msgspec.convert(experiment.get("claims") or [], list[Claim])
    except msgspec.ValidationError as error:
        raise RunFolderError(f"{folder / 'experiment.yaml'}: claims: {error}") from None


def _text(folder: Path) -> str:
    """experiment.yaml as it stands; nothing where there is none."""
    path = folder / "experiment.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None


def _date(unix: float) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") if unix else ""
