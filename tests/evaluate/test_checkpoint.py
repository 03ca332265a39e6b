from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.cli.main import main
from cigpose.config import Config, load_preset
from cigpose.evaluate.checkpoint import (
    Evaluation,
    dataset_truth,
    evaluate_checkpoint,
    open_shards,
    predict_share,
    refuse_incomplete,
    sample_pictures,
)
from cigpose.evaluate.predictions import Predictions
from cigpose.model.weights import load_checkpoint

from .conftest import PERSONS_PER_IMAGE, Project, make_config


def evaluated(project: Project, config: Config, **options: Any) -> Evaluation:
    found = evaluate_checkpoint(project.checkpoint, config, shards_root=project.shards, device="cpu", **options)
    assert found is not None
    return found


def test_every_person_is_predicted_once(project: Project) -> None:
    found = evaluated(project, project.config)
    assert sorted(found.predictions.person_id) == list(range(100, 100 + sum(PERSONS_PER_IMAGE)))
    assert len(found.truth.images) == len(PERSONS_PER_IMAGE)
    assert set(found.metrics) >= {"body/AP", "body/AR"}


def test_three_workers_together_measure_what_one_measures(project: Project) -> None:
    alone = evaluated(project, project.config)
    shards = open_shards(project.config, "people", project.shards)
    model = load_checkpoint(project.checkpoint)
    shares = [predict_share(model, project.config, shards, project.shards, "cpu", rank, 3) for rank in (1, 2)]
    together = evaluated(project, project.config, rank=0, world=3, gather=lambda share: [share, *shares])
    assert together.metrics == alone.metrics
    gathered: list[Predictions] = []
    other = evaluate_checkpoint(
        project.checkpoint,
        project.config,
        shards_root=project.shards,
        device="cpu",
        rank=1,
        world=3,
        gather=gathered.append,
    )
    assert other is None and len(gathered[0]) == len(shares[0])


def test_detected_boxes_are_all_predicted(project: Project) -> None:
    found = evaluated(project, make_config(boxes="detections"))
    assert len(found.predictions) == 2 * sum(PERSONS_PER_IMAGE)
    assert sorted(set(found.predictions.box_score.round(3))) == [0.5, 0.9]


def test_a_person_missing_or_twice_is_an_error(project: Project) -> None:
    found = evaluated(project, project.config)
    shards = open_shards(project.config, "people", project.shards)
    everyone = np.arange(len(found.predictions))
    for rows, number in ((everyone[1:], 9), (np.r_[everyone, 0], 11)):
        with pytest.raises(ValueError, match=rf"{number} predictions of .* the index lists 10"):
            refuse_incomplete(found.predictions.select(rows), shards, project.config)


def test_a_model_of_other_keypoints_is_refused(project: Project) -> None:
    wrong = dataclasses.replace(load_preset("quickstart"), data=project.config.data)
    with pytest.raises(ValueError, match=r"predicts 17 keypoints \(coco\), but params.yaml asks for 133"):
        evaluate_checkpoint(project.checkpoint, wrong, shards_root=project.shards)


def test_several_workers_need_a_way_to_gather(project: Project) -> None:
    with pytest.raises(ValueError, match="2 workers need a `gather`"):
        evaluate_checkpoint(project.checkpoint, project.config, shards_root=project.shards, world=2)


def test_shards_without_ground_truth_are_refused(project: Project) -> None:
    shards = open_shards(project.config, "people", project.shards)
    without = dataclasses.replace(shards, index=dataclasses.replace(shards.index, ground_truth=None))
    with pytest.raises(ValueError, match=r"has no ground truth\. Set data\.datasets\.people\.ground_truth: true"):
        dataset_truth(without, project.config)


def _bigger_areas(truth: dict[str, Any]) -> None:
    for annotation in truth["annotations"]:
        annotation["area"] *= 100


def _moved_keypoint(truth: dict[str, Any]) -> None:
    truth["annotations"][0]["keypoints"][0] += 50


def _person_less(truth: dict[str, Any]) -> None:
    truth["annotations"].pop()


@pytest.mark.parametrize("change", [_bigger_areas, _moved_keypoint, _person_less])
def test_labels_changed_behind_the_index_are_refused(project: Project, tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "people"
    shutil.copytree(project.shards / "people", folder)
    assert len(dataset_truth(open_shards(project.config, "people", tmp_path), project.config))
    truth = json.loads((folder / "annotations.json").read_text())
    change(truth)
    (folder / "annotations.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=r"people/annotations.json: sha256 is \w+\.\.\., index.json says \w+"):
        dataset_truth(open_shards(project.config, "people", tmp_path), project.config)


def test_labels_beside_an_index_of_format_1_have_no_digest_and_are_read(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "people"
    shutil.copytree(project.shards / "people", folder)
    index = json.loads((folder / "index.json").read_text())
    del index["ground_truth_sha256"]
    (folder / "index.json").write_text(json.dumps({**index, "format": 1}))
    assert len(dataset_truth(open_shards(project.config, "people", tmp_path), project.config))


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 3), (100, 6)])
def test_sample_pictures_are_spread_over_the_dataset(project: Project, count: int, expected: int) -> None:
    shards = open_shards(project.config, "people", project.shards)
    found = list(sample_pictures(shards, count))
    assert len(found) == expected and len({image_id for image_id, _ in found}) == expected
    assert all(image.shape == (120, 160, 3) for _, image in found)
    if count == 3:
        assert {found[0][0], found[-1][0]} == {1, 7}


def test_the_command_line_prints_the_table_and_writes_what_is_asked(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(project.checkpoint), "--params", str(project.folder / "params.yaml")]
    options += ["--shards", str(project.shards), "--device", "cpu", "--out", str(tmp_path), "--corruptions"]
    assert main(["evaluate", *options]) == 0
    printed = capsys.readouterr().out
    assert "| body |" in printed and "| part | clean | blur | jpeg | low_light | noise | occlusion |" in printed
    assert set(json.loads((tmp_path / "metrics.json").read_text())["body"]) >= {"AP", "AR"}
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)
    assert main(["evaluate", *options, "--dataset", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


@pytest.mark.slow  # exports the model
def test_the_stage_writes_report_metrics_and_plot(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import evaluate

    monkeypatch.chdir(project.folder)
    assert evaluate.main([]) == 0
    assert "people: body/AP" in capsys.readouterr().out
    metrics = json.loads(Path("data/metrics/evaluate.json").read_text())
    assert set(metrics) == {"body"}
    assert Path("data/plots/parts.csv").read_text().startswith("part,AP,AP50,AP75,AR\nbody,")
    written = {file.relative_to("data/report").as_posix() for file in Path("data/report").rglob("*.*")}
    assert written == {
        *("results.json", "predictions.npz", "report.html", "model.onnx", "pictures/page-00.jpg"),
    }
    assert cv2.imread("data/report/pictures/page-00.jpg") is not None
    page = Path("data/report/report.html").read_text()
    assert "<dd>ground truth</dd>" in page and "PCK@0.05" in page
    assert len(Predictions.load("data/report/predictions.npz")) == 10


def test_as_many_pictures_are_drawn_as_params_ask_for_and_not_as_the_model_was_trained_with(project: Project) -> None:
    asked = dataclasses.replace(project.config.registry, pictures=1)
    evaluation = evaluated(project, dataclasses.replace(project.config, registry=asked))
    assert evaluation.config.registry == asked


def test_the_stage_fails_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import evaluate

    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 1
    assert capsys.readouterr().err.startswith("evaluate: params.yaml: not found")
