"""Whole-body labels and predictions that nobody made, and plain pycocotools to score them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cigpose.evaluate.coco import ScoredPersons
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO_WHOLEBODY

PICTURE = np.array([640, 480])
LABELLED = {
    "body": (0.58, 0.6),
    "foot": (0.42, 0.9),
    "face": (0.4, 1.0),
    "left_hand": (0.35, 1.0),
    "right_hand": (0.35, 1.0),
}
"""Share of the persons who have labels of a part, and of its keypoints on them; about as in COCO-WholeBody."""


def whole_people(images: int, detections: int, persons: int, seed: int = 0) -> tuple[Predictions, GroundTruth]:
    """A detector's many boxes: a good one of each person, others of persons, and most of nothing.

    Half of the pictures show somebody. There are crowds, persons without labels of a part, equal scores, and keypoints
    of no score.
    """
    rng = np.random.default_rng(seed)
    truth = _labels(rng, images, persons)
    size, corner = truth.bbox_xywh[:, 3], truth.bbox_xywh[:, :2]
    twice = rng.choice(persons, round(0.25 * (detections - persons)))
    meant = np.concatenate([np.arange(persons), twice])
    error = np.concatenate([rng.gamma(2.0, 0.02, persons), rng.gamma(2.0, 0.15, len(twice))])
    hidden = truth.keypoints[meant, :, 2:] == 0
    points = np.where(hidden, corner[meant, None] + rng.uniform(0, 1, (len(meant), 133, 2)) * size[meant, None, None],
                      truth.keypoints[meant, :, :2])  # fmt: skip
    points += rng.normal(0, 1, points.shape) * (error * size[meant])[:, None, None]
    rest = detections - len(meant)
    boxes = _boxes(rng, rest)
    points = np.concatenate([points, boxes[:, None, :2] + rng.uniform(0, 1, (rest, 133, 2)) * boxes[:, None, 2:]])
    boxes = np.concatenate([truth.bbox_xywh[meant], boxes])
    quality = np.concatenate([np.exp(-error * 8), rng.beta(1, 6, rest)])
    scores = quality[:, None] * rng.uniform(0.6, 1.1, (detections, 133))
    scores[rng.random(detections) < 0.02, 17:] = 0
    box_score = np.concatenate([rng.uniform(0.5, 1, persons), rng.uniform(0, 0.9, len(twice)), rng.beta(1, 4, rest)])
    repeated = rng.random(detections) < 0.05
    scores[repeated], box_score[repeated] = 0.5, 0.5
    image_id = np.concatenate([truth.image_id[meant], rng.integers(0, images, rest)])
    order = rng.permutation(detections)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    predictions = Predictions(
        image_id=image_id, person_id=np.arange(detections), keypoints=points, keypoint_scores=scores,
        center=boxes[:, :2] + boxes[:, 2:] / 2, scale=boxes[:, 2:] * 1.25, bbox_xyxy=corners, box_score=box_score,
    )  # fmt: skip
    return predictions.select(order), truth


def _boxes(rng: np.random.Generator, num: int) -> np.ndarray:
    height = np.exp(rng.normal(4.5, 0.8, num)).clip(8, 480)
    size = np.stack([height * 0.5, height], axis=1)
    return np.concatenate([rng.uniform(0, 1, (num, 2)) * (PICTURE - size).clip(1), size], axis=1)


def _labels(rng: np.random.Generator, images: int, persons: int) -> GroundTruth:
    shown = np.sort(rng.choice(images, min(persons, round(0.54 * images)), replace=False))
    often = rng.geometric(0.35, len(shown)).astype(float)
    image_id = np.sort(np.append(shown, rng.choice(shown, persons - len(shown), p=often / often.sum())))
    boxes = _boxes(rng, persons)
    visible = np.zeros((persons, 133))
    for part, members in COCO_WHOLEBODY.parts.items():
        of_persons, of_keypoints = LABELLED[part]
        labelled = (rng.random((persons, 1)) < of_persons) & (rng.random((persons, len(members))) < of_keypoints)
        visible[:, list(members)] = np.where(labelled, rng.integers(1, 3, labelled.shape), 0)
    points = boxes[:, None, :2] + rng.uniform(0, 1, (persons, 133, 2)) * boxes[:, None, 2:]
    return GroundTruth(
        images={i: {"id": i} for i in range(images)},
        category_id=1,
        image_id=image_id,
        annotation_id=np.arange(persons),
        keypoints=np.concatenate([points * (visible[..., None] > 0), visible[..., None]], axis=2),
        area=boxes[:, 2:].prod(axis=1) * 0.55,
        bbox_xywh=boxes,
        is_crowd=rng.random(persons) < 0.03,
        num_keypoints=(visible[:, :17] > 0).sum(axis=1),
    )


Rows = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


def coco_rows(scored: ScoredPersons, truth: GroundTruth, members: Sequence[int]) -> Rows:
    """Images, annotations and results of one part as they would stand in files."""
    index = list(members)
    labels, found = truth.keypoints[:, index], scored.detections[:, index]
    annotations = [
        {"id": i + 1, "image_id": int(truth.image_id[i]), "category_id": 1, "iscrowd": int(truth.is_crowd[i]),
         "num_keypoints": int((labels[i, :, 2] > 0).sum()), "area": float(truth.area[i]),
         "bbox": truth.bbox_xywh[i].tolist(), "keypoints": labels[i].ravel().tolist()}
        for i in range(len(truth))
    ]  # fmt: skip
    results = [
        {"id": i + 1, "image_id": int(scored.people.image_id[i]), "category_id": 1, "score": float(scored.scores[i]),
         "area": float(scored.areas[i]), "keypoints": found[i].ravel().tolist()}
        for i in np.flatnonzero((found[..., 2] > 0).any(axis=1)).tolist()
    ]  # fmt: skip
    return [{"id": i} for i in truth.images], annotations, results


def plain_pycocotools(rows: Rows, members: Sequence[int]) -> list[float]:
    """Its ten figures, by its own code alone."""
    images, *sides = rows
    with contextlib.redirect_stdout(io.StringIO()):
        both = []
        for annotations in sides:
            both.append(COCO())
            both[-1].dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
            both[-1].createIndex()
        run = COCOeval(*both, "keypoints")
        run.params.kpt_oks_sigmas = np.asarray(COCO_WHOLEBODY.sigmas, dtype=np.float32)[list(members)]
        run.params.maxDets = [20]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]
