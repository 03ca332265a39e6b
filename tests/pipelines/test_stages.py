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
for name in {names}:
    path = Path("data", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step,loss,epoch,AP\\n")
"""
OUTS = {
    "shard": ["shards/people/index.json"],
    "train": ["model/model", "metrics/train.json", "plots/loss.csv", "plots/validation.csv", "plots/curves.svg"],
    "robustness": ["robustness/robustness.json", "metrics/robustness.json", "plots/robustness.csv"],
    "evaluate": ["report/report.html", "metrics/evaluate.json", "plots/parts.csv"],
}


def stand_in(project: Project, *stages: str) -> None:
    """Put in place of stages what only leaves their outputs."""
    for stage in stages:
        (project.folder / f"pipelines/{stage}.py").write_text(STAND_IN.format(names=OUTS[stage]))


def stale(project: Project) -> dict[str, list[str]]:
    """Stages from shards to evaluation that DVC would run again -> what it says has changed."""
    found = json.loads(project.run("dvc", "status", "--json", "shard", "train", "robustness", "evaluate").stdout)
    return {
        stage: [name for changed in changes for what in changed.values() for name in flat(what)]
        for stage, changes in found.items()
    }


def flat(changed: dict) -> list[str]:
    """Names of changed params and files; of `params.yaml` those in it."""
    return [name for key, value in changed.items() for name in (value if isinstance(value, dict) else [key])]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project without any data of its own: its shards lie in `elsewhere`."""
    project = make_project(tmp_path)
    stand_in(project, "train")
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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose stages from shards to evaluation are up to date."""
    project = make_project(tmp_path_factory.mktemp("done"))
    stand_in(project, *OUTS)
    people = {"raw": "people", "reader": "coco", "images": "images.zip", "annotations": "a.json"}
    project.change(data__render={}, data__datasets={"people": people}, data__train=["people"], data__val="people")
    (project.folder / "data/raw/people").mkdir(parents=True)
    (project.folder / "data/raw/pretrained").mkdir()
    project.run("dvc", "repro", "--single-item", "shard", "train", "robustness", "evaluate")
    return project


def test_what_changes_an_evaluation_makes_it_stale_and_not_the_training(done: Project) -> None:
    params = (done.folder / "params.yaml").read_text()
    others = {"person_score": "box", "oks_nms_threshold": None, "keypoint_score_threshold": 0.1, "area": "box"}
    done.change(**{f"evaluate__{name}": value for name, value in {**others, "batch": 3}.items()})
    done.change(train__loader__open_shards=2, train__log_every_steps=3)
    assert {stage: sorted(what) for stage, what in stale(done).items()} == {
        "robustness": sorted(f"evaluate.{name}" for name in others),
        "evaluate": sorted(f"evaluate.{name}" for name in others),
        "train": ["train.loader.open_shards"],  # which orders the pictures
    }
    (done.folder / "params.yaml").write_text(params)


def test_a_fix_in_the_code_makes_its_stages_stale_and_what_python_keeps_beside_it_does_not(done: Project) -> None:
    for room in ("shard", "evaluate", "loader", "model", "train"):
        kept = done.folder / "cigpose" / room / "__pycache__/head.cpython-311.pyc"
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(b"compiled")
    assert stale(done) == {}
    code = {done.folder / f"cigpose/{name}.py": "" for name in ("shard/write", "train/loop", "model/head")}
    for file in code:
        code[file] = file.read_text()
        file.write_text(code[file] + "# a fix\n")
    assert stale(done) == {
        "shard@people": ["cigpose/shard"],
        "robustness": ["cigpose/model"],
        "evaluate": ["cigpose/model"],
    }
    for file, text in code.items():
        file.write_text(text)
