"""The labels a prediction is measured against: a COCO-format file, read once into arrays.

M annotations, K keypoints of the set, I images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cigpose.keypoints import KeypointSet

BOX_AREA_SHARE = 0.53
"""CrowdPose has no segments: a person is taken to cover this share of the box."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruth:
    """Annotated persons of a dataset, crowds included. Coordinates are image pixels."""

    images: dict[int, dict[str, Any]]
    """Image id -> its entry in the file."""
    category_id: int
    """Of persons."""
    image_id: np.ndarray
    """(M,) int64."""
    annotation_id: np.ndarray
    """(M,) int64, as in the file."""
    keypoints: np.ndarray
    """(M, K, 3) float64 x, y, v; v above 0 is labelled."""
    area: np.ndarray
    """(M,) float64, by the rule asked for."""
    bbox_xywh: np.ndarray
    """(M, 4) float64, unclipped."""
    is_crowd: np.ndarray
    """(M,) bool."""
    num_keypoints: np.ndarray
    """(M,) int64: the file's own count of labelled (CrowdPose: visible) keypoints of `keypoints`."""

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def crowd_index(self) -> dict[int, float] | None:
        """Image id -> crowdedness, if the file states it (CrowdPose)."""
        if not any("crowdIndex" in image for image in self.images.values()):
            return None
        return {image_id: float(image.get("crowdIndex", 1.0)) for image_id, image in self.images.items()}

    def restrict(self, image_ids: Sequence[int] | np.ndarray) -> GroundTruth:
        """The same labels of some of the images only."""
        wanted = {int(image_id) for image_id in image_ids}
        rows = np.array([image_id in wanted for image_id in self.image_id.tolist()], dtype=bool)
        return GroundTruth(
            images={image_id: image for image_id, image in self.images.items() if image_id in wanted},
            category_id=self.category_id,
            image_id=self.image_id[rows],
            annotation_id=self.annotation_id[rows],
            keypoints=self.keypoints[rows],
            area=self.area[rows],
            bbox_xywh=self.bbox_xywh[rows],
            is_crowd=self.is_crowd[rows],
            num_keypoints=self.num_keypoints[rows],
        )


def load_ground_truth(
    source: Path | str | Mapping[str, Any] | GroundTruth,
    keypoint_set: KeypointSet,
    *,
    area: Literal["annotation", "box"] = "annotation",
) -> GroundTruth:
    """Read a COCO-format annotation file.

    Args:
        source: the file, its parsed content, or labels already read (returned as they are).
        keypoint_set: which annotation fields hold the keypoints.
        area: `annotation` takes each annotation's own, `box` 0.53 of its box.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO format, or its keypoints are not those of the set.
    """
    if isinstance(source, GroundTruth):
        return source
    if isinstance(source, Mapping):
        return _from_content(source, keypoint_set, area, "ground truth")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no ground truth there. Set ground_truth: true for the dataset in params.yaml and run "
            "`dvc repro shard`."
        )
    return parse_ground_truth(path.read_bytes(), keypoint_set, area=area, where=str(path))


def parse_ground_truth(
    text: bytes | str, keypoint_set: KeypointSet, *, area: Literal["annotation", "box"] = "annotation", where: str
) -> GroundTruth:
    """As `load_ground_truth`, of a file's content that was read elsewhere; `where` names it in messages."""
    try:
        content = json.loads(text)
    except ValueError as err:
        raise ValueError(f"{where}: not valid JSON ({err}). Delete it and make it again.") from err
    return _from_content(content, keypoint_set, area, where)


def _from_content(content: Any, keypoint_set: KeypointSet, area: str, where: str) -> GroundTruth:
    if not isinstance(content, Mapping) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(f"{where}: expected a COCO file with images, annotations and categories. Is it a result file?")
    category_id = _person_category(content["categories"], where)
    rows = [row for row in content["annotations"] if row.get("category_id", category_id) == category_id]
    boxes = np.array([_field(row, "bbox", where) for row in rows], dtype=np.float64).reshape(-1, 4)
    keypoints = _keypoints(rows, keypoint_set, where)
    labelled = (keypoints[:, : next(iter(keypoint_set.annotation_fields.values())), 2] > 0).sum(axis=1)
    truth = GroundTruth(
        images={int(image["id"]): dict(image) for image in content["images"]},
        category_id=category_id,
        image_id=np.array([row["image_id"] for row in rows], dtype=np.int64),
        annotation_id=np.array([row.get("id", i + 1) for i, row in enumerate(rows)], dtype=np.int64),
        keypoints=keypoints,
        area=boxes[:, 2] * boxes[:, 3] * BOX_AREA_SHARE if area == "box" else _areas(rows, where),
        bbox_xywh=boxes,
        is_crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
        num_keypoints=np.array(
            [row.get("num_keypoints", count) for row, count in zip(rows, labelled, strict=True)], dtype=np.int64
        ),
    )
    if unknown := set(truth.image_id.tolist()) - truth.images.keys():
        raise ValueError(f"{where}: annotations name image {min(unknown)}, which is not among its images.")
    return truth


def _person_category(categories: Sequence[Mapping[str, Any]], where: str) -> int:
    people = [entry for entry in categories if entry.get("name") == "person"] or list(categories)
    if len(people) != 1:
        raise ValueError(
            f"{where}: expected one category, or one named person; found {[c.get('name') for c in people]}."
        )
    return int(people[0]["id"])


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: annotation {row.get('id')} has no {name}, which evaluation needs.")
    return row[name]


def _areas(rows: Sequence[Mapping[str, Any]], where: str) -> np.ndarray:
    for row in rows:
        if "area" not in row:
            raise ValueError(
                f"{where}: annotation {row.get('id')} has no area. Set `area: box`, in evaluate and in "
                "train.validation, to take 0.53 of its box, as CrowdPose does."
            )
    return np.array([row["area"] for row in rows], dtype=np.float64)


def _keypoints(rows: Sequence[Mapping[str, Any]], keypoint_set: KeypointSet, where: str) -> np.ndarray:
    """(M, K, 3); crowds without the fields count as unlabelled."""
    columns = []
    for name, count in keypoint_set.annotation_fields.items():
        column = np.zeros((len(rows), count * 3))
        for i, row in enumerate(rows):
            values = row.get(name)
            if values is None and row.get("iscrowd"):
                continue
            if values is None or len(values) != count * 3:
                found = "no" if values is None else f"{len(values)} numbers in"
                raise ValueError(
                    f"{where}: annotation {row.get('id')} has {found} {name}, expected {count * 3} ({count} keypoints "
                    f"x 3) for keypoint set {keypoint_set.name!r}. Is `keypoints` in params.yaml the set of this file?"
                )
            column[i] = values
        columns.append(column.reshape(len(rows), count, 3))
    return np.concatenate(columns, axis=1)
