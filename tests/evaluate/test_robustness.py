from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from cigpose.config import EvaluateConfig
from cigpose.evaluate.coco import evaluate_predictions, run_part, score_persons
from cigpose.evaluate.ground_truth import load_ground_truth
from cigpose.evaluate.paired import compare_paired, paired_table
from cigpose.evaluate.predictions import Predictions
from cigpose.evaluate.robustness import CORRUPTIONS, CorruptionTable, corrupted
from cigpose.keypoints import COCO


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 200, (4, 12, 9, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return {"crops": torch.from_numpy(smooth.astype(np.uint8)), "keys": [f"set/{i}#{i}" for i in range(4)]}


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_changes_every_crop_and_depends_on_the_person_alone(name: str) -> None:
    rows = batch()
    crops = next(corrupted([rows], name))["crops"]
    assert crops.dtype == torch.uint8 and crops.shape == rows["crops"].shape
    assert all((crops[i] != rows["crops"][i]).any() for i in range(4))
    turned = {"crops": rows["crops"].flip(0), "keys": rows["keys"][::-1]}
    assert torch.equal(next(corrupted([turned], name))["crops"].flip(0), crops)


def test_occlusion_covers_a_tenth_of_the_crop() -> None:
    rows = {"crops": torch.zeros(20, 96, 72, 3, dtype=torch.uint8), "keys": [f"set/{i}#0" for i in range(20)]}
    covered = next(corrupted([rows], "occlusion"))["crops"].any(dim=3).float().mean(dim=(1, 2))
    assert ((covered > 0.09) & (covered < 0.11)).all()


def test_unknown_corruptions_are_refused() -> None:
    with pytest.raises(ValueError, match="'fog' is not known, expected one of blur, jpeg"):
        next(corrupted([batch()], "fog"))


def test_the_table_shows_what_each_corruption_costs() -> None:
    table = CorruptionTable(
        clean={"body/AP": 0.8, "face/AP": -1.0}, corrupted={"blur": {"body/AP": 0.7, "face/AP": -1.0}}
    )
    assert table.drop("blur", "body") == pytest.approx(0.1)
    assert table.to_markdown().splitlines()[2:] == ["| body | 0.800 | -0.100 |", "| face | - | - |"]


def scenes(num: int, noise: float, seed: int) -> tuple[Predictions, dict[str, Any]]:
    """Two persons per picture, predicted with an error; the last picture has no person."""
    rng = np.random.default_rng(0)
    images = [{"id": i + 1, "width": 400, "height": 300} for i in range(num + 1)]
    annotations = []
    for image_id in range(1, num + 1):
        for side in range(2):
            points = rng.uniform((200 * side, 0), (200 * side + 150, 250), (17, 2))
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": 20000.0}
            row |= {"bbox": [200.0 * side, 0.0, 150.0, 250.0], "num_keypoints": 17}
            annotations.append(row | {"keypoints": np.c_[points, np.full(17, 2)].ravel().tolist()})
    labels = np.array([row["keypoints"] for row in annotations]).reshape(-1, 17, 3)
    rng = np.random.default_rng(seed)
    predictions = Predictions(
        image_id=np.array([row["image_id"] for row in annotations]),
        person_id=np.array([row["id"] for row in annotations]),
        keypoints=labels[..., :2]
        + rng.normal(0, noise, labels[..., :2].shape) * rng.uniform(0, 2, (len(labels), 1, 1)),
        keypoint_scores=rng.uniform(0.3, 1, labels.shape[:2]),
        center=np.full((len(labels), 2), 100.0),
        scale=np.full((len(labels), 2), 250.0),
        bbox_xyxy=np.tile([0.0, 0, 150, 250], (len(labels), 1)),
        box_score=rng.uniform(0.5, 1, len(labels)),
    )
    return predictions, {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def test_paired_figures_are_those_of_pycocotools_and_the_interval_holds_the_difference() -> None:
    first, second = scenes(25, 8.0, 1), scenes(25, 14.0, 2)
    config = EvaluateConfig()
    pair = [(predictions, load_ground_truth(truth, COCO)) for predictions, truth in (first, second)]
    (found,) = compare_paired(pair[0], pair[1], COCO, config, samples=100)
    expected = [evaluate_predictions(*both, COCO, config)["body/AP"] for both in (first, second)]
    assert [found.first, found.second] == pytest.approx(expected, abs=1e-12)
    assert found.low < found.difference < found.high < 0
    assert "| body |" in paired_table([found], ("with", "without")) and found.scenes == 26


def test_equal_predictions_differ_by_nothing() -> None:
    predictions, truth = scenes(6, 10.0, 3)
    labels = load_ground_truth(truth, COCO)
    (found,) = compare_paired((predictions, labels), (predictions, labels), COCO, EvaluateConfig(), samples=20)
    assert found.difference == found.low == found.high == 0.0


def test_images_drawn_twice_count_twice() -> None:
    predictions, truth = scenes(5, 12.0, 4)
    doubled = {**truth, "images": list(truth["images"]), "annotations": list(truth["annotations"])}
    copies = []
    for row in truth["annotations"]:
        if row["image_id"] == 2:
            copies.append({**row, "id": row["id"] + 1000, "image_id": 99})
    doubled["images"].append({"id": 99, "width": 400, "height": 300})
    doubled["annotations"] += copies
    again = predictions.select(predictions.image_id == 2)
    again = dataclasses.replace(again, image_id=np.full(len(again), 99))
    twice = Predictions.concatenate([predictions, again])
    labels = load_ground_truth(truth, COCO)
    run = run_part(score_persons(predictions, labels, COCO, EvaluateConfig()), labels, COCO, range(17))
    weights = np.array([1, 2, 1, 1, 1, 1])
    expected = evaluate_predictions(twice, doubled, COCO, EvaluateConfig())["body/AP"]
    assert run.matches.average_precision(weights) == pytest.approx(expected, abs=1e-12)


def test_datasets_without_a_common_scene_cannot_be_paired() -> None:
    predictions, truth = scenes(2, 10.0, 5)
    first = load_ground_truth(truth, COCO)
    other = load_ground_truth({**truth, "images": [{"id": 77}], "annotations": []}, COCO)
    with pytest.raises(ValueError, match="no image id in common"):
        compare_paired((predictions, first), (Predictions.empty(17), other), COCO, EvaluateConfig())
