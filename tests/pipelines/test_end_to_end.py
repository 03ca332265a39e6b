"""`dvc repro` from nothing to a registered model on rendered people, and what DVC shows of it."""

from __future__ import annotations

import json
import shutil

import pytest
from mlflow import MlflowClient
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


def test_the_main_job_ends_with_a_registered_model_which_is_no_champion_before_it_has_learnt(project: Project) -> None:
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert registered["model"] == "cigpose-quickstart"
    assert int(registered["version"]) == 1
    assert registered["alias"] == "challenger"
    assert "did the training get anywhere?" in registered["decision_text"]
    assert 0 <= metrics(project)["whole"]["AP"] <= 1
    assert metrics(project)["whole_onnx"]["AP"] == pytest.approx(metrics(project)["whole"]["AP"], abs=0.02)
    assert list((project.folder / "data/report/pictures").glob("*.jpg"))


def test_a_second_run_only_asks_mlflow_whether_it_has_the_version(project: Project) -> None:
    before = (project.folder / "dvc.lock").read_bytes(), (project.folder / "data/registered.json").read_bytes()
    output = project.run("dvc", "repro").stdout
    assert [line for line in output.splitlines() if line.startswith("Running stage")] == ["Running stage 'register':"]
    after = (project.folder / "dvc.lock").read_bytes(), (project.folder / "data/registered.json").read_bytes()
    assert after == before


def test_a_database_that_was_deleted_is_noticed_and_gets_everything_again(project: Project) -> None:
    for path in [project.folder / "mlartifacts", project.folder / ".runs", *project.folder.glob("mlflow.db*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = project.run("dvc", "repro").stdout
    assert "version 1, alias challenger" in output
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    version = client.get_model_version("cigpose-quickstart", "1")
    found = {file.path for file in client.list_artifacts(version.run_id)}
    assert {"params.yaml", "curves.svg", "evaluation", "training", "validation"} <= found
    run = client.get_run(version.run_id)
    assert run.data.params["train.epochs"] == "2" and "train/loss" in run.data.metrics


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
        assert set(json.loads(project.run("dvc", "status", "--json").stdout)) == {"register"}  # which always asks
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
    # The README's command for fewer workers than the paper's.
    project.run("dvc", "exp", "run", "-S", "train.cluster.num_workers=1", "-S", "train.accumulate_steps=8")
    try:
        assert "train.accumulate_steps" in project.run("dvc", "params", "diff").stdout
        assert "train" in project.run("dvc", "metrics", "diff", "--all").stdout
        registered = json.loads((project.folder / "data/registered.json").read_text())
        assert int(registered["version"]) == 2
    finally:
        project.run("git", "checkout", "-q", "--", ".")
        project.run("dvc", "checkout", "-q", check=False)
