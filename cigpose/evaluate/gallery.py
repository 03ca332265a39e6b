"""Pictures of predictions beside the labels: of whole images, and of single persons."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cigpose.draw import draw_poses, label_picture
from cigpose.evaluate.coco import ScoredPersons
from cigpose.evaluate.diagnosis import Diagnosis
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet

LEAST_LABELS = 5
"""Persons with fewer labelled keypoints are neither a success nor a failure that one could see."""

_ANY_LABEL = 1e-6
_RING = 7  # pixels


def image_tile(
    image: np.ndarray,
    image_id: int,
    predictions: Predictions,
    keypoint_set: KeypointSet,
    *,
    truth: GroundTruth | None,
    height: int,
    min_score: float,
) -> np.ndarray:
    """A picture with everybody's predicted skeleton, and with the labelled ones beside it; uint8 (height, W, 3) BGR."""
    rows = predictions.image_id == image_id
    small, scale = _resized(image, height)
    scores = predictions.keypoint_scores[rows]
    tile = draw_poses(
        small,
        predictions.keypoints[rows] * scale,
        scores,
        keypoint_set,
        min_score=min_score,
        sure_score=1.5 * min_score,
    )
    tile = label_picture(tile, f"{image_id}: predicted")
    if truth is None:
        return tile
    labels = truth.keypoints[(truth.image_id == image_id) & ~truth.is_crowd]
    drawn = draw_poses(
        small, labels[..., :2] * scale, np.minimum(labels[..., 2], 1), keypoint_set, min_score=_ANY_LABEL
    )
    return np.hstack([tile, label_picture(drawn, "labelled")])


@dataclass(frozen=True, kw_only=True)
class ShownPerson:
    """A labelled person to look at."""

    labelled: int
    """Row in `GroundTruth`."""
    predicted: int | None
    """Row in `ScoredPersons`; None where nothing was found."""
    oks: float
    """0 where nothing was found."""


def choose_persons(diagnosis: Diagnosis, truth: GroundTruth, count: int) -> dict[str, list[ShownPerson]]:
    """The best, the median and the worst people, at most one of each kind from an image, nobody twice.

    Args:
        diagnosis: of all that were found.
        truth: the labels; persons of few labelled keypoints are passed over.
        count: of each kind.
    """
    found = dict(zip(diagnosis.labelled.tolist(), zip(diagnosis.predicted, diagnosis.oks, strict=True), strict=True))
    labels = (truth.keypoints[..., 2] > 0).sum(axis=1)
    people = []
    for row in np.flatnonzero(~truth.is_crowd & (labels >= min(LEAST_LABELS, truth.keypoints.shape[1]))).tolist():
        predicted, oks = found.get(row, (None, 0.0))
        number = None if predicted is None else int(predicted)
        people.append(ShownPerson(labelled=row, predicted=number, oks=float(oks)))
    people.sort(key=lambda person: -person.oks)
    middle = sorted(range(len(people)), key=lambda i: abs(i - (len(people) - 1) / 2))
    orders = {"Best": people, "Worst": people[::-1], "Median": [people[i] for i in middle]}
    shown: dict[str, list[ShownPerson]] = {}
    taken: set[int] = set()
    for name, order in orders.items():
        images: set[int] = set()
        shown[name] = []
        for person in order:
            image = int(truth.image_id[person.labelled])
            if len(shown[name]) < count and person.labelled not in taken and image not in images:
                shown[name].append(person)
                taken.add(person.labelled)
                images.add(image)
    return {name: shown[name] for name in ("Best", "Median", "Worst")}


def person_tile(
    image: np.ndarray,
    person: ShownPerson,
    scored: ScoredPersons,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    *,
    height: int,
    min_score: float,
    intervened: np.ndarray | None = None,
) -> np.ndarray:
    """A person cut out: the predicted skeleton beside the labelled one; uint8 (height, W, 3) BGR.

    Keypoints that are `intervened` on, (K,) bool, have a ring.
    """
    labels = truth.keypoints[person.labelled]
    x0, y0, x1, y1 = _cutout(image, truth.bbox_xywh[person.labelled], labels[labels[:, 2] > 0, :2])
    small, scale = _resized(image[y0:y1, x0:x1], height)
    offset = np.array([x0, y0])
    pair = [small]
    if person.predicted is not None:
        detection = scored.detections[person.predicted]
        points, scores = (detection[None, :, :2] - offset) * scale, detection[None, :, 2]
        pair = [draw_poses(small, points, scores, keypoint_set, min_score=min_score, sure_score=1.5 * min_score)]
        for x, y in points[0, intervened] if intervened is not None else ():
            for color, width in ((255, 255, 255), 4), ((200, 0, 200), 2):
                cv2.circle(pair[0], (round(x), round(y)), _RING, color, width, cv2.LINE_AA)
    drawn = draw_poses(
        small,
        (labels[None, :, :2] - offset) * scale,
        np.minimum(labels[None, :, 2], 1),
        keypoint_set,
        min_score=_ANY_LABEL,
    )
    return np.hstack([label_picture(pair[0], "predicted"), label_picture(drawn, "labelled")])


def _cutout(image: np.ndarray, bbox_xywh: np.ndarray, points: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around a person's box and labels, with some room, within the picture and not too thin."""
    low = np.minimum(bbox_xywh[:2], points.min(axis=0, initial=np.inf))
    high = np.maximum(bbox_xywh[:2] + bbox_xywh[2:], points.max(axis=0, initial=-np.inf))
    center, half = (low + high) / 2, (high - low) * 0.6 + 4
    half = np.maximum(half, half.max() * 0.4)
    height, width = image.shape[:2]
    x0, y0 = np.clip(np.floor(center - half), 0, [width - 2, height - 2]).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(center + half), [x0 + 2, y0 + 2], [width, height]).astype(int).tolist()
    return x0, y0, x1, y1


def _resized(image: np.ndarray, height: int) -> tuple[np.ndarray, float]:
    scale = height / image.shape[0]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (max(1, round(image.shape[1] * scale)), height), interpolation=interpolation), scale
