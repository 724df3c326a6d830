"""Report: a run folder's raw files -> its summary.json, summary.txt, vllm_bench.json, plots/ and report.html."""

import base64
import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import msgspec

from twoclocks import headline, rosetta_text, terminal, units, wording
from twoclocks.breakdown import cut_up
from twoclocks.charts import charts
from twoclocks.errors import RunFolderError, plain
from twoclocks.histogram_plot import server_histograms
from twoclocks.load import Run, load_run
from twoclocks.plots import timeline, violins
from twoclocks.run_folder import refuse_links
from twoclocks.spread import INTERVAL, figure_intervals, spread
from twoclocks.stutter import stutter
from twoclocks.summary import clean, summarise
from twoclocks.vllm_bench import write_vllm_bench
from twoclocks.waterfall_plot import waterfall_plot
from twoclocks.worst import worst

VIOLIN = Path("plots") / "client_vs_server_violin.png"
TIMELINE = Path("plots") / "timeline.png"
WATERFALL = Path("plots") / "waterfall.png"
HISTOGRAMS = Path("plots") / "server_histograms.png"


@dataclass(frozen=True)
class Report:
    """What was written."""

    summary: dict[str, Any]
    html: Path
    violin: Path


def build(folder: str | Path, progress: Callable[[str], None] = lambda _: None) -> Report:
    """The report of a run, written into its folder. ``progress`` is told what is being done.

    Raises RunFolderError for a folder that is no run, or that cannot be written to.
    """
    progress(f"reading {folder}")
    run = load_run(folder)
    progress(f"computing the figures of {len(run.requests):,} requests")
    summary = complete(run)
    try:
        refuse_links(run.path)
        (run.path / "plots").mkdir(exist_ok=True)
        write_json(run.path / "summary.json", summary)
        write_vllm_bench(run, run.path / "vllm_bench.json")
        (run.path / "summary.txt").write_text(terminal.to_text(terminal.render(summary)), encoding="utf-8")
        progress("drawing the plots")
        violins([run], run.path / VIOLIN, heading(run))
        timeline(run, run.path / TIMELINE)
        waterfall_plot(*cut_up(run), run.path / WATERFALL, heading(run))
        has_histograms = server_histograms(run, run.path / HISTOGRAMS)
        html = run.path / "report.html"
        html.write_text(_html(run, summary, has_histograms), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{error.filename or run.path}: cannot be written: {error.strerror}") from None
    return Report(summary, html, run.path / VIOLIN)


def complete(run: Run) -> dict[str, Any]:
    """The summary, with what takes longer to compute and only reports show: intervals, the spread, the worst."""
    more = {
        "intervals": figure_intervals(run),
        "interval_definition": INTERVAL,
        "spread": spread(run),
        "stutter": stutter(run),
        "worst": worst(run),
    }
    return summarise(run) | {key: clean(value) for key, value in more.items()}


def heading(run: Run) -> str:
    """The run's name and what it was run against."""
    target = run.meta.get("target") or {}
    server = " ".join(str(target[key]) for key in ("server", "server_version") if target.get(key))
    return run.name + (f" · {server}" if server else "")


def page(template: str, data: dict[str, Any] | None = None, **values: Any) -> str:
    """A page from templates/. All values are escaped: a server under test may say anything.

    ``data``: what charts.js draws; without it, the page has no script at all.
    """
    package = resources.files("twoclocks")
    files = package / "templates"
    scripts = [package / "vendor" / "echarts" / "echarts.common.min.js", files / "charts.js"] if data else []
    texts = [script.read_text(encoding="utf-8") for script in scripts]
    loader = jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(
        number=units.number,
        signed=units.signed,
        bucket=units.bucket,
        scraped_span=wording.scraped_span,
        shown_unit=units.shown_unit,
        span=headline.span,
        spread_labels=headline.SPREAD,
        stall_words=headline.stall_words,
        worst_columns=headline.WORST,
        plain=plain,
        instrument=wording.instrument,
        is_in_process=wording.is_in_process,
        seen=wording.seen,
        resolved=wording.resolved,
        told_by=wording.told_by,
        row_name=wording.row_name,
        told_how=wording.told_how,
        metric_name=wording.metric_name,
        stage_words=wording.stage_words,
        stage_clocks=wording.stage_clocks,
        engine_name=wording.engine_name,
        caveats=wording.caveats,
        series_name=wording.series_name,
        series_unit=wording.series_unit,
        log_weight=wording.LOG_WEIGHT,
        gpu_headings=wording.GPU_HEADINGS,
        gpu_row=wording.gpu_row,
        gpu_rows=wording.gpu_rows,
        gpu_words=wording.gpu_words,
        memory_name=wording.memory_name,
        size=units.size,
        add_up=wording.ADD_UP,
        plain_lines=lambda text: "\n".join(plain(line) for line in text.splitlines()),
        short=wording.SHORT,
        shown_labels=wording.shown_labels,
        both=wording.both,
        offered=wording.offered,
        left_words=wording.left_words,
        warmup_words=wording.warmup_words,
        level_headings=wording.LEVEL_HEADINGS,
        level_row=wording.level_row,
        levels_remark=wording.LEVELS_REMARK,
        attempts_title=wording.ATTEMPTS_TITLE,
        attempt_headings=wording.ATTEMPT_HEADINGS,
        attempt_row=wording.attempt_row,
        attempt_words=wording.attempt_words,
        turn_headings=wording.TURN_HEADINGS,
        turn_row=wording.turn_row,
        session_words=wording.session_words,
        prefix_lines=wording.prefix_lines,
        rosetta=rosetta_text,
        scripts=[markupsafe.Markup(text) for text in texts],  # noqa: S704, our own files
        script_sources=" ".join(map(_source, texts)),
        data=embedded(data) if data else None,
        style=(files / "style.css").read_text(encoding="utf-8"),
    )
    return environment.get_template(template).render(**values)


def picture(path: Path) -> str:
    """A file as base64, to stand inside a page."""
    return base64.b64encode(path.read_bytes()).decode("ascii")


def write_json(path: Path, value: Any) -> None:
    """JSON as other programs read it: UTF-8, no NaN."""
    coded = msgspec.json.encode(value, enc_hook=lambda number: number.item())  # numpy's
    path.write_bytes(msgspec.json.format(coded, indent=1) + b"\n")


def embedded(value: Any) -> markupsafe.Markup:
    """JSON that no text in it can end: nothing that HTML could read as a tag, an entity or a comment."""
    text = msgspec.json.encode(value).decode()
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return markupsafe.Markup(text)  # noqa: S704, see above


def _source(script: str) -> str:
    """The one script that a page allows, by its hash; any other, and any that came in with a text, does not run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _html(run: Run, summary: dict[str, Any], has_histograms: bool) -> str:
    meta = run.meta
    target = [meta.get("target", {}).get(key) for key in ("server", "server_version", "api", "model", "url")]
    started = meta.get("started_at_unix")
    date = datetime.datetime.fromtimestamp(started, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") if started else ""
    experiment, drawn = run.path / "experiment.yaml", charts([run], [summary])
    return page(
        "report.html",
        data=drawn,
        charts=drawn,
        summary=summary,
        target=" · ".join(plain(part) for part in target if part),
        date=date,
        cards=headline.cards(summary),
        histograms=picture(run.path / HISTOGRAMS) if has_histograms else None,
        setting=_setting(meta),
        experiment=experiment.read_text(encoding="utf-8") if experiment.exists() else "",
    )


def _setting(meta: dict[str, Any]) -> dict[str, str]:
    """What run.json tells of how it was run, a line each."""
    command = " ".join(str(part) for part in meta.get("command_line") or [])
    lines = {"command": command} | {
        key: ", ".join(f"{name}: {value}" for name, value in (meta.get(key) or {}).items() if name != "started")
        for key in ("overrides", "labels", "target", "host", "versions")
    }
    started = (meta.get("target") or {}).get("started")
    if isinstance(started, dict):  # by `twoclocks run`
        lines["server's command"] = " ".join(str(word) for word in started.get("command_line") or [])
        told = ("env", "versions", "device", "gpus", "model_folder", "ready_s")
        lines["server's start"] = ", ".join(f"{key}: {started[key]}" for key in told if started.get(key))
    lines |= {key: str(meta[key]) for key in ("twoclocks_version", "workers", "lost_records", "status") if key in meta}
    return {key: value for key, value in lines.items() if value}
