"""`dvc repro` from nothing to a registered model, on rendered people and on real photographs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from project import TINY, Project, make_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny quickstart, run once to its end and committed."""
    project = make_project(tmp_path_factory.mktemp("rendered"))
    project.change(**TINY)
    project.commit("before")
    project.run("dvc", "repro")
    project.commit("after")
    return project


def metrics(project: Project) -> dict:
    return json.loads((project.folder / "data/metrics/evaluate.json").read_text())


def test_the_main_job_ends_with_a_registered_champion(project: Project) -> None:
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert registered["model"] == "cigpose-quickstart"
    assert int(registered["version"]) == 1
    assert registered["alias"] == "champion"
    assert 0 <= metrics(project)["whole"]["AP"] <= 1
    assert list((project.folder / "data/report/pictures").glob("*.jpg"))


def test_a_second_run_does_nothing_and_says_so(project: Project) -> None:
    output = project.run("dvc", "repro").stdout
    assert "Running stage" not in output
    assert "Data and pipelines are up to date" in output


def test_a_changed_train_parameter_makes_only_training_and_what_follows_stale(project: Project) -> None:
    before = (project.folder / "params.yaml").read_text()
    project.change(train__optimizer={"learning_rate": 0.002, "learning_rate_batch": 8})
    try:
        status = project.run("dvc", "status").stdout
    finally:
        (project.folder / "params.yaml").write_text(before)
    assert "train:" in status
    assert "render" not in status.replace("data/shards/rendered", "")
    assert "shard@" not in status


def test_a_log_setting_makes_nothing_stale(project: Project) -> None:
    before = (project.folder / "params.yaml").read_text()
    project.change(train__log_every_steps=3)
    try:
        assert "up to date" in project.run("dvc", "status").stdout
    finally:
        (project.folder / "params.yaml").write_text(before)


def test_dvc_shows_graph_metrics_params_and_plots(project: Project) -> None:
    assert "register" in project.run("dvc", "dag", "--mermaid").stdout
    assert "whole.AP" in project.run("dvc", "metrics", "show").stdout
    project.run("dvc", "plots", "show", "--out", "plots")
    page = (project.folder / "plots/index.html").read_text()
    assert "Training loss" in page
    assert "curves.svg" in page


def test_an_experiment_overrides_params_and_shows_its_difference(project: Project) -> None:
    project.run("dvc", "exp", "run", "-S", "train.optimizer.learning_rate=0.003", "--name", "faster")
    try:
        assert "train.optimizer.learning_rate" in project.run("dvc", "params", "diff").stdout
        assert "train" in project.run("dvc", "metrics", "diff", "--all").stdout
        registered = json.loads((project.folder / "data/registered.json").read_text())
        assert int(registered["version"]) == 2
    finally:
        project.run("git", "checkout", "-q", "--", ".")
        project.run("dvc", "checkout", "-q", check=False)


def test_real_photographs_from_their_archives_to_a_registered_model(tmp_path: Path, mirror: str) -> None:
    """COCO-WholeBody as its hosts serve it: download, shard, train two epochs, evaluate on val, register."""
    project = make_project(tmp_path)
    project.run(sys.executable, "-m", "cigpose.cli", "use", "cigpose-m_coco-wholebody_256x192")
    values = yaml.safe_load((project.folder / "params.yaml").read_text())
    values["data"]["download"]["mirror"] = mirror
    (project.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    project.commit("before")
    overrides = {
        "train.epochs": "2",
        "train.batch_total": "4",
        "train.loss_batch": "4",
        "train.validate_every_epochs": "2",
        "train.cluster.num_workers": "1",
        "train.loader.processes": "0",
        "model.backbone.pretrained": "null",
        "data.download.sources.pretrained": "[]",
    }
    flags = [part for key, value in overrides.items() for part in ("-S", f"{key}={value}")]
    project.run("dvc", "exp", "run", *flags)
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert registered["model"] == "cigpose-m-coco-wholebody"
    assert metrics(project)["whole"]["AP"] >= 0
