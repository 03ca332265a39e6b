"""`dvc repro` from nothing to a registered model, on rendered people and on real photographs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
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


def test_real_people_are_learnt_by_heart_from_their_archives_to_a_registered_champion(
    tmp_path: Path, mirror: str
) -> None:
    """COCO-WholeBody as its hosts serve it, and a small model on its few people: their own AP comes near 1."""
    project = make_project(tmp_path)
    small = yaml.safe_load((project.folder / "params.yaml").read_text())
    project.run(sys.executable, "-m", "cigpose.cli.main", "use", "cigpose-m_coco-wholebody_256x192")
    values = yaml.safe_load((project.folder / "params.yaml").read_text())
    values |= {section: small[section] for section in ("model", "augmentation", "train", "evaluate")}
    values["data"]["datasets"]["coco-wholebody-train"]["ground_truth"] = True
    (project.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    still = {"shift_factor": 0.0, "scale_range": [1.0, 1.0], "rotate_degrees": 0.0, "hsv_delta": [0, 0, 0]}
    epochs = 240  # of one step: there are eight people
    project.change(
        data__download__mirror=mirror,
        data__val="coco-wholebody-train",
        augmentation__stage1={**small["augmentation"]["stage1"], **still},
        model__causal__train_top_k=1,  # as many as are replaced at evaluation
        train__epochs=epochs,
        train__schedule={
            "warmup_steps": 50,
            "cosines": [{"begin_epoch": 0, "end_epoch": epochs, "final_factor": 0.01}],
        },
        train__validate_every_epochs=epochs,
        train__checkpoint__every_minutes=10.0,
        train__cluster__num_workers=1,
    )
    project.commit("before")
    project.run("dvc", "repro", timeout_s=900)
    for part, figures in metrics(project).items():
        assert figures["AP"] > 0.85, (part, metrics(project))
    assert metrics(project)["whole"]["AP"] > 0.9
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert (registered["model"], registered["alias"]) == ("cigpose-m-coco-wholebody", "champion")
    val = project.run("cigpose", "evaluate", "--dataset", "coco-wholebody-val", "--boxes", "detections").stdout
    assert "| whole |" in val
