"""COCO result files of other tools, as persons to score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cigpose.evaluate.coco import ScoredPersons, detection_areas
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet


def read_coco_results(path: str | Path, truth: GroundTruth, keypoint_set: KeypointSet) -> ScoredPersons:
    """The persons of a result file: their scores and keypoints as they stand there, nobody suppressed.

    The area of a person is that of its `bbox` if the file has one, else the extent of its keypoints, as pycocotools
    takes it; for sets of several parts it is the extent of the body.

    Args:
        path: a list of {image_id, category_id, score, keypoints, ...}. A set of several annotation fields may have them
            one by one (`foot_kpts`, ...) or all in `keypoints`.
        truth: the labels it is for.
        keypoint_set: its fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such list, or of other images or keypoints.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found.")
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as err:
        raise ValueError(f"{path}: not valid JSON ({err}). Expected a COCO result file.") from err
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of persons, as COCO result files are. Is it an annotation file?")
    rows = [row for row in rows if row.get("category_id", truth.category_id) == truth.category_id]
    detections = np.array([_detection(row, i, keypoint_set, path) for i, row in enumerate(rows)], dtype=np.float64)
    detections = detections.reshape(-1, len(keypoint_set), 3)
    numbers = np.array([_numbers(row, i, path) for i, row in enumerate(rows)], dtype=np.float64).reshape(-1, 2)
    image_id = numbers[:, 0].astype(np.int64)
    if unknown := set(image_id.tolist()) - truth.images.keys():
        raise ValueError(
            f"{path}: names {len(unknown)} images that the labels lack, the first is {min(unknown)}. Was it made on "
            "another data set?"
        )
    low, high = (reduce(detections[..., :2], axis=1) for reduce in (np.min, np.max)) if rows else (numbers, numbers)
    corners = np.concatenate([low, high], axis=1)
    for i, row in enumerate(rows):
        if row.get("bbox"):
            x, y, width, height = row["bbox"]
            corners[i] = x, y, x + width, y + height
    people = Predictions(
        image_id=image_id,
        person_id=np.arange(len(rows)),
        keypoints=detections[..., :2],
        keypoint_scores=detections[..., 2],
        center=(corners[:, :2] + corners[:, 2:]) / 2,
        scale=corners[:, 2:] - corners[:, :2],
        bbox_xyxy=corners,
        box_score=np.ones(len(rows)),
    )
    areas = detection_areas(corners, detections[..., :2], keypoint_set)
    return ScoredPersons(people=people, detections=detections, scores=numbers[:, 1], areas=areas)


def _detection(row: Mapping[str, Any], i: int, keypoint_set: KeypointSet, path: Path) -> np.ndarray:
    """(K, 3)."""
    fields = keypoint_set.annotation_fields
    together = len(row.get("keypoints") or ()) == 3 * len(keypoint_set)
    found: list[float] = []
    for name, count in {"keypoints": len(keypoint_set)}.items() if together else fields.items():
        values = row.get(name)
        if not isinstance(values, list) or len(values) != 3 * count:
            has = f"{len(values)} numbers in" if isinstance(values, list) else "no"
            raise ValueError(
                f"{path}: person {i} has {has} {name}, expected {3 * count} ({count} keypoints x 3) for keypoint set "
                f"{keypoint_set.name!r}. Is `keypoints` in params.yaml the set of this file?"
            )
        found += values
    try:
        numbers = np.array(found, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: person {i} has keypoints that are not numbers ({err}).") from err
    if not np.isfinite(numbers).all():
        raise ValueError(f"{path}: person {i} has keypoints that are not finite numbers.")
    return numbers


def _numbers(row: Mapping[str, Any], i: int, path: Path) -> tuple[int, float]:
    image_id, score = row.get("image_id"), row.get("score")
    if not isinstance(image_id, int) or not isinstance(score, (int, float)):
        raise ValueError(f"{path}: person {i} lacks image_id or score, which every person of a result file has.")
    return image_id, float(score)
