"""What an evaluation looks like: contact sheets, tables and charts, each written to a file whose path is returned.

N predicted persons, K keypoints.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from cigpose.config.outcome import FIGURES
from cigpose.draw import draw_poses, label_picture
from cigpose.evaluate.charts import bars_svg, histogram_svg
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet, parts_with_whole

PCK_DISTANCES = (0.02, 0.05, 0.1)
"""Of the larger side of the annotated box."""

_PAPER = 250
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
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ("AP", "AP50", "AP75", "AR")
    with path.open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("part", *columns))
        for part, row in nested(metrics).items():
            if all(name in row for name in columns):
                writer.writerow((part, *(f"{row[name]:.6f}" for name in columns)))
    return path


def write_metrics_json(metrics: Mapping[str, float], path: Path) -> Path:
    """Nested by part, full precision, sorted as evaluated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nested(metrics), indent=1) + "\n", encoding="ascii")
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
        per_page: pictures on a page, in two columns.
        tile_height: pixels of a picture on the page.
        min_score: keypoints below are not drawn; those below one and a half times that are faint.
        name: of the pages.

    Returns: the pages, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiles = []
    for image_id, image in pictures:
        rows = predictions.image_id == image_id
        scale = tile_height / image.shape[0]
        small = cv2.resize(
            image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
        ours = draw_poses(
            small,
            predictions.keypoints[rows] * scale,
            predictions.keypoint_scores[rows],
            keypoint_set,
            min_score=min_score,
            sure_score=1.5 * min_score,
        )
        pair = [label_picture(ours, f"{image_id}: predicted")]
        if truth is not None:
            labels = truth.keypoints[(truth.image_id == image_id) & ~truth.is_crowd]
            drawn = draw_poses(
                small, labels[..., :2] * scale, np.minimum(labels[..., 2], 1), keypoint_set, min_score=1e-6
            )
            pair.append(label_picture(drawn, "labelled"))
        tiles.append(np.hstack(pair))
    pages = []
    for start in range(0, len(tiles), per_page):
        path = folder / f"{name}-{start // per_page:02d}.jpg"
        cv2.imwrite(str(path), _page(tiles[start : start + per_page]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        pages.append(path)
    return pages


def _page(tiles: Sequence[np.ndarray], margin: int = 6) -> np.ndarray:
    """Tiles of equal height on white paper, in two columns, each as wide as its widest tile."""
    columns = [tiles[0::2], tiles[1::2]] if len(tiles) > 1 else [tiles]
    widths = [max(tile.shape[1] for tile in column) for column in columns]
    height = tiles[0].shape[0]
    num_rows = len(columns[0])
    page = np.full(
        (num_rows * (height + margin) + margin, sum(widths) + margin * (len(columns) + 1), 3), _PAPER, dtype=np.uint8
    )
    left = margin
    for column, width in zip(columns, widths, strict=True):
        for row, tile in enumerate(column):
            top = margin + row * (height + margin)
            page[top : top + height, left : left + tile.shape[1]] = tile
        left += width + margin
    return page


def write_charts(
    metrics: Mapping[str, float], predictions: Predictions, keypoint_set: KeypointSet, folder: Path
) -> list[Path]:
    """`parts.svg` (AP and AR per part) and `scores.svg` (distribution of keypoint scores per part)."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = {part: {"AP": row["AP"], "AR": row["AR"]} for part, row in nested(metrics).items() if "AP" in row}
    samples = {
        part: predictions.keypoint_scores[:, list(members)].ravel() for part, members in keypoint_set.parts.items()
    }
    charts = {
        "parts.svg": bars_svg("Average precision and recall per part", bars),
        "scores.svg": histogram_svg("Keypoint scores", samples),
    }
    for name, text in charts.items():
        (folder / name).write_text(text, encoding="ascii")
    return [folder / name for name in charts]


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    metrics: Mapping[str, float],
    pck_table: Mapping[str, Mapping[str, float]] | None = None,
    pictures: Sequence[Path] = (),
) -> Path:
    """One markdown page: the protocol, the table of parts, PCK, charts and pictures by relative link.

    Args:
        path: the file to write.
        title: the heading.
        facts: what the figures hold for: dataset, persons, boxes, flip test, ...
        metrics: as `evaluate_predictions` gives them.
        pck_table: as `pck` gives it.
        pictures: files beside or below the page.
    """
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [parts_table(metrics)]
    if "hand/AP" in metrics:
        lines += ["`hand` is the mean of the two hands. Every part is an evaluation of its own.", ""]
    if pck_table:
        columns = list(next(iter(pck_table.values())))
        lines += ["Share of labelled keypoints within a distance, in box sizes:", ""]
        lines += ["| part | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        for part, row in pck_table.items():
            cells = [f"{row[column]:.3f}" if row[column] >= 0 else "-" for column in columns]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"![{picture.stem}]({picture.relative_to(path.parent).as_posix()})\n" for picture in pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="ascii", errors="backslashreplace")
    return path
