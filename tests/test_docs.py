"""The docs: links lead somewhere, commands run, YAML loads, Python works, and nothing that a user may meet is left out.

A block of a page is run as it stands, but for addresses, and for how long loads last (`short`). One that cannot be run
here says why in a comment before it, `<!-- not run: WHY -->`, and is still read: its options and files must exist.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from locust_runs import free_port
from test_doctor import WELL

from twoclocks import cli, meanings
from twoclocks.clocks import METRICS
from twoclocks.doctor import findings, ports
from twoclocks.experiment import Experiment, load_experiment
from twoclocks.load import load_run
from twoclocks.record import GAVE_UP, HUNG_UP, NO_FILES, STOPPED, TOO_LONG, Record
from twoclocks.summary import summarise

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "output" / "example"
DOCS = ROOT / "docs"
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "analysis" / "README.md",
          ROOT / "requests" / "README.md", *sorted((ROOT / "deploy").rglob("*.md"))]  # fmt: skip
PAGES = [path for path in [*OTHERS, *sorted(DOCS.rglob("*.md"))] if path.exists()]
COMMANDS = {"sh", "bash"}
SHOWN = {"text", "json", "console"}  # what a terminal or a file shows
ANALYSIS = {"report", "compare", "rosetta", "export", "doctor"}


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str | None  # why it is not run

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """Fenced blocks, and indented ones, which are commands."""
    lines, found, number = page.read_text(encoding="utf-8").split("\n"), [], 0
    why = None
    while number < len(lines):
        line = lines[number]
        if mark := re.fullmatch(r"<!-- not run: (.+) -->", line):
            why = mark[1]
        elif fence := re.fullmatch(r"( *)```(\w*)", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            text = "\n".join(one.removeprefix(fence[1]) for one in lines[number + 1 : end])
            found.append(Block(page, number + 1, fence[2], text, why))
            number, why = end, None
        elif line.startswith("    ") and not lines[number - 1].strip() and not _in_list(lines, number):
            end = next(
                (n for n in range(number, len(lines)) if lines[n].strip() and not lines[n].startswith("    ")), None
            )
            text = "\n".join(one[4:] for one in lines[number:end]).rstrip()
            found.append(Block(page, number + 1, "sh", text, why))
            number, why = (len(lines) if end is None else end - 1), None
        elif line.strip():
            why = None
        number += 1
    return found


def _in_list(lines, number):
    """Is an indented line part of a list item?"""
    before = next((line for line in reversed(lines[:number]) if line.strip() and not line.startswith(" ")), "")
    return bool(re.match(r"([-*]|\d+\.) ", before))


BLOCKS = [block for page in PAGES for block in blocks(page)]


# links


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    words = [re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words}


def links(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):  # outside: not ours to hold, and asking them is no test of ours
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)

    assert not lost


def test_every_page_is_found_from_another():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}

    assert set(DOCS.rglob("*.md")) <= linked
    assert "docs/README.md" in links(ROOT / "README.md")


# nothing is left out


def told(page, heading):
    """The names in the first column of the first table below a heading."""
    text = page.read_text(encoding="utf-8")
    part = text[text.index(f"\n## {heading}\n") :]
    end = part.find("\n## ", 3)
    rows = re.findall(r"^\| (`.+?) \|", part[: end if end > 0 else None].partition("\n| --- |")[2], re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def verdict_names():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "twoclocks").glob("verdict*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Reason"]
    return {ast.literal_eval(call.args[1]) for call in calls}


def error_kinds():
    """Every constant that the code gives to a failure as its kind; and what the readers say."""
    names = {"STOPPED": STOPPED, "HUNG_UP": HUNG_UP, "GAVE_UP": GAVE_UP, "TOO_LONG": TOO_LONG, "NO_FILES": NO_FILES}
    found = set()
    for path in ("client.py", "user.py", "in_process.py"):
        for node in ast.walk(ast.parse((ROOT / "twoclocks" / path).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Failure":
                for one in ast.walk(node.args[1]):
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        found.add("http_NNN" if one.value == "http_" else one.value)
                    elif isinstance(one, ast.Name) and one.id in names:
                        found.add(names[one.id])
    return found


def test_troubleshooting_has_each_reason_kind_and_code():
    page = DOCS / "troubleshooting.md"

    assert told(page, "The verdict") == verdict_names()
    assert told(page, "Requests that failed") == set(meanings.ERROR_KINDS)
    assert told(page, "Exit codes") == {str(code) for code in meanings.EXIT_CODES}


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    known = [
        " ".join(words(node).split())
        for path in (ROOT / "twoclocks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (DOCS / "troubleshooting.md").read_text())
    # what stands between the dots (and numbers, and names in quotes) is in the code in this order, within one sentence;
    # what follows dots in brackets is the system's own word
    wanted = {
        one: ".*".join(
            re.escape(piece.strip()) for piece in re.split(r"\.\.\.[^.]*\)|\.\.\.|'[^']*'|\d+", one) if piece.strip()
        )
        for one in quoted
    }

    assert len(wanted) > 8
    assert [one for one, pattern in wanted.items() if not any(re.search(pattern, text) for text in known)] == []


def words(node):
    """The text of a literal; of an f-string with dots for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)


def test_concepts_have_each_reason():
    text = (DOCS / "concepts.md").read_text()
    named = re.findall(r"^- (`[^:]+`):", text[text.index("## The verdict") :], re.M)

    assert {name for names in named for name in re.findall(r"`(\w+)`", names)} == verdict_names()


def test_each_error_kind_of_the_code_has_a_meaning():
    assert len(error_kinds()) > 12
    assert error_kinds() <= set(meanings.ERROR_KINDS)


def test_each_key_of_run_json_has_a_meaning():
    keys = set()
    for path in ("master.py", "in_process.py", "run_folder.py"):
        for node in ast.walk(ast.parse((ROOT / "twoclocks" / path).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("write_meta", "_tell"):
                keys |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif isinstance(node, ast.FunctionDef) and node.name == "first_meta":
                (returned,) = (one.value for one in ast.walk(node) if isinstance(one, ast.Return))
                keys |= {ast.literal_eval(key) for key in returned.keys}

    assert keys == set(meanings.RUN_JSON)


def test_each_key_of_summary_json_and_column_of_the_table_has_a_meaning():
    run = load_run(EXAMPLE)
    more = {"intervals", "interval_definition", "spread", "stutter", "worst"}

    assert (
        set(summarise(run)) | more == set(meanings.SUMMARY) == set(json.loads((EXAMPLE / "summary.json").read_text()))
    )
    own = set(run.requests.columns) - {"chunk_us", "chunk_tokens"}
    described = set(meanings.REQUEST_TABLE) | {f"server_{name}" for name in METRICS}
    assert own - set(Record.__struct_fields__) - {name for name in own if name.startswith("in_band_")} == described


def test_each_file_of_the_example_has_a_meaning():
    files = {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*") if path.is_file()}

    assert files <= set(meanings.FILES)


def test_the_reference_is_as_the_code_is():
    done = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_no_meaning_in_the_reference_is_empty():
    for page in ("experiment.md", "run-folder.md", "summary.md", "verdict.md", "prometheus.md"):
        rows = re.findall(r"^\| `.*$", (DOCS / "reference" / page).read_text(), re.M)

        assert rows
        assert [row for row in rows if row.replace("\\|", "").split(" | ")[-1].strip(" |") == ""] == []


# what stands in blocks


@dataclass
class Workshop:
    """A folder in which the commands of the docs work: a clone's files, two runs, and a server at an address."""

    folder: Path
    port: int
    pool: ThreadPoolExecutor  # loads mostly wait: several at a time
    begun: dict[str, Future]  # command -> its outcome; what stands on two pages is run once

    def do(self, command):
        """Begin a command; a load goes on while others are begun."""
        if command not in self.begun:
            self.await_folders(command)
            done = Future()
            self.begun[command] = done
            shortened = short(command, self.port)
            if is_load(command):
                self.begun[command] = self.pool.submit(run, shortened, self.folder)
            else:
                done.set_result(run(shortened, self.folder))
        return self.begun[command]

    def await_folders(self, text):
        """Wait for the runs whose folder is read here."""
        for command, outcome in self.begun.items():
            made = re.search(r"--run-folder (\S+)", command)
            if made and made[1] in text:
                outcome.result()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "requests", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "load_test.py", folder)
    for name in ("example", "A", "B"):
        shutil.copytree(EXAMPLE, folder / "output" / name)
    shutil.copy(ROOT / "tests" / "data" / "logs" / "vllm_text.log", folder / "vllm.log")
    (line,) = re.findall(r"^(python -m twoclocks\.schedule_server .*) &$", (DOCS / "quickstart.md").read_text(), re.M)
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, *shlex.split(line.replace("--port 8000", f"--port {port} --until-eof"))[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert json.loads(server.stdout.readline())["url"] == f"http://127.0.0.1:{port}"
    with ThreadPoolExecutor(4) as pool:
        yield Workshop(folder, port, pool, {})
    server.communicate(timeout=20)


def is_load(command):
    return bool(re.match(r"twoclocks run|locust", command))


def short(command, port):
    """The same command, of a second or two, at the test's own addresses. Reports of loads are tested elsewhere."""
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    command = re.sub(r"prometheus_port=9646", lambda _: f"prometheus_port={free_port()}", command)
    command = re.sub(r"load\.duration_s=\d+", "load.duration_s=1", command)
    command = re.sub(r" -t \d+s", " -t 1s", command)
    if is_load(command):
        alone = ["collect.otlp_port=none", "collect.otlp_grpc_port=none", "warmup.requests=1", "load.ramp_s=0"]
        more = [*(f"--set {setting}" for setting in alone), "--set workload.max_tokens=8", "--set load.drain_s=5"]
        command += " " + " ".join([*more, "--no-report"])
        if command.startswith("locust"):
            command += f" --only-summary --master-bind-port {(master := free_port())} --master-port {master}"
    return command


def commands(block):
    """The lines of a block, with those that go on joined, without remarks."""
    lines = [
        line.partition("   #")[0].partition("  # ")[0].strip() for line in block.text.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if line and not line.startswith("#")]


def run(command, folder):
    """Exit code and what was said. What only reads runs in this process, which has its libraries at hand."""
    words = shlex.split(command)
    if words[0] == "twoclocks" and words[1] in ANALYSIS:
        said = []
        with contextlib.chdir(folder), contextlib.redirect_stdout(Tee(said)), contextlib.redirect_stderr(Tee(said)):
            return cli.main(words[1:]), "".join(said)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path[:1]]))}
    done = subprocess.run(
        [shutil.which("bash"), "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


class Tee:
    """Keeps what is written."""

    encoding = "utf-8"

    def __init__(self, said):
        self.said = said

    def write(self, text):
        self.said.append(text)
        return len(text)

    def flush(self):
        """Nothing is held back."""

    def isatty(self):
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_do_what_they_say(page, workshop):
    begun = []
    for block in blocks(page):
        assert block.language in COMMANDS | SHOWN | {"python", "yaml"}, f"{block}: of which language is it?"
        if block.why_not or block.language in SHOWN:
            continue
        if block.language == "yaml":
            path = workshop.folder / "block.yaml"
            path.write_text(block.text)
            with contextlib.chdir(workshop.folder):
                load_experiment(path, environ={})
        elif block.language == "python":
            workshop.await_folders(block.text)
            with contextlib.chdir(workshop.folder), contextlib.redirect_stdout(None):
                exec(compile(block.text, str(block), "exec"), {"__name__": "block"})  # noqa: S102  our own docs
        else:  # but for the server that runs already
            begun += [(block, one, workshop.do(one)) for one in commands(block) if not one.endswith(" &")]
    for block, command, outcome in begun:
        code, said = outcome.result(100)
        allowed = {0, 1} if command.startswith("twoclocks doctor") else {0}  # it is this machine's to be fit

        assert code in allowed, f"{block}: {command}\n{said}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.why_not], ids=str)
def test_what_is_not_run_could_be(block):
    """Options are known, and files are there, or made by a line before or named as missing."""
    if block.language not in COMMANDS:
        return
    for command in commands(block):
        words = shlex.split(command.replace("&&", ";").partition(";")[0])
        if words[0] == "twoclocks":
            options = cli._parser().parse_args(words[1:])
            assert not getattr(options, "experiment", None) or (ROOT / options.experiment).is_file()
            for setting in getattr(options, "set", []):
                load_experiment(ROOT / "configs" / "default.yaml", [setting])
        for before, word in pairwise(words):
            if before in ("-f", "--experiment") or (before.startswith("python") and word.endswith(".py")):
                assert (ROOT / word).is_file(), f"{block}: {word}"


def test_the_doctor_names_are_those_of_the_docs():
    known = {finding.name for finding in findings(WELL, ports(Experiment()))}

    assert told(DOCS / "troubleshooting.md", "The machine") <= known
