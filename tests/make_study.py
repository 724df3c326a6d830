"""Synthetic study folders for tests: cells made by make_run, changed where a study needs more than a run."""

import json
from pathlib import Path

import msgspec
import yaml
from make_run import make_run

from twoclocks.study import Cell, Skipped, Study


def make_study(folder: Path, cells: list[Cell], *, claims: list[dict] = (), **fields: object) -> Path:
    """study.json and experiment.yaml; the folders of the cells are made by ``make_cell``."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "name": "invented study", "twoclocks_version": "0.1.0", "experiment_file": "x.yaml", "overrides": [],
        "order": "abba", "repeats": max((cell.repeat for cell in cells), default=1),
        "targets": list(dict.fromkeys(cell.target for cell in cells)),
        "variants": list(dict.fromkeys(cell.variant for cell in cells)), "status": "finished",
        "started_at_unix": 1_790_000_000.0, "cells": cells,
    }  # fmt: skip
    (folder / "study.json").write_bytes(msgspec.json.encode(Study(**(given | fields))))
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"name": "invented study", "claims": list(claims)}))
    return folder


def cell(
    number: int, target: str, variant: str = "", repeat: int = 1, status: str = "finished", **fields: object
) -> Cell:
    """A cell of study.json; the time of its start follows its number."""
    name = "-".join(filter(None, (f"{number:02d}", target, variant)))
    given = {"started_at_unix": 1_790_000_000.0 + 60 * number, "folder": name} | fields
    return Cell(number=number, target=target, variant=variant, repeat=repeat, status=status, **given)


def make_cell(
    folder: Path,
    *,
    load: dict | None = None,
    extra_body: dict | None = None,
    memory: list[dict] = (),
    answers: dict[str, str] | None = None,
    batch: int | None = None,
    **run: object,
) -> list[dict]:
    """A run by make_run with these changes; its records as they stand in the end.

    ``answers``: prompt id -> text; ``batch``: every so many requests are due at the same time.
    """
    make_run(folder, **run)
    path = folder / "experiment.yaml"
    experiment = yaml.safe_load(path.read_text())
    experiment["load"] = load or experiment["load"]
    if extra_body is not None:
        experiment["target"] = {"extra_body": extra_body}
    path.write_text(yaml.safe_dump(experiment))
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(meta | ({"memory": list(memory)} if memory else {})))
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: (line["sent_at"] is None, line["sent_at"]))
    measured = [line for line in lines if line["phase"] == "measure" and line["sent_at"] is not None]
    for place, line in enumerate(measured):
        if answers is not None:
            line["output_text"] = answers.get(line["prompt_id"])
        if batch is not None:
            line["intended_at"] = measured[place - place % batch]["intended_at"]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return measured


def skipped(target: str, why: str) -> Skipped:
    """A target that was not there."""
    return Skipped(target, why)
