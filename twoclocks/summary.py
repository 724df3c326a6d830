"""Summary: a Run -> every figure of its report, as one plain dictionary that summary.json holds as it is.

Seconds inside; NaN never leaves this module: what is not known is None. Each figure carries its unit and its
definition, and each of the server's figures says what starts and stops its clock.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import __version__, expositions
from twoclocks.attempts import attempts
from twoclocks.breakdown import client_vs_server, cut_up, decode_row, stage_rows, waterfall_row
from twoclocks.calibration import Calibration, calibration_of, error_bars
from twoclocks.checks import checks, joined
from twoclocks.clocks import CLOCKS, METRICS, PAGE, SILENCES, silences
from twoclocks.figures import client_figures, is_open, level_figures, output_throughput, slo
from twoclocks.fleet_summary import worker_lines
from twoclocks.gpu_summary import DEFINITIONS as GPU_DEFINITIONS
from twoclocks.gpu_summary import gpu_figures
from twoclocks.load import LogSeries, Run
from twoclocks.log_series import MEANING
from twoclocks.memory_summary import memory_rows
from twoclocks.metrics import slo_limits
from twoclocks.prefix_cache import prefix_cache
from twoclocks.record import GAVE_UP, LEFT, TOO_LONG
from twoclocks.rosetta import rosetta
from twoclocks.scraped import server_window
from twoclocks.turns import by_turn, sessions
from twoclocks.verdict import verdict


def summarise(run: Run) -> dict[str, Any]:
    """Every figure of a run; the keys are those of summary.json."""
    calibration = calibration_of(run)
    cut, tpots = cut_up(run)
    figures = client_figures(run)
    summary = {
        "twoclocks_version": __version__,
        "run": run.name,
        "label": run.shown_name,
        "status": run.meta.get("status"),
        "partial": _partial(run),
        "verdict": verdict(run),
        "slo": slo(run),
        "notes": _notes(run),
        "target": run.meta.get("target") or {},
        "window": {"started_at": run.window[0], "ended_at": run.window[1], "unit": "s", "definition": "run's clock"},
        "figures": figures,
        "rosetta": rosetta(run, figures, slo_limits(run.experiment)),
        "warmup": run.meta.get("warmup"),
        "attempts": attempts(run),
        "levels": level_figures(run),
        "prefix_cache": prefix_cache(run),
        "sessions": sessions(run),
        "turns": by_turn(run),
        "errors": _errors(run.measured),
        "join": joined(run.ok) | _left_over(run),
        "instrument": _instrument(calibration),
        "client_vs_server": client_vs_server(run.ok, error_bars(calibration) if calibration else {}),
        "waterfall": [waterfall_row(one) for one in cut],
        "decode": [decode_row(one) for one in tpots],
        "stages": stage_rows(run),
        "untold": _untold(run),
        "scraped": _scraped(run),
        "server_window": server_window(run),
        "log_series": _log_series(run),
        "gpu": _gpu(run),
        "gpu_definitions": GPU_DEFINITIONS,
        "memory": memory_rows(run),
        "side_effects": expositions.side_effects(run.all_scrapes),
        "checks": [check | {"definition": _check_definition(run, check["name"])} for check in checks(run, cut)],
    }
    cleaned: dict[str, Any] = clean(summary)
    return cleaned


def _instrument(calibration: Calibration | None) -> dict[str, Any] | None:
    """The instrument's own error at about this load, if it was calibrated."""
    if calibration is None:
        return None
    return {
        "error_bars": error_bars(calibration),
        "unit": "s",
        "definition": "p99 of |client - known schedule| in a calibration at about this load, by `twoclocks calibrate`",
        "streams": calibration.streams,
        "chunks_per_s": calibration.chunks_per_s,
        "reader": calibration.reader,
        "made_at_unix": calibration.made_at_unix,
    }


def _left_over(run: Run) -> dict[str, Any]:
    """What servers told in spans and logs, what of it joined nothing, and the requests that did not end ok."""
    rest = run.measured[run.measured["status"] != "ok"]
    told = {"not_ok": len(rest), "not_ok_joined": int(rest["server_source"].notna().sum())}
    return told | {"rows": run.rows, "unmatched_rows": run.unmatched_rows}


def _check_definition(run: Run, name: str) -> str:
    """What the server's figures in a check mean; empty where it holds none."""
    metric, _, other = name.partition("_agree")
    if other.startswith("_with_counter"):
        gain = expositions.counter_gain(run.scrapes, run.first_scrapes, _COUNTED[metric])
        return f"{' and '.join(gain.names)}: counted {gain.definition}" if gain else ""
    told = {"client_after_server": ("ttft", "queue", "prefill")}.get(name, (metric,))
    texts = [
        f"{measure} ({source}, {server}): {CLOCKS[source, server][measure].text}"
        for source, server in run.told_by for measure in told if measure in CLOCKS[source, server]
    ]  # fmt: skip
    histogram = "ttft" if name == "only_our_traffic" else metric if other == "s_with_histogram" else None
    gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, histogram) if histogram else None
    return ". ".join([*texts, *([f"{' and '.join(gained.names)}: {gained.definition}"] if gained else [])])


_COUNTED = {"output_tokens": "generation_tokens", "prompt_tokens": "prompt_tokens"}


def _untold(run: Run) -> list[str]:
    """What this server does not tell, and how to start it so that it does."""
    kind = (run.experiment.get("target") or run.meta.get("target") or {}).get("server")
    if kind not in SILENCES or run.ok.empty or run.in_process:
        return []
    told = {metric for metric in METRICS if run.ok[f"server_{metric}"].notna().any()}
    return silences(kind, told | ({PAGE} if any(len(scrapes.at) for scrapes in run.scrapes) else set()))


def _log_series(run: Run) -> list[dict[str, Any]]:
    """Mean and maximum of what the server's log said of the engine in the measuring window, a row a series."""

    def row(series: LogSeries) -> dict[str, Any]:
        values = series.values[(series.at >= run.window[0]) & (series.at <= run.window[1])]
        return {
            "name": series.name,
            "engine": series.engine,
            "unit": series.unit,
            "n": len(values),
            "mean": float(values.mean()) if len(values) else None,
            "max": float(values.max()) if len(values) else None,
            "definition": MEANING[series.name],
            "zone": series.zone,
        }

    return [row(series) for series in run.log_series]


def _gpu(run: Run) -> list[dict[str, Any]]:
    """What each GPU did in the measuring window, and all of them together; energy per token that arrived in it."""
    throughput, length = output_throughput(run), run.window[1] - run.window[0]
    return gpu_figures(run.gpu_samples, run.window, throughput * length if math.isfinite(throughput) else None)


def _scraped(run: Run) -> dict[str, Any] | None:
    """From when to when the server's counters were read, and which of our requests lie in that time."""
    good = [(s, first) for s, first in zip(run.scrapes, run.first_scrapes, strict=True) if len(s.at)]
    if not good:
        return None
    return {
        "from": min(float(s.at[first]) for s, first in good),
        "until": max(float(s.until[-1]) for s, _ in good),
        "unit": "s",
        "requests": len(run.scraped),
        "warmup": int((run.scraped["phase"] == "warmup").sum()),
        "definition": "run's clock; from the last scrape before the measuring window that found none of our requests "
        "under way, else from the first",
    }


def _partial(run: Run) -> str | None:
    if not run.partial:
        return None
    if run.meta.get("status") in ("interrupted", "failed"):
        return "Stopped before its time; every request that it had sent is in these figures."
    flying = "an unknown number of requests"
    if is_open(run):
        seconds = run.self_samples.dropna(subset="in_flight")
        if len(seconds):
            last = int(seconds.groupby("worker")["in_flight"].last().sum())
            flying = f"about {last:,} requests, as the load generator last told,"
    elif users := run.requests.loc[run.requests["phase"] != "warmup", "user"].nunique():
        flying = f"up to {users} requests, one a user,"
    return f"Partial: the run was killed or is still going on; {flying} were in flight and are not in these figures."


def _notes(run: Run) -> list[str]:
    lost = run.meta.get("lost_records")
    told = [f"{lost} records were lost on their way from the workers; they are in no figure."] if lost else []
    errors = [row for row in run.gpu_samples if "error" in row]
    for where in dict.fromkeys(row.get("host") for row in errors):
        of_host = [row for row in errors if row.get("host") == where]
        told.append(f"The GPUs of {where} could not be read {len(of_host)} times, lastly: {of_host[-1]['error']}")
    if too_long := int((run.measured["error_kind"] == TOO_LONG).sum()):
        told.append(
            f"{too_long:,} of {len(run.measured):,} requests were refused, since prompt and answer do not fit the "
            "model's context. They are failures in these figures; leave them out of the request file, or start the "
            "server with a longer context."
        )
    gave_up, judged = int((run.judged["error_kind"] == GAVE_UP).sum()), len(run.judged)
    got = int(run.ok["ttft"].notna().sum())
    if gave_up:
        told.append(
            f"The users of {gave_up:,} of {judged:,} requests ({gave_up / judged:.1%}) gave up waiting for a first "
            f"token. TTFT is that of {got:,} others; of these together, p{100 * got / (got + gave_up):.3g} and above "
            "lie beyond workload.patience_s."
        )
    if silent := len(run.ok) - got:
        good = ", and good by the SLO, of which they have nothing to miss" if slo_limits(run.experiment) else ""
        told.append(
            f"{silent:,} of {len(run.ok):,} requests ended ok without a single token. They are in no latency{good}."
        )
    if run.log_series:
        told.append(f"Times in the server's log that name no zone were read as {run.log_series[0].zone}.")
    return [str(note) for note in run.meta.get("notes") or []] + told + worker_lines(run.meta.get("fleet") or [])


def _errors(measured: pd.DataFrame) -> list[dict[str, Any]]:
    bad = measured[(measured["status"] != "ok") & ~measured["error_kind"].isin(LEFT)]
    kinds = bad["error_kind"].fillna(bad["status"])
    rows = []
    for (status, kind), group in bad.groupby([bad["status"], kinds]):
        messages = group["error_message"].dropna()
        example = str(messages.iloc[0]) if len(messages) else None
        rows.append({"status": status, "kind": kind, "count": len(group), "example": example})
    return sorted(rows, key=lambda row: -row["count"])


def clean(value: Any) -> Any:
    """Without NaN and numpy numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list) and set(map(type, value)) == {float} and math.isfinite(sum(value)):
        return value  # the gaps of a long run are millions, seldom NaN
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
