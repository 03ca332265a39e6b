from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cigpose.config import EvaluateConfig
from cigpose.evaluate.oks import oks, oks_nms, person_scores, select_persons
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO


def people(num: int, *, image_id: int = 1, spread: float = 200.0, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(
        image_id=np.full(num, image_id),
        person_id=np.arange(num),
        keypoints=rng.uniform(0, spread, (num, 17, 2)),
        keypoint_scores=rng.uniform(0.3, 1, (num, 17)),
        center=np.full((num, 2), 100.0),
        scale=np.full((num, 2), 100.0),
        bbox_xyxy=np.tile([50.0, 50, 150, 150], (num, 1)),
        box_score=rng.uniform(0.1, 1, num),
    )


def test_similarities_are_those_of_the_reference(golden: Path) -> None:
    case = np.load(golden / "units" / "oks_nms.npz")
    points, areas = case["keypoints"][..., :2], case["areas"]
    rows = [oks(points[i], areas[i], points, areas, case["sigmas"]) for i in range(len(points))]
    assert np.allclose(rows, case["oks"], rtol=0, atol=2e-7)  # stored as float32


def test_suppression_keeps_the_persons_the_reference_keeps(golden: Path) -> None:
    case = np.load(golden / "units" / "oks_nms.npz")
    kept = oks_nms(case["keypoints"][..., :2], case["scores"], case["areas"], case["sigmas"], float(case["thr"]))
    assert kept.tolist() == case["keep"].tolist()


@pytest.mark.parametrize("num", [0, 1], ids=["nobody", "one person"])
def test_suppression_of_too_few_to_compare_keeps_all(num: int) -> None:
    one = people(num)
    assert len(oks_nms(one.keypoints, one.box_score, np.ones(num), np.ones(17), 0.9)) == num


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("box_and_keypoints", [0.5 * 0.6, 0.0]), ("box", [0.5, 0.8]), ("keypoints", [0.4, -0.1])],
)
def test_a_person_is_scored_by_the_named_rule(rule: str, expected: list[float]) -> None:
    keypoint_scores = np.array([[0.4, 0.8, 0.2, 0.2], [0.1, -0.5, 0.0, 0.0]])
    scores = person_scores(np.array([0.5, 0.8]), keypoint_scores, 0.2, rule)  # type: ignore[arg-type]
    assert np.allclose(scores, expected)


def test_repeated_ids_count_once_and_images_keep_their_order() -> None:
    parts = [people(3, image_id=9, spread=5000), people(2, image_id=4, spread=5000, seed=1)]
    twice = Predictions.concatenate([parts[0], parts[1], parts[0]])
    chosen, scores = select_persons(twice, COCO, EvaluateConfig())
    assert chosen.image_id.tolist() == [9, 9, 9, 4, 4]
    assert all(np.all(np.diff(scores[chosen.image_id == image]) <= 0) for image in (9, 4))


def test_of_two_equal_persons_the_better_scored_remains_unless_suppression_is_off() -> None:
    pair = people(2)
    pair = dataclasses.replace(pair, keypoints=pair.keypoints[[0, 0]], box_score=np.array([0.3, 0.9]))
    chosen, _ = select_persons(pair, COCO, EvaluateConfig())
    assert chosen.person_id.tolist() == [1]
    assert len(select_persons(pair, COCO, EvaluateConfig(oks_nms_threshold=None))[0]) == 2


def test_nobody_is_selected_from_nobody() -> None:
    chosen, scores = select_persons(Predictions.empty(17), COCO, EvaluateConfig())
    assert len(chosen) == len(scores) == 0
