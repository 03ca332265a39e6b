"""Time of the six whole-body evaluations, ours over plain pycocotools with the same figures.

    python tests/benchmarks/bench_evaluate.py [--images 500] [--rounds 3]

Synthetic people: three per image, one prediction each. Prints the ratio, both times and whether all figures are equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
import pycocotools.cocoeval

from cigpose.config import EvaluateConfig
from cigpose.evaluate import coco
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO_WHOLEBODY


class Plain(pycocotools.cocoeval.COCOeval):
    """Pycocotools' own similarities; it wants flat lists."""

    def computeOks(self, imgId: int, catId: int):  # noqa: N802, N803
        for rows in (self._gts[imgId, catId], self._dts[imgId, catId]):
            for row in rows:
                row["keypoints"] = np.ravel(row["keypoints"]).tolist()
        return super().computeOks(imgId, catId)


def people(images: int) -> tuple[Predictions, GroundTruth]:
    """Three persons per image and a prediction of each."""
    rng = np.random.default_rng(0)
    num = 3 * images
    image_id = np.repeat(np.arange(1, images + 1), 3)
    corner = rng.uniform(0, 200, (num, 1, 2))
    labels = np.concatenate([corner + rng.uniform(0, 200, (num, 133, 2)), rng.integers(0, 3, (num, 133, 1))], axis=2)
    truth = GroundTruth(
        images={i: {"id": i} for i in range(1, images + 1)},
        category_id=1,
        image_id=image_id,
        annotation_id=np.arange(num),
        keypoints=labels,
        area=np.full(num, 30000.0),
        bbox_xywh=np.concatenate([corner[:, 0], np.full((num, 2), 200.0)], axis=1),
        is_crowd=np.zeros(num, dtype=bool),
        num_keypoints=(labels[:, :17, 2] > 0).sum(axis=1),
    )
    errors = rng.normal(0, 1, (num, 133, 2)) * rng.uniform(0, 12, (num, 1, 1))
    predictions = Predictions(
        image_id=image_id,
        person_id=np.arange(num),
        keypoints=labels[..., :2] + errors,
        keypoint_scores=rng.uniform(0.2, 1, (num, 133)),
        center=corner[:, 0] + 100,
        scale=np.full((num, 2), 250.0),
        bbox_xyxy=np.concatenate([corner[:, 0], corner[:, 0] + 200], axis=1),
        box_score=rng.uniform(0.5, 1, num),
    )
    return predictions, truth


def main() -> None:
    """Run both in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    predictions, truth = people(options.images)
    ours_class, times, figures = coco._Evaluation, {"ours": [], "plain": []}, {}
    for _ in range(options.rounds):
        for name, evaluation in (("ours", ours_class), ("plain", Plain)):
            coco._Evaluation = evaluation
            began = time.process_time()
            figures[name] = coco.evaluate_predictions(predictions, truth, COCO_WHOLEBODY, EvaluateConfig())
            times[name].append(time.process_time() - began)
    coco._Evaluation = ours_class
    ratios = [plain / ours for ours, plain in zip(times["ours"], times["plain"], strict=True)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {3 * options.images} persons, CPU seconds of six evaluations")
    print(f"ours {statistics.median(times['ours']):.2f}   plain {statistics.median(times['plain']):.2f}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"figures equal: {figures['ours'] == figures['plain']}")


if __name__ == "__main__":
    main()
