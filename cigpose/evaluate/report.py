"""An evaluation as tables and contact sheets, each written to a file whose path is returned. See `page` for the report.

N predicted persons, K keypoints.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from cigpose.config.outcome import FIGURES
from cigpose.draw import pack_pictures
from cigpose.evaluate.gallery import image_tile
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.files.atomic import write_json, written_file
from cigpose.keypoints import KeypointSet, parts_with_whole

PCK_DISTANCES = (0.02, 0.05, 0.1)
"""Of the larger side of the annotated box."""

_JPEG_QUALITY = 90


def nested(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`{"whole/AP": x}` as `{"whole": {"AP": x}}`, the form of data/metrics/evaluate.json."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        part, _, figure = name.partition("/")
        table.setdefault(part, {})[figure] = value
    return table


def parts_table(metrics: Mapping[str, float]) -> str:
    """A markdown table, a row per part, a column per figure; `-` where there was nothing to measure."""
    table = nested(metrics)
    figures = [name for name in FIGURES if any(name in row for row in table.values())]
    figures += sorted({name for row in table.values() for name in row} - set(figures))
    lines = ["| part | " + " | ".join(figures) + " |", "| --- |" + " ---: |" * len(figures)]
    for part, row in table.items():
        cells = [f"{row[name]:.3f}" if row.get(name, -1.0) >= 0 else "-" for name in figures]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_parts_csv(metrics: Mapping[str, float], path: Path) -> Path:
    """`part,AP,AP50,AP75,AR`, a row per part, for `dvc plots`."""
    columns = ("AP", "AP50", "AP75", "AR")
    with written_file(path) as part, part.open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("part", *columns))
        for name_of_part, row in nested(metrics).items():
            if all(name in row for name in columns):
                writer.writerow((name_of_part, *(f"{row[name]:.6f}" for name in columns)))
    return path


def write_metrics_json(metrics: Mapping[str, float], path: Path) -> Path:
    """Nested by part, full precision, sorted as evaluated."""
    write_json(path, nested(metrics))
    return path


def pck(
    predictions: Predictions,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    distances: Sequence[float] = PCK_DISTANCES,
) -> dict[str, dict[str, float]]:
    """Share of labelled keypoints predicted within a distance, for predictions made on ground-truth boxes.

    Args:
        predictions: `person_id` is the annotation's id; others (detected boxes) are not looked at.
        truth: the labels.
        keypoint_set: its parts; `whole` is added if there are several.
        distances: as shares of the larger side of the annotated box.

    Returns: part -> `PCK@<distance>` -> share; -1 where a part has no labelled keypoint.
    """
    row_of = {key: i for i, key in enumerate(zip(truth.image_id.tolist(), truth.annotation_id.tolist(), strict=True))}
    keys = zip(predictions.image_id.tolist(), predictions.person_id.tolist(), strict=True)
    pairs = np.array([(i, row_of[key]) for i, key in enumerate(keys) if key in row_of], dtype=np.int64).reshape(-1, 2)
    labels = truth.keypoints[pairs[:, 1]]
    offset = predictions.keypoints[pairs[:, 0]].astype(np.float64) - labels[..., :2]
    size = np.maximum(truth.bbox_xywh[pairs[:, 1], 2:].max(axis=1), 1.0)
    error = np.hypot(offset[..., 0], offset[..., 1]) / size[:, None]  # (M, K)
    labelled = labels[..., 2] > 0
    table: dict[str, dict[str, float]] = {}
    for part, members in parts_with_whole(keypoint_set).items():
        index = list(members)
        errors = error[:, index][labelled[:, index]]
        table[part] = {f"PCK@{d:g}": float((errors <= d).mean()) if len(errors) else -1.0 for d in distances}
    return table


def contact_sheets(
    pictures: Iterable[tuple[int, np.ndarray]],
    predictions: Predictions,
    keypoint_set: KeypointSet,
    folder: Path,
    *,
    truth: GroundTruth | None = None,
    per_page: int = 8,
    tile_height: int = 300,
    min_score: float = 0.3,
    name: str = "page",
) -> list[Path]:
    """Pages of pictures with everybody's predicted skeleton, beside the labelled one.

    Args:
        pictures: (image id, uint8 (H, W, 3) BGR); drawn in this order.
        predictions: of these images and others.
        keypoint_set: what to draw.
        folder: where `<name>-00.jpg`, ... go.
        truth: labels to show on the right; None: predictions alone.
        per_page: pictures on a page.
        tile_height: pixels of a picture on the page, at most.
        min_score: keypoints below are not drawn; those below one and a half times that are faint.
        name: of the pages.

    Returns: the pages, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiles = [
        image_tile(image, image_id, predictions, keypoint_set, truth=truth, height=tile_height, min_score=min_score)
        for image_id, image in pictures
    ]
    pages = []
    for start in range(0, len(tiles), per_page):
        path = folder / f"{name}-{start // per_page:02d}.jpg"
        cv2.imwrite(
            str(path), pack_pictures(tiles[start : start + per_page]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        )
        pages.append(path)
    return pages
