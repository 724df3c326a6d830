"""The pins: what is installed is what was meant, file by file; and the audit of it."""

import importlib.util
import json
import re
import socket
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
IMAGE = (ROOT / "deploy" / "tester.lock").read_text()

spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


@pytest.mark.parametrize(("lock", "least"), [(LOCK, 100), (IMAGE, 50)])
def test_every_pin_has_the_hashes_of_its_files(lock, least):
    blocks = re.split(r"\n(?=\S)", "\n".join(line for line in lock.splitlines() if not line.startswith("#")).strip())

    assert len(blocks) > least
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==\S+( ; .+)? \\\n", block), block[:100]
        assert re.search(r"^    --hash=sha256:[0-9a-f]{64}", block, re.M), block[:100]
    assert not re.search(r"https?:|@|--(extra-)?index|--find", lock)


def test_all_that_the_project_asks_for_is_pinned_and_what_builds_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    names = {re.split(r"[<>=!\[; ]", one)[0].lower().replace("_", "-") for one in wanted} - {"twoclocks"}

    assert names <= audit.pins(LOCK).keys()


def test_what_runs_here_is_what_is_pinned():
    from importlib.metadata import version

    for name in ("locust", "httpx", "msgspec", "pyyaml", "numpy", "pandas", "flask-login"):
        assert version(name) == audit.pins(LOCK)[name]


def test_the_image_has_of_these_versions_what_a_load_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["otel"], "setuptools"]

    image = audit.pins(IMAGE)

    assert image.items() <= audit.pins(LOCK).items()
    assert needed(wanted) <= image.keys()
    assert not image.keys() & {"mypy", "ruff", "pyarrow", "ipykernel", "tokenizers"}  # it stays small


def needed(wanted: list[str]) -> set[str]:
    """What has to be there for these requirements, and for theirs, by what the installed packages say."""
    found: set[str] = set()
    todo = [Requirement(one) for one in wanted]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name not in found:
            found.add(name)
            theirs = [Requirement(line) for line in metadata.requires(name) or []]
            extras = [{"extra": extra} for extra in one.extras] or [{"extra": ""}]
            todo += [line for line in theirs if not line.marker or any(map(line.marker.evaluate, extras))]
    return found


def test_pins_of_a_list():
    text = (
        "# a list\nTorch==2.13.0+cpu\nzope.event==6.2 ; sys_platform == 'linux' \\\n    --hash=sha256:00\nnot a pin\n"
    )

    assert audit.pins(text) == {"torch": "2.13.0", "zope-event": "6.2"}


class Osv(BaseHTTPRequestHandler):
    """As OSV answers /v1/querybatch: a result for each query, in order."""

    def do_POST(self):
        queries = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
        bad = {"package": {"name": "bad", "ecosystem": "PyPI"}, "version": "1.0"}
        results = [{"vulns": [{"id": "GHSA-x"}, {"id": "PYSEC-1"}]} if one == bad else {} for one in queries]
        body = json.dumps({"results": results[: self.server.most]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def osv(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Osv)
    server.most = None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(audit, "OSV", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_known_vulnerability_fails_the_audit(osv, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("good==1.0\nbad==1.0\n")

    assert audit.main([str(tmp_path / "list.txt")]) == 1
    assert "audit: bad 1.0 (list.txt): GHSA-x, PYSEC-1" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("good==1.0\nbad==1.1\n")
    assert audit.main([str(tmp_path / "list.txt")]) == 0
    assert capsys.readouterr().out == "audit: 2 pins, 0 of them with known vulnerabilities\n"


def test_what_is_known_of_the_servers_of_the_demo_is_told_and_fails_nothing(osv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "SERVERS", tmp_path)
    (tmp_path / "vllm.txt").write_text("bad==1.0\n")

    assert audit.main([str(tmp_path / "vllm.txt")]) == 0
    assert "audit: bad 1.0 (vllm.txt): GHSA-x, PYSEC-1" in capsys.readouterr().out


def test_an_answer_that_is_no_http_is_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "list.txt").write_text("good==1.0\n")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(audit, "OSV", f"http://127.0.0.1:{listening.getsockname()[1]}")

        assert audit.main([str(tmp_path / "list.txt")]) == 0
    assert "NOT DONE" in capsys.readouterr().out


def test_advisories_that_cannot_be_had_are_told_and_fail_nothing(osv, tmp_path, capsys, monkeypatch):
    (tmp_path / "list.txt").write_text("good==1.0\nbad==1.0\n")
    osv.most = 1  # an answer that is not whole is none

    assert audit.main([str(tmp_path / "list.txt")]) == 0
    assert "NOT DONE" in capsys.readouterr().out
    monkeypatch.setattr(audit, "OSV", "http://127.0.0.1:9")
    assert audit.main([str(tmp_path / "list.txt")]) == 0
    assert "audit: NOT DONE, the advisories at http://127.0.0.1:9 could not be had" in capsys.readouterr().out
    assert audit.main([str(tmp_path / "list.txt"), "--must"]) == 3
