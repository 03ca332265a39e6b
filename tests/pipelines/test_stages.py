"""dvc.yaml as DVC reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from project import make_project

pytestmark = pytest.mark.slow

STAND_IN = """
from pathlib import Path
for name in ("model/model", "metrics/train.json", "plots/loss.csv", "plots/validation.csv", "plots/curves.svg"):
    path = Path("data", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step,loss,epoch,AP\\n")
"""


def test_train_runs_without_any_download_and_again_when_the_first_weights_change(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    (tmp_path / "pipelines/train.py").write_text(STAND_IN)
    weights = tmp_path / "data/raw/pretrained/mine.safetensors"
    project.change(
        data__download__sources={}, data__render={}, data__datasets={}, data__locations={"people": "/somewhere"}
    )
    project.change(data__train=["people"], data__val="people")
    (tmp_path / "data/shards").mkdir()
    project.run("dvc", "repro", "train")
    project.change(model__backbone__pretrained=weights.name)
    failed = project.run("dvc", "repro", "train", check=False)
    assert failed.returncode and "neither in the download table nor in data/raw/pretrained" in failed.stdout
    weights.write_bytes(b"first")
    project.run("dvc", "repro", "train")
    assert json.loads(project.run("dvc", "status", "--json", "train").stdout) == {}
    weights.write_bytes(b"second")
    status = json.loads(project.run("dvc", "status", "--json", "train").stdout)
    assert {"changed deps": {"data/raw/pretrained": "modified"}} in status["train"]
