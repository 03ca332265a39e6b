from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shard_index import shard_index
from train_stage import Stage

from cigpose.config import Config, load_params
from cigpose.config.params_file import write_params
from cigpose.evaluate.checkpoint import dataset_truth, open_shards
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from pipelines.access import Pages, write_pages
from pipelines.retraining import comparison
from pipelines.retraining.artifacts import data_rows, links_of, picture_strip
from pipelines.tracking.address import connect


def guesses(truth: GroundTruth, noise: float) -> Predictions:
    """The labels, with errors."""
    rows = np.flatnonzero(~truth.is_crowd)
    points, boxes = truth.keypoints[rows, :, :2], truth.bbox_xywh[rows]
    errors = np.random.default_rng(0).normal(0, noise, points.shape)
    return Predictions(
        image_id=truth.image_id[rows],
        person_id=truth.annotation_id[rows],
        keypoints=points + errors,
        keypoint_scores=np.ones(points.shape[:2]),
        center=boxes[:, :2],
        scale=boxes[:, 2:],
        bbox_xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        box_score=np.ones(len(rows)),
    )


def version_with(config: Config, root: Path, predictions: Predictions) -> int:
    """A registered version whose run keeps these predictions, as the stage `register` leaves it."""
    address = f"sqlite:///{root}/mlflow.db"
    client = connect(address)
    experiment = client.create_experiment("e", artifact_location=(root / "mlartifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_artifact(run_id, str(predictions.save(root / "predictions.npz")), "evaluation")
    client.create_registered_model(config.registry.model)
    return int(client.create_model_version(config.registry.model, "file:///nowhere", run_id).version)


@pytest.mark.slow
def test_the_table_has_the_champions_figures_beside_the_new_ones_and_how_sure_the_difference_is(
    project: Path, stage: Stage
) -> None:
    config = load_params(stage.folder / "params.yaml")
    truth = dataset_truth(open_shards(config, config.data.val, stage.folder / "data/shards"), config)
    version = version_with(config, project, guesses(truth, 3.0))
    guesses(truth, 0.5).save(stage.folder / "data/report/predictions.npz")
    metrics = {"whole": {"AP": 0.9, "AR": 0.91}, "body": {"AP": 0.95}}
    registered: dict[str, Any] = {"decision": "better", "champion": {"version": version, "value": 0.1}}
    rows = {row["part"]: row for row in comparison.compared_rows(stage.folder, project, metrics, registered)}
    whole = rows["whole"]
    assert (whole["AP"], whole["AR"]) == (0.9, 0.91) and whole["difference"] > 0.1
    low, _, high = whole["95 % interval"].partition(" to ")
    assert 0 < float(low) <= whole["difference"] <= float(high)
    assert 0 <= whole[f"AP of version {version}"] < 1 and {"whole", "body", "face"} <= rows.keys()

    first = comparison.compared_rows(stage.folder, project, metrics, {"decision": "first"})
    assert first == [{"part": "whole", "AP": 0.9, "AR": 0.91}, {"part": "body", "AP": 0.95}]
    registered["champion"]["version"] = 7
    with pytest.raises(comparison.ComparisonError, match=r"no intervals beside version 7: .*not found"):
        comparison.compared_rows(stage.folder, project, metrics, registered)


def test_links_lead_to_run_report_and_version_at_the_port_that_make_ui_took_last(
    project: Path, config: Config, make_config: Callable[..., Config]
) -> None:
    write_params(config, project / "params.yaml")
    registered = {"run_id": "ab12", "experiment_id": "3", "model": "toy", "version": 4}
    assert links_of(registered, project)["The run in MLflow"].startswith("http://127.0.0.1:5000/#/experiments/3/")
    write_pages(project, Pages(prefect="http://127.0.0.1:4205", mlflow="http://127.0.0.1:5017"))
    query = "?workflowType=machine_learning"
    assert links_of(registered, project) == {
        "The run in MLflow": f"http://127.0.0.1:5017/#/experiments/3/runs/ab12{query}",
        "The report": f"http://127.0.0.1:5017/#/experiments/3/runs/ab12/artifacts/evaluation/report.html{query}",
        "The version": f"http://127.0.0.1:5017/#/models/toy/versions/4{query}",
    }
    write_params(make_config(tracking_uri="https://user:pw@mlflow.example/"), project / "params.yaml")
    assert links_of(registered, project)["The version"] == f"https://mlflow.example/#/models/toy/versions/4{query}"
    assert links_of({}, project) == {}


def test_the_strip_is_the_top_of_the_first_contact_sheet_as_a_small_picture(tmp_path: Path) -> None:
    assert picture_strip(tmp_path) is None
    page = np.random.default_rng(0).integers(0, 255, (300, 320, 3), np.uint8)
    page = cv2.resize(page, (1600, 1500), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(str(tmp_path / "page-00.jpg"), page)
    head, _, data = (picture_strip(tmp_path) or "").partition(",")
    assert head == "data:image/jpeg;base64" and len(data) < 300_000
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (480, 960, 3)


def test_data_are_counted_and_named_by_their_digest(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    (tmp_path / "people/index.json").write_text(json.dumps(shard_index("people", 160)))
    (tmp_path / "far.json").write_text(json.dumps(shard_index("far", 12)))
    far, people = data_rows(tmp_path)
    assert (far["dataset"], far["images"], far["persons"]) == ("far", 12, 24)
    assert (people["dataset"], people["images"], people["shards"]) == ("people", 160, 1)
    assert len(people["digest"]) == 16
