"""The command ``twoclocks``: report and compare. Heavy libraries load only when a command needs them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from twoclocks import __version__
from twoclocks.errors import TwoclocksError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. An error that the user can mend is one line, a traceback only with --debug."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except TwoclocksError as error:
        if options.debug:
            raise
        print(f"twoclocks: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("twoclocks: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    return code


def _report(options: argparse.Namespace) -> int:
    from twoclocks import report, terminal

    built = report.build(options.run, _progress)
    _show(terminal.render(built.summary))
    print(f"report: {built.html}\nviolin: {built.violin}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from twoclocks import compare

    built = compare.compare(options.runs, options.out, _progress)
    print(compare.text(built.summary))
    print(f"comparison: {built.html}\nviolin: {built.violin}")
    return 0


def _show(renderable: object) -> None:
    """In colour on a terminal; never narrower than the tables need, since a cut number would mislead."""
    from rich.console import Console

    from twoclocks.terminal import WIDTH

    console = Console(highlight=False)
    if not console.is_terminal or console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    console.print(renderable)


def _progress(doing: str) -> None:
    print(f"twoclocks: {doing} ...", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="twoclocks",
        description="LLM latency, measured by two clocks: the client's and the server's.",
        epilog="A run is made with: locust -f load_test.py --experiment configs/x.yaml",
    )
    parser.add_argument("--version", action="version", version=f"twoclocks {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        parents=[common],
        help="make the summary, plots and report of a run from its raw files",
        description="Make summary.json, summary.txt, vllm_bench.json, plots and report.html from a run's raw files.",
        epilog="Example: twoclocks report output/demo-vllm",
    )
    report.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    report.set_defaults(command=_report)
    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="put several runs into one report",
        description="Put two or more runs into one report; differences are against the first.",
        epilog="Example: twoclocks compare output/demo-vllm output/demo-transformers",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the runs' folders, two or more")
    compare.add_argument("--out", type=Path, help="its folder (default: compare-A-vs-B beside the first run)")
    compare.set_defaults(command=_compare)
    return parser


if __name__ == "__main__":
    sys.exit(main())
