"""How long training stands still for the score of a validation: waited for, and made beside it.

    python tests/benchmarks/bench_validation.py [--images 5000]

Seeded noise around labels in the numbers of COCO-WholeBody's validation: 5,000 pictures, 11,004 labelled people and
104,125 detections. Prints the ratio, both times, and how long the score took beside the training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
from shard_index import shard_index

from cigpose.config import config_from_mapping, load_preset
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.predictions import Predictions
from cigpose.files.digest import sha256_of
from cigpose.keypoints import COCO_WHOLEBODY
from cigpose.train.scoring import Scorer

NAME = "coco-wholebody-val"


def label_people(images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, corner of the box and keypoints of the labelled people."""
    num = round(images * 11004 / 5000)
    corner = rng.uniform(0, 400, (num, 1, 2))
    keypoints = np.concatenate([corner + rng.uniform(0, 150, (num, 133, 2)), rng.integers(0, 3, (num, 133, 1))], axis=2)
    return np.sort(rng.integers(1, images + 1, num)), corner[:, 0], keypoints.round(1)


def detect_people(image: np.ndarray, corner: np.ndarray, labels: np.ndarray, images: int) -> Predictions:
    """Each person found once and a little off, and all the rest of the detections somewhere."""
    rng = np.random.default_rng(1)
    others = round(images * 104125 / 5000) - len(image)
    away = rng.uniform(0, 400, (others, 1, 2))
    found = labels[..., :2] + rng.normal(0, 1, labels[..., :2].shape) * rng.uniform(0, 12, (len(labels), 1, 1))
    keypoints = np.concatenate([found, away + rng.uniform(0, 150, (others, 133, 2))])
    corners = np.concatenate([corner, away[:, 0]])
    num = len(keypoints)
    return Predictions(
        image_id=np.concatenate([image, rng.integers(1, images + 1, others)]),
        person_id=np.arange(num),
        keypoints=keypoints,
        keypoint_scores=rng.uniform(0, 1, (num, 133)),
        center=corners + 75,
        scale=np.full((num, 2), 190.0),
        bbox_xyxy=np.concatenate([corners, corners + 150], axis=1),
        box_score=rng.uniform(0, 1, num),
    )


def write_labels(folder: Path, images: int) -> Predictions:
    """A dataset of nothing but labels, and what a detector and a model would say to it."""
    image, corner, labels = label_people(images, np.random.default_rng(0))
    fields: dict[str, Any] = {}
    start = 0
    for name, count in COCO_WHOLEBODY.annotation_fields.items():
        fields[name] = labels[:, start : start + count].reshape(len(labels), -1).tolist()
        start += count
    rows = [
        {"id": i + 1, "image_id": int(image[i]), "category_id": 1, "iscrowd": 0, "area": 12000.0}
        | {"bbox": [*corner[i].tolist(), 150.0, 150.0], **{name: values[i] for name, values in fields.items()}}
        for i in range(len(image))
    ]
    content = {
        "images": [{"id": i} for i in range(1, images + 1)],
        "annotations": rows,
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / NAME).mkdir()
    (folder / NAME / "ground_truth.json").write_text(json.dumps(content))
    digest = sha256_of(folder / NAME / "ground_truth.json")
    index = shard_index(NAME, 1) | {"ground_truth": "ground_truth.json", "ground_truth_sha256": digest}
    (folder / NAME / "index.json").write_text(json.dumps(index))
    (folder / NAME / index["shards"][0]["name"]).write_bytes(bytes(index["shards"][0]["bytes"]))
    return detect_people(image, corner, labels, images)


def main() -> None:
    """Score once in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    options = parser.parse_args()
    values = load_preset("cigpose-m_coco-wholebody_256x192").to_mapping()
    values["data"] |= {"val": NAME, "locations": {}}
    config = config_from_mapping(values).for_validation()
    with tempfile.TemporaryDirectory() as scratch:
        predictions = write_labels(Path(scratch), options.images)
        truth = dataset_truth(open_shards(config, NAME, Path(scratch)), config)
        began = time.perf_counter()
        expected = evaluate_predictions(predictions, truth, config.keypoint_set, config.evaluate)
        waited = time.perf_counter() - began
        with Scorer(config, Path(scratch)) as scorer:
            began = time.perf_counter()
            scorer.submit(predictions)
            blocked = time.perf_counter() - began
            longest = 0.0
            while not scorer.is_done:  # what a training loop does, which may be held up by the other threads
                queued = time.perf_counter()
                time.sleep(0.005)
                longest = max(longest, time.perf_counter() - queued - 0.005)
            assert scorer.take() == expected
            beside = time.perf_counter() - began
    print(f"{waited / blocked:.0f} times: training waits {blocked:.3f} s in place of {waited:.1f} s")
    print(f"{len(predictions):,} detections of {len(truth):,} people")
    print(f"the score is there after {beside:.1f} s, labels read; a loop was held up {longest * 1e3:.0f} ms at most")


if __name__ == "__main__":
    main()
