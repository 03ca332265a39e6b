"""A project that has nothing of its own: shards on S3, checkpoints on S3, a registered model here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from project import TINY, make_project
from train_stage import Stage

pytestmark = pytest.mark.slow


def test_shards_and_checkpoints_on_s3_make_a_registered_model(stage: Stage, s3: Any, tmp_path: Path) -> None:
    s3.create_bucket(Bucket="people")
    shards = stage.folder / "data/shards"
    for file in filter(Path.is_file, shards.rglob("*")):
        s3.upload_file(str(file), "people", f"shards/{file.relative_to(shards)}")
    project = make_project(tmp_path / "project")
    project.change(**TINY)
    project.change(
        data__render={},
        data__datasets={},
        data__locations={name: f"s3://people/shards/{name}" for name in ("rendered-train", "rendered-val")},
        train__checkpoint__address="s3://people/run",
        train__loader__cache=str(tmp_path / "cache"),
    )
    project.run("dvc", "repro")
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert (registered["model"], int(registered["version"])) == ("cigpose-quickstart", 1)
    assert sorted(path.name for path in (project.folder / "data/shards").iterdir()) == [
        "rendered-train.json",
        "rendered-val.json",
    ]
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tar", ".lock"}
    kept = [entry["Key"] for entry in s3.list_objects_v2(Bucket="people", Prefix="run/")["Contents"]]
    assert any(key.endswith("/complete.json") for key in kept)
    again = project.run("dvc", "repro").stdout
    assert "Running stage 'locate@rendered-val'" in again and "Running stage 'train'" not in again
