"""The command ``twoclocks``: run, report, compare, doctor, ... Heavy libraries load only when a command needs them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from twoclocks import __version__
from twoclocks.errors import TwoclocksError, plain
from twoclocks.experiment import Server

YES = "load for a host that is neither this machine nor in a private network is meant; asked for once a host"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. An error that the user can mend is one line, a traceback only with --debug."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except TwoclocksError as error:
        if options.debug:
            raise
        print(f"twoclocks: {plain(' '.join(str(error).split()))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("twoclocks: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    return code


def _run(options: argparse.Namespace) -> int:
    from twoclocks import run

    return run.run(options, _progress)


def _duel(options: argparse.Namespace) -> int:
    from twoclocks import duel

    return duel.duel(options, _progress)


def _report(options: argparse.Namespace) -> int:
    from twoclocks import log_files, report, terminal

    if options.server_log is not None and any((options.run / name).exists() for name in ("study.json", "sweep.json")):
        raise TwoclocksError(f"--server-log: {options.run} holds several runs; give the folder of one of them")
    if (options.run / "study.json").exists():
        from twoclocks import study_report, study_text

        study = study_report.build(options.run, _progress)
        answered = study.summary["answers"]  # two targets side by side, with what they said
        print(study_text.duel_text(study.summary) if answered else study_text.terminal_text(study.summary))
        print(f"report: {study.html}\nmarkdown: {study.text}")
        return study.exit_code
    if (options.run / "sweep.json").exists():
        from twoclocks import curves

        curve = curves.build(options.run, _progress)
        code: int = curve.exit_code
        print(curves.text(curve.summary))
        print(f"report: {curve.html}")
        return code
    if options.server_log is not None:
        print(f"server's log: {log_files.add_log(options.run, options.server_log)}")
    built = report.build(options.run, _progress)
    _show(terminal.render(built.summary))
    print(f"report: {built.html}\nviolin: {built.violin}")
    if built.summary["verdict"]["level"] == "INVALID":
        return 4
    slo = built.summary["slo"]
    return 1 if slo and not slo["met"] else 0


def _compare(options: argparse.Namespace) -> int:
    from twoclocks import compare, compare_text, gate

    told = {"versus": options.vs, "gates": options.gate, "junit_file": options.junit}
    built = compare.compare(options.runs, options.out, _progress, allow_undecided=options.allow_undecided, **told)
    print(compare_text.text(built.summary))
    print(f"comparison: {built.html}\nviolin: {built.violin}")
    return gate.exit_code([row["outcome"] for row in built.summary["gates"]], options.allow_undecided)


def _calibrate(options: argparse.Namespace) -> int:
    from twoclocks import calibrate, calibration

    made = calibrate.calibrate(*calibrate.chosen(options), _progress)
    print(calibration.text(made))
    for path in [options.out, *([options.into / "calibration.json"] if options.into else [])]:
        print(f"calibration: {calibration.save(made, path)}")
    return 0


def _rosetta(options: argparse.Namespace) -> int:
    from twoclocks import rosetta_text, summary
    from twoclocks.load import load_run

    _progress(f"reading {options.run}")
    _show(rosetta_text.render(summary.summarise(load_run(options.run))["rosetta"]))
    return 0


def _export(options: argparse.Namespace) -> int:
    from twoclocks import tables

    _progress(f"reading {options.run}")
    print(f"{options.format}: {tables.export(options.run, options.format, options.table, options.out)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from twoclocks import doctor

    told = doctor.doctor(options)
    print(told.as_json() if options.json else told.as_text())
    return told.exit_code


def _show(renderable: object) -> None:
    """In colour on a terminal; never narrower than the tables need, since a cut number would mislead."""
    from rich.console import Console

    from twoclocks.terminal import WIDTH

    console = Console(highlight=False)
    if not console.is_terminal or console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    console.print(renderable)


def _progress(doing: str) -> None:
    print(f"twoclocks: {plain(doing)} ...", file=sys.stderr, flush=True)


def _processes(text: str) -> int:
    number = int(text)
    if number < 1 and number != -1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, or -1 for one a core, found {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="twoclocks",
        description="LLM latency, measured by two clocks: the client's and the server's.",
        epilog="A run is made with: twoclocks run configs/x.yaml, or, with Locust's web UI: "
        "locust -f load_test.py --experiment configs/x.yaml",
    )
    parser.add_argument("--version", action="version", version=f"twoclocks {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        parents=[common],
        help="run an experiment: once, or once for each level, target, variant and repeat that it asks for",
        description="Run an experiment with Locust, headless, and the servers that it asks to be started. Shapes sweep "
        "and search are a run for each level; targets, variants and repeats are a run for each. "
        "Ctrl-C once lets the running streams end, twice cuts them off.",
        epilog="Example: twoclocks run configs/sweep.yaml --set load.duration_s=30, or without a file: twoclocks run "
        "--url http://127.0.0.1:8000 --users 16. Exit code: 0; 1: SLO missed; 2: bad usage; 3: target not reachable; "
        "4: the run is INVALID; 130: several runs, interrupted.",
    )
    run.add_argument("experiment", metavar="EXPERIMENT", nargs="?", type=Path, help="default: configs/default.yaml")
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one of its keys")
    run.add_argument("--target", metavar="NAME", help="of a study: this target alone")
    run.add_argument("--variant", metavar="NAME", help="of a study: this variant alone")
    run.add_argument("--url", help="of the server, in place of target.url")
    run.add_argument("--users", type=int, help="in place of load.users")
    run.add_argument(
        "--processes",
        metavar="N",
        type=_processes,
        default=1,
        help="Locust workers (default: 1, no workers; -1: one a core)",
    )
    run.add_argument("--run-folder", metavar="PATH", type=Path, help="make the run, sweep or search in this new folder")
    run.add_argument("--resume", metavar="FOLDER", type=Path, help="of many runs: make what is missing")
    run.add_argument("--no-report", action="store_true", help="leave the report to a later `twoclocks report FOLDER`")
    run.add_argument("--yes", action="store_true", help=YES)
    run.set_defaults(command=_run)
    duel = commands.add_parser(
        "duel",
        parents=[common],
        help="send the same prompts to two servers in turns, and show both answers and times",
        description="Send the same prompts to two targets in turns (A B, B A, ...) and show both answers, the times of "
        "each, and their difference by prompt with its interval. Without --a and --b the experiment's two targets.",
        epilog="Example: twoclocks duel --a transformers=http://127.0.0.1:8001 --b vllm=http://127.0.0.1:8000 --prompt "
        "'Why is the sky blue?'",
    )
    duel.add_argument(
        "experiment", metavar="EXPERIMENT", nargs="?", type=Path, help="default: configs/same-prompt.yaml"
    )
    duel.add_argument("--a", metavar="[SERVER=]URL", help="one server; SERVER: vllm, transformers, tgi, sglang, ...")
    duel.add_argument("--b", metavar="[SERVER=]URL", help="the other one")
    duel.add_argument("--prompt", metavar="TEXT", help="in place of the experiment's prompts")
    duel.add_argument("--repeats", metavar="N", type=int, help="in place of the experiment's")
    duel.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one of its keys")
    duel.add_argument("--run-folder", metavar="PATH", type=Path, help="folder of the study, which must not exist yet")
    duel.add_argument("--no-report", action="store_true", help="leave the report to a later `twoclocks report FOLDER`")
    duel.add_argument("--yes", action="store_true", help=YES)
    duel.set_defaults(command=_duel)
    report = commands.add_parser(
        "report",
        parents=[common],
        help="make the summary, plots and report of a run from its raw files",
        description="Make summary.json, summary.txt, vllm_bench.json, plots and report.html from a run's raw files.",
        epilog="Example: twoclocks report output/demo-vllm. Exit code: 0; 1: SLO missed; 4: the run is INVALID.",
    )
    report.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, a sweep, a search or a study")
    report.add_argument(
        "--server-log",
        metavar="FILE",
        type=Path,
        help="a log copied from the server's machine; it is added to the run's folder as it stands, keys too, and "
        "later reports have it",
    )
    report.set_defaults(command=_report)
    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="put several runs into one report, and hold them to limits",
        description="Put two or more runs into one report; differences are against the first, with their intervals. "
        "A gate is a limit on a figure of the other runs, or on its change: it passes or fails where the interval is "
        "wholly on one side, and else says how much more data would decide.",
        epilog="Example: twoclocks compare output/before output/after --gate 'ttft.p95 <= +5%' --gate 'tpot.p99 <= 50 "
        "ms' --gate 'output_throughput >= -3%' --gate 'error_rate <= 0.1%' --junit gates.xml. Exit code: 0; 1: a gate "
        "failed or has not enough data; 2: a gate that cannot be read; 4: a gate was asked of an INVALID run.",
    )
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folders of runs or studies, two or more; or one, and result files of other tools (vllm bench serve, "
        "guidellm, aiperf, genai-bench, Locust's CSV)",
    )
    compare.add_argument(
        "--vs",
        metavar="RUN",
        nargs="+",
        type=Path,
        default=[],
        help="then RUNs are repeats of one side, these of the other",
    )
    compare.add_argument(
        "--gate", metavar="LIMIT", action="append", default=[], help="METRIC.STATISTIC <= LIMIT, or >="
    )
    compare.add_argument("--junit", metavar="FILE", type=Path, help="write the gates' outcomes as JUnit XML")
    compare.add_argument("--allow-undecided", action="store_true", help="not enough data is no failure")
    compare.add_argument("--out", type=Path, help="its folder (default: compare-A-vs-B beside the first run)")
    compare.set_defaults(command=_compare)
    rosetta = commands.add_parser(
        "rosetta",
        parents=[common],
        help="what other load testers would have reported of a run",
        description="Show TTFT, ITL, TPOT, E2E, throughput and goodput of one run by the definitions of vLLM bench "
        "serve, SGLang, guidellm, aiperf, genai-bench, inference-perf, llmperf and Locust, and why each differs. The "
        "report holds the same table with each definition; summary.json every figure.",
        epilog="Example: twoclocks rosetta output/demo-vllm",
    )
    rosetta.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    rosetta.set_defaults(command=_rosetta)
    export = commands.add_parser(
        "export",
        parents=[common],
        help="a run as one file for other programs: CSV, Parquet, markdown, vLLM's layout",
        description="Write a run as one file. csv and parquet: a row a request, or with --table chunks a row a chunk; "
        "seconds on the run's clock. markdown: latencies, rates and the Rosetta table. vllm-bench: as vllm bench serve "
        "--save-detailed writes it, by its definitions. Texts of the server carry no control characters, and those "
        "that a spreadsheet would take for a formula begin with '.",
        epilog="Example: twoclocks export output/demo-vllm --format csv",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    export.add_argument("--format", choices=("csv", "parquet", "markdown", "vllm-bench"), required=True)
    export.add_argument("--table", choices=("requests", "chunks"), default="requests", help="of csv and parquet")
    export.add_argument("--out", metavar="FILE", type=Path, help="where to write it (default: in the run's folder)")
    export.set_defaults(command=_export)
    calibrate = commands.add_parser(
        "calibrate",
        parents=[common],
        help="measure this tool's own error at an experiment's load on this machine",
        description="Replay an experiment's load against a server on this machine whose sends are known, and show how "
        "far off the figures are. Reports of runs of about the same load then carry this error.",
        epilog="Example: twoclocks calibrate configs/demo-vllm.yaml --tpot-ms 15",
    )
    calibrate.add_argument(
        "experiment", metavar="EXPERIMENT", nargs="?", type=Path, help="default: configs/default.yaml"
    )
    calibrate.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one of its keys")
    calibrate.add_argument("--like", metavar="RUN", type=Path, help="take experiment and rates from this run's folder")
    calibrate.add_argument("--ttft-ms", type=float, help="request to first token (default: 100, or as in --like)")
    calibrate.add_argument("--tpot-ms", type=float, help="time a token (default: 20, or as in --like)")
    calibrate.add_argument("--chunk-tokens", type=int, help="tokens a chunk (default: 1, or as in --like)")
    calibrate.add_argument("--output-tokens", type=int, help="of every answer (default: max_tokens, or as in --like)")
    calibrate.add_argument("--seconds", type=float, help="how long to measure after the ramp (default: 15)")
    calibrate.add_argument("--processes", type=int, help="Locust workers, as in the run it is for (default: 1)")
    calibrate.add_argument("--out", metavar="FILE", type=Path, help="where to store it (default: the user's cache)")
    calibrate.add_argument("--into", metavar="RUN", type=Path, help="also add it to this run's folder")
    calibrate.set_defaults(command=_calibrate)
    doctor = commands.add_parser(
        "doctor",
        parents=[common],
        help="what of this machine, and of a server, a run would stumble over, and what to do about it",
        description="Look at this machine for two seconds: Python and packages, the kernel's receive stamps, file "
        "limit, cores, clock, other work, ports, disk, GPU, engines. With --url or an experiment also ask its server "
        "one short question: which of its clocks it shows, and which flags make it show more. Nothing is changed.",
        epilog="Example: twoclocks doctor --url http://127.0.0.1:8000 --server vllm. Exit code: 0; 1: there is a "
        "problem; 2: bad usage or experiment; 3: the server is not reachable.",
    )
    doctor.add_argument(
        "experiment", metavar="EXPERIMENT", nargs="?", type=Path, help="look at what this one needs, its server too"
    )
    doctor.add_argument("--url", help="of a server, in place of target.url")
    doctor.add_argument("--server", choices=get_args(Server), help="its kind, in place of target.server")
    doctor.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one of its keys")
    doctor.add_argument("--json", action="store_true", help="facts and findings as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
