from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cigpose.evaluate.calibration import Calibration, expected_calibration_error, fit_calibration
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet, keypoint_set

COCO = keypoint_set("coco")
PEOPLE = 600


def people(seed: int = 0) -> tuple[Predictions, GroundTruth]:
    """Keypoints of which one with score s is right with the chance s / 2, scores from 0 to 2."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(50, 150, (PEOPLE, 17, 2))
    scores = rng.uniform(0, 2, (PEOPLE, 17))
    right = rng.random((PEOPLE, 17)) < scores / 2
    found = labels + np.where(right, 0, 500)[..., None]
    image = np.arange(PEOPLE)
    visible = (rng.random((PEOPLE, 17)) < 0.8)[..., None]
    truth = GroundTruth(
        images={int(number): {} for number in image},
        category_id=1,
        image_id=image,
        annotation_id=image + 1000,
        keypoints=np.concatenate([labels, visible], axis=2),
        area=np.full(PEOPLE, 4000.0),
        bbox_xywh=np.tile([50.0, 50.0, 100.0, 100.0], (PEOPLE, 1)),
        is_crowd=np.zeros(PEOPLE, bool),
        num_keypoints=np.full(PEOPLE, 17),
    )
    predictions = Predictions(
        image_id=image,
        person_id=image + 1000,
        keypoints=found,
        keypoint_scores=scores,
        center=np.full((PEOPLE, 2), 100.0),
        scale=np.full((PEOPLE, 2), 125.0),
        bbox_xyxy=np.tile([50.0, 50.0, 150.0, 150.0], (PEOPLE, 1)),
        box_score=np.ones(PEOPLE),
    )
    return predictions, truth


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    calibration = fit_calibration(*people(), COCO, models=("a",), about={"dataset": "x"})
    assert calibration is not None
    return calibration


def test_a_probability_is_the_share_of_right_keypoints(fitted: Calibration) -> None:
    raw = np.linspace(0, 2, 17)[None]
    probabilities = fitted.probabilities(raw, COCO)
    assert np.abs(probabilities - raw / 2).max() < 0.08  # 5 standard errors of a group of 170
    assert (np.diff(probabilities[0]) >= 0).all()
    far = fitted.probabilities(np.array([[-5.0] * 16 + [50.0]]), COCO)
    assert far.min() > 0 and far.max() < 1


def test_what_it_is_worth_is_measured_on_people_it_has_not_seen(fitted: Calibration) -> None:
    predictions, truth = people(seed=1)
    counted = truth.keypoints[..., 2] > 0
    right = np.linalg.norm(predictions.keypoints - truth.keypoints[..., :2], axis=2) < 1
    probabilities = fitted.probabilities(predictions.keypoint_scores, COCO)
    fresh = expected_calibration_error(probabilities[counted], right[counted])
    assert fitted.error < 0.03 and fresh < 0.03
    raw = np.clip(predictions.keypoint_scores, 0, 1)
    assert expected_calibration_error(raw[counted], right[counted]) > 0.2


def test_detected_boxes_are_compared_with_the_person_they_overlap(fitted: Calibration) -> None:
    predictions, truth = people()
    moved = dataclasses.replace(
        predictions, person_id=np.arange(PEOPLE), bbox_xyxy=predictions.bbox_xyxy + np.float32(8)
    )
    assert fit_calibration(moved, truth, COCO, models=("a",), about={"dataset": "x"}) == fitted
    away = dataclasses.replace(moved, bbox_xyxy=predictions.bbox_xyxy + np.float32(400))
    assert fit_calibration(away, truth, COCO) is None


def test_a_part_with_few_labels_takes_the_table_of_all() -> None:
    predictions, truth = people()
    parts = {"body": tuple(range(16)), "foot": (16,)}
    own = dataclasses.replace(COCO, parts=parts)
    assert isinstance(own, KeypointSet)
    truth.keypoints[100:, 16, 2] = 0
    calibration = fit_calibration(predictions, truth, own)
    assert calibration is not None and set(calibration.tables) == {"all", "body"}
    raw = np.full((1, 17), 1.0)
    assert calibration.probabilities(raw, own)[0, 16] == pytest.approx(np.interp(1.0, *calibration.tables["all"]))


def test_a_calibration_is_read_as_it_was_written(fitted: Calibration, tmp_path: Path) -> None:
    again = Calibration.read(fitted.write(tmp_path))
    raw = np.random.default_rng(0).uniform(0, 2, (5, 17))
    assert np.array_equal(again.probabilities(raw, COCO), fitted.probabilities(raw, COCO))
    assert (again.models, again.error, again.about) == (fitted.models, fitted.error, fitted.about)
