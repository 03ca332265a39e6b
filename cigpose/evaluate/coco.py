"""Average precision of predicted persons by pycocotools, per part and for the whole body.

The protocol is upstream's (golden README section 4), its numbers are reproduced exactly:
- duplicates are removed and persons scored as `cigpose.evaluate.oks` says; all parts share the person score;
- each part is an evaluation of its own, over its keypoints and sigmas (float32), at most 20 persons per image;
- a ground truth counts in a part only where it has a labelled keypoint of that part, a prediction only where it has a
  keypoint of positive score there;
- with several parts the area of a prediction is the extent of its BODY keypoints, in every part; with one part it is
  its box. It decides only whether an unmatched person counts in AP_M and AP_L.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cigpose.config import EvaluateConfig
from cigpose.evaluate.ground_truth import GroundTruth, load_ground_truth
from cigpose.evaluate.oks import select_persons
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet

FIGURES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")
"""pycocotools' ten figures, in its order. -1 where there is nothing to measure."""

MAX_PERSONS_PER_IMAGE = 20
_CROWDING = {"AP_easy": (0.0, 0.2), "AP_medium": (0.2, 0.8), "AP_hard": (0.8, np.inf)}
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
    _check(predictions, truth, keypoint_set)
    people, scores = select_persons(predictions, keypoint_set, config)
    rounded = np.round(people.keypoints.astype(np.float64), _COORDINATE_DECIMALS)
    keypoint_scores = np.round(people.keypoint_scores.astype(np.float64), _SCORE_DECIMALS)
    detections = np.concatenate([rounded, keypoint_scores[..., None]], axis=2)  # (N, K, 3): what is scored and written
    if results_path is not None:
        write_results(results_path, people, detections, scores, keypoint_set, truth.category_id)
    areas = _detection_areas(people, rounded, keypoint_set)
    everything = tuple(range(len(keypoint_set)))
    parts = dict(keypoint_set.parts) | ({"whole": everything} if len(keypoint_set.parts) > 1 else {})
    metrics: dict[str, float] = {}
    for part, members in parts.items():
        index = np.array(members)
        own_count = len(keypoint_set.annotation_fields) == 1 and set(members) == set(everything)
        truths = _truth_rows(truth, index, own_count=own_count)
        rows = _detection_rows(people, detections[:, index], scores, areas, truth.category_id)
        sigmas = np.asarray(keypoint_set.sigmas, dtype=np.float32)[index]
        run = _run(truth, truths, rows, sigmas, sorted(truth.images))
        metrics |= {f"{part}/{name}": float(value) for name, value in zip(FIGURES, run.stats, strict=True)}
        if truth.crowd_index is not None:
            metrics |= _by_crowding(part, truth, truths, rows, sigmas)
    return metrics | _hand_means(metrics)


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


def _detection_areas(people: Predictions, keypoints: np.ndarray, keypoint_set: KeypointSet) -> np.ndarray:
    """(N,) square pixels."""
    if len(keypoint_set.parts) > 1:
        body = keypoints[:, list(next(iter(keypoint_set.parts.values())))]
        return np.ptp(body, axis=1).prod(axis=1) if len(body) else np.zeros(0)
    corners = people.bbox_xyxy.astype(np.float64)
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def _truth_rows(truth: GroundTruth, index: np.ndarray, *, own_count: bool) -> list[dict[str, Any]]:
    """Annotations of one part. Ids start at 1: pycocotools takes 0 for `not matched`."""
    keypoints = truth.keypoints[:, index]
    counts = truth.num_keypoints if own_count else (keypoints[..., 2] > 0).sum(axis=1)
    return [
        {
            "id": i + 1,
            "image_id": int(truth.image_id[i]),
            "category_id": truth.category_id,
            "iscrowd": int(truth.is_crowd[i]),
            "num_keypoints": int(counts[i]),
            "area": float(truth.area[i]),
            "bbox": truth.bbox_xywh[i],
            "keypoints": keypoints[i],
        }
        for i in range(len(truth))
    ]


def _detection_rows(
    people: Predictions, keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, category_id: int
) -> list[dict[str, Any]]:
    """Predictions of one part; those without a keypoint of positive score there are left out."""
    return [
        {
            "id": int(i) + 1,
            "image_id": int(people.image_id[i]),
            "category_id": category_id,
            "score": float(scores[i]),
            "area": float(areas[i]),
            "keypoints": keypoints[i],
        }
        for i in np.flatnonzero((keypoints[..., 2] > 0).any(axis=1))
    ]


class _Evaluation(COCOeval):  # type: ignore[misc]
    """pycocotools' evaluation; one array operation compares an annotation with all predictions of its image."""

    def computeOks(self, imgId: int, catId: int) -> np.ndarray | list[Any]:  # noqa: N802, N803
        """(predictions, annotations) similarities; keypoints are (k, 3) arrays here."""
        truths, rows = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-row["score"] for row in rows], kind="mergesort")[: self.params.maxDets[-1]]
        if len(truths) == 0 or len(order) == 0:
            return []
        points = np.stack([rows[i]["keypoints"] for i in order])[..., :2]  # (D, k, 2)
        variance = (self.params.kpt_oks_sigmas * 2) ** 2
        similarity = np.zeros((len(order), len(truths)))
        for j, truth in enumerate(truths):
            labelled = truth["keypoints"][:, 2] > 0
            if labelled.any():
                offset = points - truth["keypoints"][None, :, :2]
            else:  # an ignored person: distance to its box, doubled
                x, y, width, height = truth["bbox"]
                low, high = np.array([x - width, y - height]), np.array([x + width * 2, y + height * 2])
                offset = np.maximum(0, low - points) + np.maximum(0, points - high)
                labelled = np.ones(len(variance), dtype=bool)
            error = (offset[..., 0] ** 2 + offset[..., 1] ** 2) / variance / (truth["area"] + np.spacing(1)) / 2
            likeness = np.exp(-np.ascontiguousarray(error[:, labelled]))
            similarity[:, j] = likeness.sum(axis=1) / likeness.shape[1]
        return similarity


def _run(
    truth: GroundTruth,
    truths: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    sigmas: np.ndarray,
    image_ids: list[int],
) -> Any:
    images = [{"id": image_id} for image_id in image_ids]
    with contextlib.redirect_stdout(io.StringIO()):
        run = _Evaluation(_coco(truths, images, truth.category_id), _coco(rows, images, truth.category_id), "keypoints")
        run.params.imgIds = image_ids
        run.params.kpt_oks_sigmas = sigmas
        run.params.maxDets = [MAX_PERSONS_PER_IMAGE]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def _coco(annotations: list[dict[str, Any]], images: list[dict[str, Any]], category_id: int) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": "person"}],
    }
    coco.createIndex()
    return coco


def _by_crowding(
    part: str, truth: GroundTruth, truths: list[dict[str, Any]], rows: list[dict[str, Any]], sigmas: np.ndarray
) -> dict[str, float]:
    """AP over the images of each degree of crowding; like upstream's a plain mean, -1 entries included."""
    crowding = truth.crowd_index or {}
    found = {}
    for name, (low, high) in _CROWDING.items():
        image_ids = sorted(image_id for image_id, value in crowding.items() if low <= value < high)
        run = _run(truth, truths, rows, sigmas, image_ids)
        found[f"{part}/{name}"] = float(run.eval["precision"][:, :, 0, 0, 0].mean())
    return found


def _hand_means(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for figure in ("AP", "AR"):
        sides = [metrics[f"{side}_hand/{figure}"] for side in ("left", "right") if f"{side}_hand/{figure}" in metrics]
        if len(sides) == 2:
            measured = [value for value in sides if value >= 0]
            found[f"hand/{figure}"] = sum(measured) / len(measured) if measured else -1.0
    return found


def write_results(
    path: str | Path,
    people: Predictions,
    detections: np.ndarray,
    scores: np.ndarray,
    keypoint_set: KeypointSet,
    category_id: int = 1,
) -> Path:
    """Write a COCO result file that other tools score as `evaluate_predictions` does.

    Sets of several annotation fields get a field each (`foot_kpts`, ...) and its score, which is the person's in all;
    they carry no `bbox`, from which pycocotools would take the area. Other sets do. Persons without any keypoint of
    positive score are left out, as evaluation leaves them out.

    Args:
        path: the JSON file; replaced atomically.
        people: the persons, N rows.
        detections: (N, K, 3) x, y in image pixels and score.
        scores: (N,) person scores.
        keypoint_set: the annotation fields.
        category_id: of persons.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows = np.flatnonzero((detections[..., 2] > 0).any(axis=1))
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write("[")
            for count, i in enumerate(rows):
                entry = _result_entry(people, int(i), detections[i], float(scores[i]), keypoint_set, category_id)
                file.write(",\n" if count else "\n")
                file.write(json.dumps(entry, separators=(",", ":")))
            file.write("\n]\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _result_entry(
    people: Predictions, i: int, detection: np.ndarray, score: float, keypoint_set: KeypointSet, category_id: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {"image_id": int(people.image_id[i]), "category_id": category_id, "score": score}
    start = 0
    for name, count in keypoint_set.annotation_fields.items():
        entry[name] = detection[start : start + count].ravel().tolist()
        start += count
        if name in _SCORE_FIELDS:
            entry[_SCORE_FIELDS[name]] = score
    if len(keypoint_set.annotation_fields) > 1:
        entry["wholebody_score"] = score
    elif len(keypoint_set.parts) == 1:
        x0, y0, x1, y1 = people.bbox_xyxy[i].astype(np.float64).tolist()
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return entry
