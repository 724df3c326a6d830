"""A tab in Locust's web UI: live latencies, throughput and the server's state, unrounded; and the raw records so far.

Locust's extension points name a tab but can put no more than a table into it. So the tab is Locust's, and what stands
in it is drawn by templates/live.js, which is added to Locust's page. What it shows is read by a process of its own
(live_run), which begins when somebody looks.
"""

import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from flask import Blueprint, Response, abort, request

TITLE = "LLM metrics"
ANSWER_S = 20.0
BLOCK_BYTES = 64 * 1024
PARTS = (
    '<link rel="stylesheet" href="./twoclocks/live.css">'
    '<script type="module" src="./twoclocks/live.js"></script></body>'
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # nothing here is a page
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Shown = tuple[Path | None, float, str | None]
"""The folder of the run that goes on or was the last, its clock in seconds, and why no run could begin."""


class Reader:
    """The process that reads the run; started by the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, question: dict[str, Any]) -> bytes:
        """A line of JSON."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                # a session of its own: Ctrl-C is not for it, which ends with its input
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "twoclocks.live_run"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            return self._ask(self._process, msgspec.json.encode(question) + b"\n")

    def _ask(self, process: "subprocess.Popen[bytes]", line: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            if select.select([process.stdout], [], [], ANSWER_S)[0] and (answer := process.stdout.readline()):
                return answer
        except BrokenPipeError:
            pass
        process.kill()  # what it may still answer would be taken for the answer to something else
        return b'{"error": "the process that reads the run did not answer; it is started anew"}\n'


def add_tab(web_ui: Any, base_path: str | None, shown: Callable[[], Shown]) -> None:
    """Put the tab into Locust's UI. To be called before it starts."""
    blueprint = Blueprint("twoclocks", __name__, url_prefix=f"{base_path or ''}/twoclocks")
    reader = Reader()

    @blueprint.after_request
    def with_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @blueprint.route("/live.json")
    @web_ui.auth_required_if_enabled
    def live() -> Response:
        folder, now, trouble = shown()
        if folder is None or trouble is not None:
            return _json(msgspec.json.encode({"run": None, "error": trouble}))
        since = request.args.get("since", 0, type=int)
        return _json(reader.ask({"folder": str(folder), "now": now, "run": request.args.get("run"), "since": since}))

    @blueprint.route("/requests.jsonl")
    @web_ui.auth_required_if_enabled
    def records() -> Response:
        folder, _, _ = shown()
        if folder is None:
            abort(404)
        path = folder / "requests.jsonl"
        try:
            size = whole_lines(path)
        except OSError:  # put away, or deleted
            abort(404)
        response = Response(blocks(path, size), mimetype="application/jsonl")
        response.content_length = size
        response.headers["Content-Disposition"] = f'attachment; filename="{folder.name}-requests.jsonl"'
        return response

    @blueprint.route("/live.<any(js, css):kind>")
    @web_ui.auth_required_if_enabled
    def part(kind: str) -> Response:
        text = (resources.files("twoclocks") / "templates" / f"live.{kind}").read_bytes()
        return Response(text, mimetype="text/javascript" if kind == "js" else "text/css")

    web_ui.app.register_blueprint(blueprint)

    @web_ui.app.after_request
    def with_tab(response: Response) -> Response:
        if request.endpoint == "locust.index" and response.mimetype == "text/html" and response.status_code == 200:
            response.set_data(response.get_data(as_text=True).replace("</body>", PARTS))
        return response

    told = web_ui.template_args
    told["extendedTabs"] = [*told.get("extendedTabs", []), {"title": TITLE, "key": "twoclocks"}]
    records_so_far = {"title": "Download raw records so far (requests.jsonl)", "href": "./twoclocks/requests.jsonl"}
    told["extendedCsvFiles"] = [*told.get("extendedCsvFiles", []), records_so_far]


def whole_lines(path: Path) -> int:
    """Bytes of a growing file up to the end of its last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0


def blocks(path: Path, size: int) -> Iterator[bytes]:
    """The first so many bytes of a file."""
    with path.open("rb") as file:
        while size and (block := file.read(min(size, BLOCK_BYTES))):
            size -= len(block)
            yield block
            time.sleep(
                0.001
            )  # gevent's: else a fast client keeps the loop that sends the load from turning for tens of ms


def _json(text: bytes) -> Response:
    return Response(text, mimetype="application/json")
