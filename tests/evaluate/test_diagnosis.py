from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cigpose.config import EvaluateConfig
from cigpose.evaluate.coco import ScoredPersons, evaluate_predictions, run_part, score_persons
from cigpose.evaluate.diagnosis import KINDS, diagnose, side_confusion
from cigpose.evaluate.gallery import choose_persons
from cigpose.evaluate.ground_truth import GroundTruth, load_ground_truth
from cigpose.evaluate.groups import measure_groups
from cigpose.evaluate.matches import resampled_images
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO

AREA = 10_000.0
LEFT_WRIST, RIGHT_WRIST, LEFT_KNEE, NOSE = (
    COCO.names.index(n) for n in ("left_wrist", "right_wrist", "left_knee", "nose")
)


def labels(people: dict[int, list[float]], **changes: Any) -> dict[str, Any]:
    """Persons 30 pixels a keypoint apart, each moved right by its number; image -> offsets of its persons."""
    annotations = []
    for image_id, offsets in people.items():
        for left in offsets:
            points = np.c_[left + 30.0 * np.arange(17) % 120, 30.0 * np.arange(17), np.full(17, 2)]
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": AREA}
            row |= {"bbox": [left, 20.0, 120.0, 490.0], "num_keypoints": 17, "keypoints": points.ravel().tolist()}
            annotations.append(row | changes)
    images = [{"id": image_id, "width": 1000, "height": 600} for image_id in people]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def perfect(truth: GroundTruth) -> Predictions:
    corners = np.c_[truth.bbox_xywh[:, :2], truth.bbox_xywh[:, :2] + truth.bbox_xywh[:, 2:]]
    return Predictions(
        image_id=truth.image_id,
        person_id=truth.annotation_id,
        keypoints=truth.keypoints[..., :2].copy(),
        keypoint_scores=np.full(truth.keypoints.shape[:2], 0.9),
        center=corners[:, :2],
        scale=corners[:, 2:],
        bbox_xyxy=corners,
        box_score=np.linspace(1, 0.8, len(truth)),
    )


def scored_(predictions: Predictions, truth: GroundTruth) -> ScoredPersons:
    return score_persons(predictions, truth, COCO, EvaluateConfig(oks_nms_threshold=None))


def offset_of(similarity: float, keypoint: int) -> float:
    """Pixels at which a keypoint of these persons has a similarity to its label."""
    return float(np.sqrt(-np.log(similarity) * 2 * AREA) * 2 * COCO.sigmas[keypoint])


MISTAKES = [
    ("good", lambda own, other: own[LEFT_WRIST] + [offset_of(0.86, LEFT_WRIST), 0]),
    ("jitter", lambda own, other: own[LEFT_WRIST] + [offset_of(0.84, LEFT_WRIST), 0]),
    ("jitter", lambda own, other: own[LEFT_WRIST] + [offset_of(0.51, LEFT_WRIST), 0]),
    ("miss", lambda own, other: own[LEFT_WRIST] + [-offset_of(0.49, LEFT_WRIST), 0]),
    ("inversion", lambda own, other: own[RIGHT_WRIST]),
    ("swap", lambda own, other: other[LEFT_WRIST]),
    ("swap", lambda own, other: other[RIGHT_WRIST]),
    ("miss", lambda own, other: own[LEFT_KNEE]),
]


@pytest.mark.parametrize(("kind", "place"), MISTAKES, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(MISTAKES)])
def test_a_keypoint_is_judged_by_what_it_lies_on(kind: str, place: Any) -> None:
    truth = load_ground_truth(labels({1: [0.0, 500.0]}), COCO)
    predictions = perfect(truth)
    predictions.keypoints[0, LEFT_WRIST] = place(truth.keypoints[0, :, :2], truth.keypoints[1, :, :2])
    found = diagnose(scored_(predictions, truth), truth, COCO)
    row = found.labelled.tolist().index(0)
    expected = np.zeros(17, dtype=int)
    expected[LEFT_WRIST] = KINDS.index(kind)
    assert found.kind[row].tolist() == expected.tolist()
    assert (found.kind[1 - row] == 0).all() and found.oks[1 - row] == pytest.approx(1)
    assert found.shares([LEFT_WRIST])[kind] >= 0.5 and found.count(range(17)) == 34


def test_keypoints_without_label_and_people_nobody_predicted_are_not_judged() -> None:
    content = labels({1: [0.0], 2: [0.0]})
    content["annotations"][0]["keypoints"][2] = 0
    truth = load_ground_truth(content, COCO)
    found = diagnose(scored_(perfect(truth).select(np.array([0])), truth), truth, COCO)
    assert found.labelled.tolist() == [0] and found.kind[0, NOSE] == -1 and (found.kind[0, 1:] == 0).all()
    assert found.shares([NOSE]) == {} and found.count([NOSE]) == 0
    shown = choose_persons(found, truth, 1)
    assert [(person.labelled, person.predicted) for person in shown["Worst"]] == [(1, None)]
    assert [(person.labelled, person.predicted, round(person.oks, 3)) for person in shown["Best"]] == [(0, 0, 1.0)]


def test_left_for_right_is_counted_per_pair_and_person() -> None:
    truth = load_ground_truth(labels({1: [0.0], 2: [0.0], 3: [0.0], 4: [0.0]}), COCO)
    predictions = perfect(truth)
    wrists = [LEFT_WRIST, RIGHT_WRIST]
    predictions.keypoints[0][wrists] = predictions.keypoints[0][wrists[::-1]]
    predictions.keypoints[1, LEFT_WRIST] = predictions.keypoints[1, RIGHT_WRIST]
    truth.keypoints[3, LEFT_WRIST, :2] = truth.keypoints[3, RIGHT_WRIST, :2]  # nobody could tell
    found = {row.pair: row for row in side_confusion(diagnose(scored_(predictions, truth), truth, COCO), truth, COCO)}
    row = found["left_wrist / right_wrist"]
    assert (row.people, row.one, row.both) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert len(found) == 8 and all(other.one == other.both == 0 for other in found.values() if other is not row)


def test_groups_are_measured_as_if_alone() -> None:
    """With one person an image, a group's figures are those of an evaluation of its images only."""
    people = {image_id: [0.0 if image_id % 3 == 0 else 400.0] for image_id in range(1, 31)}
    content = labels(people)
    for row in content["annotations"]:
        row["area"] = 5000.0 if row["image_id"] % 2 else 20_000.0
    truth = load_ground_truth(content, COCO)
    predictions = perfect(truth)
    rng = np.random.default_rng(0)
    predictions.keypoints[:] += rng.normal(0, 9, predictions.keypoints.shape) * rng.uniform(0, 2, (30, 1, 1))
    config = EvaluateConfig(oks_nms_threshold=None)
    scored = scored_(predictions, truth)
    matches = run_part(scored, truth, COCO, range(17)).matches
    found = {(group.aspect, group.name): group for group in measure_groups(matches, scored, truth, COCO)}
    divisions = {
        ("size", "large"): truth.area > 96**2,
        ("size", "medium, up to 96 x 96 pixels"): truth.area <= 96**2,
        ("truncation", "cut by its border"): truth.bbox_xywh[:, 0] == 0,
        ("truncation", "inside the picture"): truth.bbox_xywh[:, 0] > 0,
    }
    assert found.keys() == divisions.keys()  # everybody is visible and alone
    for key, members in divisions.items():
        alone = truth.restrict(truth.image_id[members])
        figures = evaluate_predictions(predictions.select(members), alone, COCO, config)
        assert (found[key].ap, found[key].ar) == pytest.approx((figures["body/AP"], figures["body/AR"]), abs=1e-12)
        assert found[key].people == members.sum()


def test_hidden_and_crowded_people_are_groups_where_labels_tell() -> None:
    content = labels({1: [0.0, 30.0], 2: [0.0], 3: [200.0, 310.0], 4: [300.0]})
    for k in range(9):
        content["annotations"][0]["keypoints"][3 * k + 2] = 1
    truth = load_ground_truth(content, COCO)
    scored = scored_(perfect(truth), truth)
    matches = run_part(scored, truth, COCO, range(17)).matches
    people = {(group.aspect, group.name): group.people for group in measure_groups(matches, scored, truth, COCO)}
    assert people["occlusion", "more hidden"] == 1 and people["occlusion", "all labels visible"] == 5
    crowding = {name: count for (aspect, name), count in people.items() if aspect == "crowding"}
    assert crowding == {"overlaps nobody": 2, "overlap (IoU) up to 0.2": 2, "more overlap": 2}
    for image, index in zip(content["images"], (0.0, 0.1, 0.5, 0.9), strict=True):
        image["crowdIndex"] = index
    truth = load_ground_truth(content, COCO)
    groups = measure_groups(matches, scored, truth, COCO)
    assert {group.name: group.people for group in groups if group.aspect == "crowding"} == {
        "easy": 3,
        "medium": 2,
        "hard": 1,
    }


def test_the_interval_of_an_ap_holds_it_and_is_narrower_with_more_images() -> None:
    widths = []
    for count in (12, 120):
        truth = load_ground_truth(labels({image_id: [0.0] for image_id in range(1, count + 1)}), COCO)
        predictions = perfect(truth)
        rng = np.random.default_rng(1)
        predictions.keypoints[:] += rng.normal(0, 9, predictions.keypoints.shape) * rng.uniform(0, 2, (count, 1, 1))
        matches = run_part(scored_(predictions, truth), truth, COCO, range(17)).matches
        low, high = matches.interval(resampled_images(count, 100))
        expected = evaluate_predictions(predictions, truth, COCO, EvaluateConfig(oks_nms_threshold=None))["body/AP"]
        assert matches.average_precision() == pytest.approx(expected, abs=1e-12)
        assert low < expected < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]
