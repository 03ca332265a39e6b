"""Average precision of predicted persons by pycocotools, per part and for the whole body.

The protocol is upstream's, its numbers are reproduced exactly (tests/evaluate/test_coco.py compares them):
- duplicates are removed and persons scored as `cigpose.evaluate.oks` says; all parts share the person score;
- each part is an evaluation of its own, over its keypoints and sigmas (float32), at most 20 persons per image;
- a ground truth counts in a part only where it has a labelled keypoint of that part, a prediction only where it has a
  keypoint of positive score there;
- with several parts the area of a prediction is the extent of its BODY keypoints, in every part; with one part it is
  its box. It decides only whether an unmatched person counts in AP_M and AP_L.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.config.outcome import CROWDING, FIGURES
from cigpose.evaluate.ground_truth import GroundTruth, load_ground_truth
from cigpose.evaluate.matching import (
    MAX_PERSONS_PER_IMAGE,
    PartRun,
    PeopleOfPart,
    lowest_similarity,
    match_part,
)
from cigpose.evaluate.oks import select_persons
from cigpose.evaluate.predictions import Predictions
from cigpose.evaluate.similarity import pair_similarities, pairs_of_pictures
from cigpose.files.atomic import written_file
from cigpose.keypoints import KeypointSet, parts_with_whole

_COORDINATE_DECIMALS = 4
_SCORE_DECIMALS = 6

# Upstream names the score of a field so; `wholebody_score` is that of all of them.
_SCORE_FIELDS = {
    "foot_kpts": "foot_score",
    "face_kpts": "face_score",
    "lefthand_kpts": "lefthand_score",
    "righthand_kpts": "righthand_score",
}


def evaluate_predictions(
    predictions: Predictions,
    ground_truth: Path | str | Mapping[str, Any] | GroundTruth,
    keypoint_set: KeypointSet,
    config: EvaluateConfig,
    results_path: str | Path | None = None,
) -> dict[str, float]:
    """All figures of one set of predictions.

    Args:
        predictions: every person once; repeated ids of an image are dropped. May be empty.
        ground_truth: COCO-format file, its content, or labels already read. All its images count.
        keypoint_set: parts and sigmas.
        config: the protocol.
        results_path: where to write the COCO result file, if anywhere.

    Returns: `<part>/<figure>` for each part of the set, and for `whole` if it has several. With a left and a right hand
        there are also `hand/AP` and `hand/AR`, the mean of the two hands. CrowdPose files (images with a crowdIndex)
        add AP_easy, AP_medium and AP_hard. -1 means that there was nothing to measure.

    Raises:
        FileNotFoundError: there is no ground truth.
        ValueError: predictions are not finite or of other images, or the labels are not of this set.
    """
    truth = load_ground_truth(ground_truth, keypoint_set, area=config.area)
    scored = score_persons(predictions, truth, keypoint_set, config)
    if results_path is not None:
        write_coco_results(results_path, scored, keypoint_set, truth.category_id)
    return measure_persons(scored, truth, keypoint_set)


def measure_persons(scored: ScoredPersons, truth: GroundTruth, keypoint_set: KeypointSet) -> dict[str, float]:
    """The figures of persons that have their scores already, see `evaluate_predictions`."""
    metrics: dict[str, float] = {}
    for part, run in run_parts(scored, truth, keypoint_set).items():
        metrics |= {f"{part}/{name}": value for name, value in zip(FIGURES, run.stats, strict=True)}
        members = parts_with_whole(keypoint_set)[part]
        metrics |= {f"{part}/{name}": value for name, value in _by_crowding(scored, truth, keypoint_set, members)}
    return metrics | _hand_means(metrics)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPersons:
    """The predicted persons that are scored and written, N of them."""

    people: Predictions
    detections: np.ndarray
    """(N, K, 3) float64 x, y in image pixels and score, rounded as they are written."""
    scores: np.ndarray
    """(N,) person scores."""
    areas: np.ndarray
    """(N,) square pixels."""


def score_persons(
    predictions: Predictions, truth: GroundTruth, keypoint_set: KeypointSet, config: EvaluateConfig
) -> ScoredPersons:
    """Repeated ids and duplicates dropped, every person scored.

    Raises:
        ValueError: predictions are not finite, of other images, or of another set.
    """
    _check(predictions, truth, keypoint_set)
    people, scores = select_persons(predictions, keypoint_set, config)
    keypoints = np.round(people.keypoints.astype(np.float64), _COORDINATE_DECIMALS)
    keypoint_scores = np.round(people.keypoint_scores.astype(np.float64), _SCORE_DECIMALS)
    return ScoredPersons(
        people=people,
        detections=np.concatenate([keypoints, keypoint_scores[..., None]], axis=2),
        scores=scores,
        areas=detection_areas(people.bbox_xyxy, keypoints, keypoint_set),
    )


def run_parts(scored: ScoredPersons, truth: GroundTruth, keypoint_set: KeypointSet) -> dict[str, PartRun]:
    """The evaluation of every part, and of `whole` if there are several, over all images."""
    parts = parts_with_whole(keypoint_set).items()
    return {part: run_part(scored, truth, keypoint_set, members) for part, members in parts}


def run_part(
    scored: ScoredPersons,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    members: Sequence[int],
    image_ids: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
) -> PartRun:
    """The evaluation of some of the keypoints, over all images or the given ones, at COCO's OKS or others."""
    return match_part(people_of_part(scored, truth, keypoint_set, members, image_ids, thresholds))


def people_of_part(
    scored: ScoredPersons,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    members: Sequence[int],
    image_ids: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
) -> PeopleOfPart:
    """Whom `run_part` is about, compared with each other."""
    index = np.array(members)
    images = np.array(sorted(truth.images if image_ids is None else image_ids), dtype=np.int64)
    labels = truth.keypoints[:, index]
    single_field = len(keypoint_set.annotation_fields) == 1 and len(index) == len(keypoint_set)
    counts = truth.num_keypoints if single_field else (labels[..., 2] > 0).sum(axis=1)
    truths, truth_image = _positions(truth.image_id, np.arange(len(truth)), images)
    shown = np.flatnonzero((scored.detections[:, index, 2] > 0).any(axis=1))  # others are not predicted here
    rows, image = _positions(scored.people.image_id, shown[np.argsort(-scored.scores[shown], kind="stable")], images)
    best = np.arange(len(rows)) - np.searchsorted(image, image) < MAX_PERSONS_PER_IMAGE
    rows, image = rows[best], image[best]
    pairs = pairs_of_pictures(image, truth_image)
    similarities = pair_similarities(
        scored.detections[rows[:, None], index, :2],
        labels[truths],
        truth.area[truths],
        truth.bbox_xywh[truths],
        np.asarray(keypoint_set.sigmas, dtype=np.float32)[index],
        pairs,
    )
    lowest = None if thresholds is None else np.asarray(thresholds)
    alike = np.flatnonzero(similarities >= lowest_similarity(lowest))
    return PeopleOfPart(
        num_images=len(images),
        num_truths=len(truth),
        thresholds=lowest,
        image=image,
        person=rows,
        score=scored.scores[rows],
        area=scored.areas[rows],
        truth_image=truth_image,
        truth=truths,
        truth_area=truth.area[truths],
        is_crowd=truth.is_crowd[truths],
        is_ignored=truth.is_crowd[truths] | (counts[truths] == 0),
        pairs=(pairs[0][alike], pairs[1][alike]),
        similarity=similarities[alike],
    )


def _positions(image_id: np.ndarray, rows: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are of these images (ascending ids), image by image and else in their order, and their images."""
    at = np.searchsorted(images, image_id[rows])
    at[at == len(images)] = 0
    known = images[at] == image_id[rows] if len(images) else np.zeros(len(rows), dtype=bool)
    rows, at = rows[known], at[known]
    order = np.argsort(at, kind="stable")
    return rows[order], at[order]


def _check(predictions: Predictions, truth: GroundTruth, keypoint_set: KeypointSet) -> None:
    if predictions.keypoints.shape[1] != len(keypoint_set):
        raise ValueError(
            f"predictions have {predictions.keypoints.shape[1]} keypoints, set {keypoint_set.name!r} has "
            f"{len(keypoint_set)}. Were they made with other params?"
        )
    if unknown := set(predictions.image_id.tolist()) - truth.images.keys():
        raise ValueError(
            f"predictions name {len(unknown)} images that the ground truth lacks, the first is {min(unknown)}. "
            "Were they made on another dataset?"
        )
    finite = np.isfinite(predictions.keypoints).all(axis=(1, 2)) & np.isfinite(predictions.keypoint_scores).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"predictions: {int((~finite).sum())} of {len(finite)} persons are not finite numbers. The model has "
            "diverged; go back to an earlier checkpoint."
        )


def detection_areas(bbox_xyxy: np.ndarray, keypoints: np.ndarray, keypoint_set: KeypointSet) -> np.ndarray:
    """(N,) square pixels of persons, from their boxes (N, 4) and keypoints (N, K, 2), as the protocol takes them."""
    if len(keypoint_set.parts) > 1:
        body = keypoints[:, list(next(iter(keypoint_set.parts.values())))]
        return np.ptp(body, axis=1).prod(axis=1) if len(body) else np.zeros(0)
    corners = bbox_xyxy.astype(np.float64)
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def _by_crowding(
    scored: ScoredPersons, truth: GroundTruth, keypoint_set: KeypointSet, members: Sequence[int]
) -> Iterator[tuple[str, float]]:
    """AP over the images of each degree of crowding; like upstream's a plain mean, -1 entries included."""
    if (crowding := truth.crowd_index) is None:
        return
    for name, (low, high) in CROWDING.items():
        image_ids = [image_id for image_id, value in crowding.items() if low <= value < high]
        run = run_part(scored, truth, keypoint_set, members, image_ids)
        yield name, float(run.precision.mean())


def _hand_means(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for figure in ("AP", "AR"):
        sides = [metrics[f"{side}_hand/{figure}"] for side in ("left", "right") if f"{side}_hand/{figure}" in metrics]
        if len(sides) == 2:
            measured = [value for value in sides if value >= 0]
            found[f"hand/{figure}"] = sum(measured) / len(measured) if measured else -1.0
    return found


def write_coco_results(
    path: str | Path, scored: ScoredPersons, keypoint_set: KeypointSet, category_id: int = 1
) -> Path:
    """Write a COCO result file that other tools score as `evaluate_predictions` does.

    Sets of several annotation fields get a field each (`foot_kpts`, ...) and its score, which is the person's in all;
    they carry no `bbox`, from which pycocotools would take the area. Other sets do. Persons without any keypoint of
    positive score are left out, as evaluation leaves them out.

    Args:
        path: the JSON file; replaced atomically.
        scored: the persons.
        keypoint_set: the annotation fields.
        category_id: of persons.
    """
    path = Path(path)
    rows = np.flatnonzero((scored.detections[..., 2] > 0).any(axis=1))
    with written_file(path) as part, part.open("w", encoding="ascii") as file:
        file.write("[")
        for count, i in enumerate(rows):
            file.write(",\n" if count else "\n")
            entry = _result_entry(scored, int(i), keypoint_set, category_id)
            file.write(json.dumps(entry, separators=(",", ":")))
        file.write("\n]\n")
    return path


def _result_entry(scored: ScoredPersons, i: int, keypoint_set: KeypointSet, category_id: int) -> dict[str, Any]:
    return result_entry(
        int(scored.people.image_id[i]),
        scored.detections[i],
        float(scored.scores[i]),
        scored.people.bbox_xyxy[i].astype(np.float64),
        keypoint_set,
        category_id,
    )


def result_entry(
    image_id: int,
    detection: np.ndarray,
    score: float,
    bbox_xyxy: np.ndarray,
    keypoint_set: KeypointSet,
    category_id: int = 1,
) -> dict[str, Any]:
    """One person of a COCO result file, see `write_coco_results`.

    Args:
        image_id: of the picture.
        detection: (K, 3) float64 x, y in image pixels and score.
        score: of the person.
        bbox_xyxy: (4,) float64; written for sets of one field and part only.
        keypoint_set: the annotation fields.
        category_id: of persons.
    """
    entry: dict[str, Any] = {"image_id": image_id, "category_id": category_id, "score": score}
    start = 0
    for name, count in keypoint_set.annotation_fields.items():
        entry[name] = detection[start : start + count].ravel().tolist()
        start += count
        if name in _SCORE_FIELDS:
            entry[_SCORE_FIELDS[name]] = score
    if len(keypoint_set.annotation_fields) > 1:
        entry["wholebody_score"] = score
    elif len(keypoint_set.parts) == 1:
        x0, y0, x1, y1 = bbox_xyxy.tolist()
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return entry
