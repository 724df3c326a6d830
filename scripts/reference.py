"""Writes docs/reference from the code: what each key, option, column, figure, reason and error is, told once.

    python scripts/reference.py            write the pages
    python scripts/reference.py --check    say which of them are not as the code is; exit code 1 if any

Meanings are read where the code has them: comments beside the fields of a struct, docstrings of metrics and of verdict
rules, help texts of options and of Prometheus families, twoclocks/meanings.py for names that have no such place.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import msgspec
from code_reading import (
    EXAMPLE,
    ROOT,
    comments_of,
    default_words,
    error_classes,
    figures,
    locust_options,
    messages,
    options,
    type_words,
    verdict_reasons,
)

from twoclocks import (
    cli,
    clocks,
    experiment,
    families,
    gate,
    intervals,
    meanings,
    metrics,
    record,
    samples,
    schedule_server,
    spread,
)
from twoclocks import server_requests as rows
from twoclocks.breakdown import cut_up
from twoclocks.load import load_run
from twoclocks.totals import Totals

FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- Made by scripts/reference.py from the code. Change the meaning there, then run it again. -->"
UNITS = {"_s": "s", "_ms": "ms", "_at": "s", "_us": "µs", "_mb": "MB"}


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a page is not as it would be"
    )
    checks = parser.parse_args().check
    made = pages()
    stale = [name for name, text in made.items() if _read(FOLDER / name) != text]
    stale += [path.name for path in FOLDER.glob("*.md") if path.name not in made]
    if checks:
        for name in sorted(stale):
            print(f"docs/reference/{name} is not as the code is; run: python scripts/reference.py")
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        if name in made:
            (FOLDER / name).write_text(made[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
        print(f"docs/reference/{name}")
    return 0


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    made = {
        "experiment.md": experiment_page(),
        "commands.md": "",
        "run-folder.md": run_folder_page(),
        "summary.md": summary_page(),
        "verdict.md": verdict_page(),
        "server-clocks.md": server_clocks_page(),
        "prometheus.md": prometheus_page(),
        "errors.md": errors_page(),
    }
    made["commands.md"] = commands_page()  # last, since it imports Locust, which changes the standard library
    return {name: f"{MADE}\n{text.rstrip()}\n" for name, text in made.items()}


# pages


def experiment_page() -> str:
    """Every key of an experiment file."""
    lines = [
        "# Experiment files",
        "",
        "Every key, with its type and default. An unknown key is an error; `--set KEY=VALUE` changes one, with dots",
        "between the names. `${NAME}` and `${NAME:-default}` in values are filled from the environment. What ends in",
        "`_s` is in seconds, in `_ms` in milliseconds.",
    ]
    for struct, prefix, said in _structs(experiment.Experiment):
        lines += ["", f"## {f'`{prefix.rstrip(chr(46))}`' if prefix else 'At the top'}", ""]
        lines += [said, ""] if said else []
        comments = comments_of(experiment, struct)
        cells = []
        for field in msgspec.structs.fields(struct):
            name = f"{prefix}{field.encode_name}"
            inner = experiment._structs_in(field.type)
            below = f": [below](#{_anchor(_path(name, field.type))})" if inner else ""
            meaning = re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), comments[field.name])
            cells.append(
                [f"`{name}`", type_words(field.type) + below, default_words(field), _unit(field.encode_name), meaning]
            )
        lines += table(["key", "type", "default", "unit", "meaning"], cells)
    return "\n".join(lines)


def run_folder_page() -> str:
    """Files, and the columns of those that the project writes."""
    lines = [
        "# The run folder",
        "",
        "What a run leaves. The raw files are appended as things happen, so that a run that is",
    ]
    lines += [
        "killed keeps all that had arrived; the report's are built from them, again by `twoclocks report RUN`.",
        "",
    ]
    lines += table(["file", "what it holds"], [[f"`{name}`", said] for name, said in meanings.FILES.items()])
    lines += ["", "## `run.json`", ""]
    lines += table(["key", "what it holds"], [[f"`{name}`", said] for name, said in meanings.RUN_JSON.items()])
    for name, module, struct, said in (
        ("requests.jsonl", record, record.Record, "A line a request. Times are seconds on the run's clock."),
        (
            "server_requests.jsonl",
            rows,
            rows.ServerRequest,
            "A line for each span or log line that tells of a request.",
        ),
        ("self_samples.jsonl", _source("selfwatch"), "SelfSample", "A line a second of each process that sends load."),
    ):
        lines += ["", f"## `{name}`", "", said, ""]
        lines += table(["column", "type", "unit", "meaning"], _columns(module, struct))
    lines += [
        "",
        "`chunk_kinds` are of: " + ", ".join(f"`{kind}`" for kind in record.KINDS) + ". Tokens are in chunks of",
    ]
    lines += ["kind " + ", ".join(f"`{kind}`" for kind in record.TOKEN_KINDS) + " alone.", "", "## `error_kind`", ""]
    lines += ["What to do about each: [troubleshooting](../troubleshooting.md#requests-that-failed).", ""]
    lines += table(["error_kind", "what happened"], [[f"`{k}`", said] for k, said in meanings.ERROR_KINDS.items()])
    lines += [
        "",
        "## In Python",
        "",
        '`twoclocks.load_run("output/A").requests` has the columns of requests.jsonl, and:',
        "",
    ]
    told = [[f"`{name}`", _meaning(said)] for name, said in meanings.REQUEST_TABLE.items()]
    told += [
        [f"`server_{name}`", "as the server told it, s: [server clocks](server-clocks.md)"] for name in clocks.METRICS
    ]
    lines += table(["column", "meaning"], told)
    return "\n".join(lines)


def summary_page() -> str:
    """summary.json: its keys, and every figure with unit and definition."""
    lines = ["# summary.json", "", "Seconds inside; what is not known is null.", ""]
    lines += table(["key", "what it holds"], [[f"`{name}`", said] for name, said in meanings.SUMMARY.items()])
    lines += [
        "",
        "## Figures",
        "",
        "A figure with a distribution has n, mean, p50, p95, p99, min and max; any other a value.",
        "",
    ]
    cells = []
    for name, (figure, when) in figures().items():
        kind = "distribution" if "p50" in figure else "value"
        said = figure["definition"].partition(" SLO: ")[0]
        cells.append([f"`{name}`", kind, figure["unit"], f"{said}{f' ({when})' if when else ''}"])
    lines += table(["figure", "kind", "unit", "definition"], cells)
    lines += ["", "## Intervals", "", spread.INTERVAL, "", "## Parts of the waterfall", ""]
    lines += ["Of a server that tells queue and prefill inside its answers (vLLM). What a server does not tell apart"]
    lines += ["stays in one bar.", ""]
    (cut, *_), _ = cut_up(load_run(EXAMPLE))
    lines += table(["part", "definition"], [[bar.label, bar.definition] for bar in cut.bars])
    return "\n".join(lines)


def verdict_page() -> str:
    """Every reason that a verdict may have."""
    lines = ["# Verdict reasons", ""]
    lines += [
        "A run is VALID, SUSPECT (look before you quote its figures) or INVALID (they do not measure what they claim:"
    ]
    lines += [
        "exit code 4). What to do about each, at more length: [troubleshooting](../troubleshooting.md#the-verdict).",
        "",
    ]
    cells = [[f"`{one.name}`", " or ".join(one.levels), one.why, one.remedy] for one in verdict_reasons()]
    lines += table(["reason", "level", "why", "remedy"], cells)
    return "\n".join(lines)


def server_clocks_page() -> str:
    """What each server tells of a request."""
    lines = [
        "# Server clocks",
        "",
        "What each server's own figure of a request measures, by the way in which it is told: `in-band`, inside the",
    ]
    lines += ["response; `otlp`, in spans; `log`, in log lines. All in seconds."]
    for (source, server), told in clocks.CLOCKS.items():
        lines += ["", f"## {server}, {source}", ""]
        cells = [[f"`{name}`", one.start, one.stop, one.note, one.differs] for name, one in told.items()]
        lines += table(["duration", "starts", "stops", "note", "beside the client's"], cells)
    lines += ["", "## What a server does not tell unless asked", ""]
    cells = [
        [server, one.what, f"start it with {one.remedy}" if one.remedy else "no way to learn it"]
        for server, silent in clocks.SILENCES.items()
        for one in silent
    ]
    return "\n".join([*lines, *table(["server", "not told", "remedy"], cells)])


def prometheus_page() -> str:
    """Every family that a run exports."""
    totals = Totals({"ttft": 0.5}, is_open=True)
    totals.counts["cached_tokens"] = 0
    lines = [
        "# Prometheus",
        "",
        "With `export.prometheus_port` a run is scraped while it goes on. Counters have `_total` behind their name,",
    ]
    lines += ["histograms `_bucket`, `_sum` and `_count`.", ""]
    cells = []
    for family in families.families(
        totals,
        {"run": "", "experiment": "", "target": "", "server": "", "model": "", "server_version": ""},
        ended=False,
    ):
        names = {label for sample in family.samples for label in sample.labels if label != "le"}
        labels = sorted(names) or list(getattr(family, "_labelnames", ()))
        said = family.documentation.partition(" SLO: ")[0]
        cells.append([f"`{family.name}`", family.type, ", ".join(f"`{label}`" for label in labels), said])
    return "\n".join([*lines, *table(["family", "type", "labels", "meaning"], cells)])


def commands_page() -> str:
    """Every command with its options, and exit codes."""
    lines = ["# Commands", "", "## Exit codes", ""]
    lines += table(["code", "when"], [[f"`{code}`", said] for code, said in meanings.EXIT_CODES.items()])
    parser = cli._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        lines += ["", f"## `twoclocks {name}`", "", *_command(command)]
        lines += _gates() if name == "compare" else []
    lines += ["", "## `locust -f load_test.py`", ""]
    lines += ["Locust's own options are in its `--help`; these are added to them.", "", *_options(locust_options())]
    lines += ["", "## `python -m twoclocks.schedule_server`", "", *_command(schedule_server._parser())]
    lines += [
        "",
        "## Converters",
        "",
        "The scripts in [requests](../../requests/README.md) make request files; each has `--help`.",
    ]
    return "\n".join(lines)


def errors_page() -> str:
    """Every one-line error of the code."""
    lines = [
        "# Error messages",
        "",
        "Each is one line that says what was wrong, where, and how to go on; `...` stands for what differs. With",
    ]
    lines += ["`--debug` a command shows the traceback too.", ""]
    lines += table(["class", "exit code", "what it is"], error_classes())
    for name, found in messages().items():
        lines += ["", f"## {name}", ""]
        lines += [f"- {message}" for message in found]
    return "\n".join(lines)


def table(heads: list[str], cells: list[list[str]]) -> list[str]:
    """Rows of a markdown table."""
    shown = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in shown)]


def _structs(struct: type, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """(struct, prefix of its keys, its docstring) of an experiment, depth first."""
    own = struct.__dict__.get("__doc__") or ""
    yield struct, prefix, "" if own.startswith(f"{struct.__name__}(") else inspect.cleandoc(own)
    for field in msgspec.structs.fields(struct):
        for inner in experiment._structs_in(field.type):
            yield from _structs(inner, _path(f"{prefix}{field.encode_name}", field.type))


def _path(name: str, kind: Any) -> str:
    return f"{name}[]." if get_origin(kind) is list else f"{name}."


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _columns(module: ModuleType | Path, struct: type | str) -> list[list[str]]:
    if isinstance(struct, str):  # of a module that is not imported, since it imports gevent
        tree = ast.parse(module.read_text(encoding="utf-8"))
        (node,) = (one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == struct)
        plain = {"float": float, "int": int, "str": str, "list[float]": list[float]}
        fields = [
            (one.target.id, plain[ast.unparse(one.annotation)]) for one in node.body if isinstance(one, ast.AnnAssign)
        ]
    else:
        fields = [(field.encode_name, field.type) for field in msgspec.structs.fields(struct)]
    said = comments_of(module, struct)
    of_server = "as the server has it: [server clocks](server-clocks.md)"
    cells = []
    for name, kind in fields:
        duration = name in clocks.METRICS
        meaning = said[name] or (of_server if duration else "")
        cells.append([f"`{name}`", type_words(kind), "s" if duration else _unit(name), _json_words(meaning)])
    return cells


def _json_words(text: str) -> str:
    """What the code calls None is null in a file."""
    return re.sub(r"\bNone\b", "null", text)


def _source(module: str) -> Path:
    return ROOT / "twoclocks" / f"{module}.py"


def _unit(name: str) -> str:
    if name == "at":
        return "s"
    if name in ("share", "stable"):
        return ""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "")


def _meaning(said: str) -> str:
    module, _, name = said.partition("metrics.")
    return said if module or not name else metrics.definition(getattr(metrics, name))


def _command(parser: argparse.ArgumentParser) -> list[str]:
    said = [parser.description or "", "", *_options(options(parser)), "", *(parser.epilog or "").split("\n")]
    return [line % {"prog": parser.prog} if "%(prog)s" in line else line for line in said]


def _options(found: list[tuple[str, str]]) -> list[str]:
    return table(["option", "meaning"], [[f"`{name}`", said] for name, said in found])


def _gates() -> list[str]:
    """What may stand in a --gate."""
    rows = [[f"`{metric}`", gate.unit_of(metric)] for metric in samples.METRICS]
    statistics = ", ".join(f"`{name}`" for name in intervals.STATISTICS)
    form = "`METRIC.STATISTIC <= LIMIT` or `>=`. A limit with a sign is against the first run."
    said = [f"{form} Statistics, of metrics in s: {statistics}."]
    return ["", "### Gates", "", gate.DEFINITION, "", *said, "", *table(["metric", "unit"], rows)]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
