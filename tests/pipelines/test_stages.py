"""dvc.yaml as DVC reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from project import Project, make_project
from shard_index import shard_index

pytestmark = pytest.mark.slow

STAND_IN = """
from pathlib import Path
for name in ("model/model", "metrics/train.json", "plots/loss.csv", "plots/validation.csv", "plots/curves.svg"):
    path = Path("data", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step,loss,epoch,AP\\n")
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project without any data of its own: its shards lie in `elsewhere`."""
    project = make_project(tmp_path)
    (tmp_path / "pipelines/train.py").write_text(STAND_IN)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/index.json").write_text(json.dumps(shard_index("people", 4)))
    elsewhere = {"people": str(tmp_path / "elsewhere")}
    project.change(data__download__sources={}, data__render={}, data__datasets={}, data__locations=elsewhere)
    project.change(data__train=["people"], data__val="people")
    return project


def status(project: Project) -> dict:
    """What `dvc status train` says of the stage and all before it."""
    return json.loads(project.run("dvc", "status", "--json", "train").stdout)


def test_shards_that_change_elsewhere_make_training_stale_and_the_same_ones_do_not(project: Project) -> None:
    project.run("dvc", "repro", "train")
    again = project.run("dvc", "repro", "train").stdout
    assert "Running stage 'locate@people'" in again and "Running stage 'train'" not in again
    (project.folder / "elsewhere/index.json").write_text(json.dumps(shard_index("people", 4, ("11" * 32,))))
    output = project.run("dvc", "repro", "locate").stdout
    assert f"{project.folder}/elsewhere: 1 shards, 8 persons" in output
    assert status(project)["train"] == [{"changed deps": {"data/shards": "modified"}}]
    (project.folder / "elsewhere/index.json").unlink()
    failed = project.run("dvc", "repro", "train", check=False)
    assert failed.returncode and "elsewhere/index.json: not found" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert (project.folder / "data/shards/people.json").is_file()


def test_train_runs_without_any_download_and_again_when_the_first_weights_change(project: Project) -> None:
    weights = project.folder / "data/raw/pretrained/mine.safetensors"
    project.run("dvc", "repro", "train")
    project.change(model__backbone__pretrained=weights.name)
    failed = project.run("dvc", "repro", "train", check=False)
    assert failed.returncode and "neither in the download table nor in data/raw/pretrained" in failed.stdout
    weights.write_bytes(b"first")
    project.run("dvc", "repro", "train")
    assert "train" not in status(project)
    weights.write_bytes(b"second")
    assert {"changed deps": {"data/raw/pretrained": "modified"}} in status(project)["train"]
