"""The tester's image: its Dockerfile's steps carried out in a root of its own, and a run in it as compose starts it."""

import json
import os
import shlex
import sys

import pytest
import yaml
from dockerfile import Image, context, needs_roots, parse
from locust_runs import ROOT, only_run

from twoclocks.load import load_run

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
TESTER = COMPOSE["services"]["tester"]
USER = "12345:12345"  # owns nothing, is nobody's name, and has no home
FAKE = ["--ttft-ms", "50", "--tpot-ms", "5"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    needs_roots()
    folder = tmp_path_factory.mktemp("image")
    folder.chmod(0o755)
    for parent in list(folder.parents)[:2]:
        parent.chmod(0o755)  # pytest's are closed to other users
    built: dict[str, Image] = {}
    for number, stage in enumerate(parse(ROOT / "Dockerfile")):
        made = Image(stage, folder / str(number), built)
        built[stage.name or str(number)] = made
    return made


def compose_run(image, folder, *words, user=USER, server=True):
    """`docker compose run tester`, with a server of known times in place of the model's; its exit code and output."""
    output, shared = folder / "output", folder / "server"
    for made in (output, shared):
        made.mkdir(exist_ok=True)
    if user == USER:
        os.chown(output, 12345, 12345)
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost server tester\n")
    program = shlex.join([sys.executable, "-m", "twoclocks.schedule_server", "--port", "8000", *FAKE])
    talking = f"{program} & while sleep 0.1; do echo tick; done"  # a server that logs
    serve = [sys.executable, ROOT / "deploy" / "serve.py", shared, "other", "schedule", "sh", "-c", talking]
    beside = f"mount --bind {hosts} $R/etc/hosts\n"
    if server:
        beside += f"cd {ROOT}; {shlex.join(map(str, serve))} > {folder}/served.txt 2>&1 &\n"
        beside += f"until grep -q http {folder}/served.txt; do sleep 0.1; done"
    binds = [(output, "/app/output", "rw"), (ROOT / "configs", "/app/configs", "ro"), (shared, "/server", "ro")]
    binds += [(ROOT / "requests", "/app/requests", "ro")]
    environ = image.env | {"PYTHONPATH": "/deps"}
    return image.run(
        [*image.entrypoint, *(words or image.command)], environ=environ, user=user, binds=binds, beside=beside
    )


@pytest.fixture(scope="module")
def ran(image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    done = compose_run(
        image, folder, *image.command, "--set", "load.users=2", "--set", "load.ramp_s=1", "--set", "load.duration_s=2"
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout, only_run(folder / "output")


def test_a_run_in_the_image_ends_with_a_report(ran):
    _, _, folder = ran

    assert "<html" in (folder / "report.html").read_text()
    assert (folder / "plots" / "client_vs_server_violin.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "summary.json").read_text())["figures"]["requests"]["value"] > 10
    assert {path.stat().st_uid for path in folder.rglob("*")} == {12345}


def test_it_is_wired_to_the_server_beside_it(ran):
    _, output, made = ran
    written = yaml.safe_load((made / "experiment.yaml").read_text())
    run = load_run(made)

    assert (run.requests["status"] == "ok").all()
    assert run.meta["target"]["url"] == "http://server:8000"
    assert (run.meta["target"]["server"], run.meta["target"]["model"]) == ("other", "schedule")
    assert written["collect"]["otlp_host"] == written["export"]["host"] == "0.0.0.0"  # noqa: S104
    assert written["collect"]["log"] == "file:/server/other.log"
    assert "http://0.0.0.0:9646/metrics" in output


def test_the_servers_log_reaches_the_run_by_the_shared_folder(ran):
    folder, _, made = ran
    copied = (made / "server.log").read_text()

    assert copied.startswith("tick\n")
    assert copied in (folder / "server" / "other.log").read_text()


def test_it_has_the_native_reader(ran):
    assert ran[2].joinpath("run.json").read_text().count('"native"') == 1


def test_an_output_folder_of_somebody_else_is_one_line_that_says_what_to_do(image, tmp_path):
    done = compose_run(image, tmp_path, "--headless", user="54321:54321", server=False)

    assert done.returncode == 2
    assert done.stdout == (
        "twoclocks: ./output cannot be written by user 54321 of the container; it belongs to user 0: put TESTER_UID=0 "
        "and TESTER_GID=0 into .env\n"
    )


def test_other_commands_run_as_they_stand(image, tmp_path):
    done = compose_run(image, tmp_path, "twoclocks", "--help", server=False)

    assert done.returncode == 0
    assert done.stdout.startswith("usage: twoclocks")


def test_the_build_sees_no_secret_no_run_and_no_tests():
    there = context()

    assert {"pyproject.toml", "load_test.py", "twoclocks/_native.c", "requests/demo.jsonl"} <= set(there)
    assert not [path for path in there if path.startswith((".", "output/", "tests/", "docs/"))]


def test_what_is_left_in_the_image_is_what_runs(image):
    tools = {path.name for path in (image.root / "opt" / "twoclocks" / "bin").iterdir()}

    assert "twoclocks" in tools
    assert not {tool for tool in tools if tool.startswith("pip")}
    assert image.user == "1000:1000"
    assert image.skipped == []
    assert not (image.root / "src").exists()
