"""deploy/kubernetes: against the API's own schemas, and what the parts of a fleet must have in common."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from twoclocks.experiment import load_experiment

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMAS = json.loads((Path(__file__).parent / "data" / "kubernetes" / "v1.30.json").read_text())


def objects(path):
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def built(variant) -> list[dict]:
    """The files of a variant as kustomize would gather them: those that it names, and those of its base."""
    made, folders = [], [FOLDER / variant]
    for folder in folders:
        for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
            path = (folder / name).resolve()
            if path.is_dir():
                folders.append(path)
            else:
                made += objects(path)
    return made


def of_kind(made, *kinds):
    return [one for one in made if one["kind"] in kinds]


def pods(made):
    """Component -> pod spec and labels."""
    templates = [one["spec"]["template"] for one in of_kind(made, "Deployment", "Job")]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one for one in templates}


def options(pod) -> list[str]:
    (container,) = pod["spec"]["containers"]
    return [str(word) for word in container["args"]]


@pytest.mark.parametrize(
    "path",
    sorted(path for path in FOLDER.rglob("*.yaml") if path.name not in ("kustomization.yaml", "experiment.yaml")),
)
def test_each_object_is_one_of_the_api(path):
    for made in objects(path):
        name = SCHEMAS["kinds"][f"{made['apiVersion']}/{made['kind']}"]
        jsonschema.validate(made, {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]})


def test_the_schemas_refuse_what_the_api_does_not_know():
    made = objects(FOLDER / "web" / "workers.yaml")[0]
    made["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(jsonschema.ValidationError, match="readOnly"):
        jsonschema.validate(made, {"$ref": "#/$defs/io.k8s.api.apps.v1.Deployment", "$defs": SCHEMAS["$defs"]})


@pytest.mark.parametrize("variant", ["web", "job"])
def test_workers_find_the_master_and_nobody_else_does(variant):
    made = built(variant)
    master, worker = pods(made)["master"], pods(made)["worker"]
    (service,) = of_kind(made, "Service")
    shut, opened = of_kind(made, "NetworkPolicy")
    (port,) = master["spec"]["containers"][0]["ports"]
    words = options(worker)

    assert words[words.index("--master-host") + 1] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= master["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["ports"][0]["port"] == port["containerPort"] == 5557  # Locust's own
    assert "0.0.0.0" in options(master)  # noqa: S104  (in the pod, behind the policy)
    assert shut["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": []}
    assert opened["spec"]["podSelector"]["matchLabels"].items() <= master["metadata"]["labels"].items()
    ((rule,),) = [opened["spec"]["ingress"]]
    assert [one["podSelector"]["matchLabels"] for one in rule["from"]] == [worker["metadata"]["labels"]]
    assert rule["ports"] == [{"protocol": "TCP", "port": port["name"]}]


@pytest.mark.parametrize("variant", ["web", "job"])
def test_master_and_workers_have_the_same_experiment_and_no_key_stands_in_a_file(variant):
    specs = [pod["spec"]["containers"][0] for pod in pods(built(variant)).values()]
    same = [
        (
            one["image"],
            one["command"],
            one["env"],
            one["envFrom"],
            [v for v in one["volumeMounts"] if v["name"] != "output"],
        )
        for one in specs
    ]
    text = "".join(path.read_text() for path in FOLDER.rglob("*.yaml"))

    assert same[0] == same[1]
    assert specs[0]["env"] == [{"name": "TWOCLOCKS_EXPERIMENT", "value": "/experiment/experiment.yaml"}]
    assert specs[0]["envFrom"] == [{"secretRef": {"name": "twoclocks-keys", "optional": True}}]
    assert not of_kind(built(variant), "Secret")
    assert not re.search(r"(?i)\b(password|token|api[-_]?key)\s*:\s*[\"']?\w", text)


def test_no_pod_may_do_more_than_it_must():
    specs = [one["spec"] for one in objects(FOLDER / "fetch" / "pod.yaml")]
    specs += [pod["spec"] for variant in ("web", "job") for pod in pods(built(variant)).values()]
    for spec in specs:
        (container,) = spec["containers"]

        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"] == container["resources"]["requests"]
    (namespace,) = objects(FOLDER / "base" / "namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_each_image_is_one_that_kustomize_replaces():
    """Where the cluster finds it, a user says in the kustomization: it must reach every pod."""
    for folder in ("web", "job", "fetch"):
        names = {one["name"] for one in yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["images"]}
        specs = [one["spec"] for one in of_kind(built(folder), "Pod")]
        specs += [pod["spec"] for pod in pods(built(folder)).values()]

        assert {container["image"] for spec in specs for container in spec["containers"]} == names


def test_the_job_waits_for_as_many_workers_as_there_are():
    made = built("job")
    words = options(pods(made)["master"])
    (workers,) = [one["spec"] for one in of_kind(made, "Job") if one["metadata"]["name"] == "workers"]

    assert int(words[words.index("--expect-workers") + 1]) == workers["parallelism"] == workers["completions"]


def test_the_experiment_can_be_loaded_and_its_requests_are_in_the_image():
    experiment = load_experiment(FOLDER / "base" / "experiment.yaml")

    assert (ROOT / experiment.workload.requests).exists()
    assert re.search(r"^COPY requests ", (ROOT / "Dockerfile").read_text(), re.M)


def test_locust_knows_every_option():
    told = subprocess.run(
        [str(Path(sys.executable).with_name("locust")), "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"--[\w-]+", told))
    for variant in ("web", "job"):
        for pod in pods(built(variant)).values():
            assert {word for word in options(pod) if word.startswith("--")} <= known


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, whose kustomize then builds the same")
@pytest.mark.parametrize("variant", ["web", "job"])
def test_kustomize_builds_it(variant):
    told = subprocess.run(
        shlex.split(f"kubectl kustomize {FOLDER / variant}"), capture_output=True, text=True, check=True, timeout=60
    ).stdout
    made = [one for one in yaml.safe_load_all(told) if one]
    (service,) = of_kind(made, "Service")
    master = pods(made)["master"]

    assert len(made) == len(built(variant)) + 1  # the ConfigMap
    assert service["spec"]["selector"].items() <= master["metadata"]["labels"].items()
    (config,) = of_kind(made, "ConfigMap")
    for pod in pods(made).values():
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        assert volumes["experiment"]["configMap"]["name"] == config["metadata"]["name"]
