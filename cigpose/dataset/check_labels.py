"""The people of a COCO-keypoints file as arrays, faults and all; what cannot be read is named, not raised.

N people (annotations of the person category that are no crowd), K keypoints, P pictures. Coordinates are image pixels.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cigpose.dataset.labels import BOX_MARGIN
from cigpose.dataset.names import ASSUMED_SIGMA, KNOWN_SETS, guess_flip_pairs, known_set
from cigpose.files.errors import DataError, shown
from cigpose.files.jsonstream import parse_element, split_arrays
from cigpose.keypoints import KeypointSet

_ARRAYS = ("images", "annotations", "categories")


@dataclass(frozen=True, kw_only=True)
class PictureEntry:
    """A picture as the file lists it."""

    image_id: int
    file_name: str
    size: tuple[int, int] | None
    """(width, height) as stated; None where it is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPeople:
    """What a file says of its people."""

    keypoint_set: KeypointSet
    pictures: list[PictureEntry]
    annotation_id: np.ndarray
    """(N,) int64."""
    picture: np.ndarray
    """(N,) int64, rows of `pictures`."""
    keypoints: np.ndarray
    """(N, K, 3) float64 x, y, v; finite."""
    bbox_xywh: np.ndarray
    """(N, 4) float64; NaN where the file has none."""
    stated: np.ndarray
    """(N,) int64 `num_keypoints` of the file, -1 where it has none."""
    crowd_picture: np.ndarray
    """(C,) int64 rows of `pictures`: of regions marked as crowds."""
    crowd_bbox_xywh: np.ndarray
    """(C, 4) float64."""
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """`annotation_id`, `image_id` (None where not known) and `text` of every entry that could not be used."""

    def __len__(self) -> int:
        return len(self.annotation_id)

    @property
    def labelled(self) -> np.ndarray:
        """(N, K) bool."""
        return np.asarray(self.keypoints[..., 2] > 0)

    @property
    def image_sizes(self) -> np.ndarray:
        """(N, 2) float64 width, height of each person's picture; NaN where it is not stated."""
        sizes = np.array([entry.size or (np.nan, np.nan) for entry in self.pictures], dtype=np.float64).reshape(-1, 2)
        return sizes[self.picture]

    def corners(self, rows: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of some people as a predictor takes them: clipped; around the labels where there is none.

        Returns: (M, 4) float64 x0, y0, x1, y1 and (M,) bool, which of them are boxes.
        """
        points = np.where(self.labelled[rows, :, None], self.keypoints[rows, :, :2], np.nan)
        low, high = self.bbox_xywh[rows, :2], self.bbox_xywh[rows, :2] + self.bbox_xywh[rows, 2:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            around = np.nanmin(points, axis=1), np.nanmax(points, axis=1)
        margin = BOX_MARGIN * (around[1] - around[0]) + 1
        corners = np.concatenate(
            [np.where(np.isnan(low), around[0] - margin, low), np.where(np.isnan(high), around[1] + margin, high)],
            axis=1,
        )
        corners = np.clip(corners, 0, [*size, *size])
        return corners, np.asarray(((corners[:, 2:] - corners[:, :2]) > 1).all(axis=1))


def read_labelled_people(
    path: Path, keypoint_set: KeypointSet | None = None, category: str | None = None
) -> LabelledPeople:
    """Read a file in one pass, element by element.

    Args:
        path: COCO-keypoints JSON.
        keypoint_set: what its keypoints are; None: as its category names them.
        category: name of the category that is looked at; None: `person`, or the only one that has keypoints.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no such JSON, names no keypoints, or has no people.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no labels there. Expected a COCO-keypoints JSON file.")
    rows = _Rows(path.name, keypoint_set)
    with path.open("rb") as stream:
        for key, element in split_arrays(stream, str(path), _ARRAYS):
            number = rows.count(key)
            rows.take(key, parse_element(element, f"{path}: {key} {number}"))
    wanted = _category(rows.categories, category, str(path))
    return rows.people(wanted, keypoint_set or keypoints_of_category(wanted, str(path)), str(path))


def keypoints_of_category(category: Mapping[str, Any], where: str) -> KeypointSet:
    """The keypoint set that an entry of `categories` spells out; left and right are told by the names.

    Raises:
        DataError: it has no names, or they or its skeleton cannot be.
    """
    names = category.get("keypoints")
    if not isinstance(names, list) or not names:
        known = ", ".join(known.name for known in KNOWN_SETS)
        raise DataError(f"{where}: its category names no keypoints. Say what they are: --keypoints NAME ({known}).")
    names = tuple(str(name) for name in names)
    if published := known_set(names):
        return replace(published, annotation_fields={"keypoints": len(names)})
    skeleton = category.get("skeleton") or []
    try:
        lines = tuple(dict.fromkeys((int(a) - 1, int(b) - 1) for a, b in skeleton if a != b))
        return KeypointSet(
            name=str(category.get("name", "keypoints")),
            names=names,
            flip_pairs=guess_flip_pairs(names)[0],
            sigmas=(ASSUMED_SIGMA,) * len(names),
            parts={"body": tuple(range(len(names)))},
            annotation_fields={"keypoints": len(names)},
            upper_body=(),
            lower_body=(),
            edges=(),
            groups=(),
            skeleton=lines,
        )
    except (TypeError, ValueError) as err:
        raise DataError(f"{where}: the keypoints of its category cannot be used ({err}). Mend `categories`.") from err


def _category(categories: list[dict[str, Any]], name: str | None, where: str) -> dict[str, Any]:
    found = [entry for entry in categories if name is None or entry.get("name") == name]
    if len(found) > 1:
        found = [entry for entry in found if entry.get("name") == "person"] or [c for c in found if c.get("keypoints")]
    if len(found) == 1:
        return found[0]
    if not categories:
        return {}
    names = ", ".join(str(entry.get("name")) for entry in categories)
    raise DataError(f"{where}: expected one category with keypoints, found {names}. Say which: --category NAME.")


class _Rows:
    """What was read so far; the names of the keypoints may come last in a file."""

    def __init__(self, name: str, keypoint_set: KeypointSet | None) -> None:
        self.name = name
        self.fields = dict(keypoint_set.annotation_fields) if keypoint_set else {"keypoints": 0}
        self.categories: list[dict[str, Any]] = []
        self.pictures: list[PictureEntry] = []
        self.unreadable: list[dict[str, Any]] = []
        self.numbers: dict[str, int] = dict.fromkeys(_ARRAYS, 0)
        self.ids, self.image_ids, self.category_ids, self.stated = (array("q") for _ in range(4))
        self.crowd, self.lengths = array("b"), array("q")
        self.values, self.boxes = array("d"), array("d")

    def count(self, key: str) -> int:
        self.numbers[key] += 1
        return self.numbers[key]

    def take(self, key: str, entry: dict[str, Any]) -> None:
        if key == "categories":
            self.categories.append(entry)
        elif key == "images":
            self._take_picture(entry)
        elif problem := self._take_person(entry):
            self._refuse(entry.get("id"), entry.get("image_id"), problem)

    def _refuse(self, annotation_id: Any, image_id: Any, text: str) -> None:
        ids = [value if type(value) is int else None for value in (annotation_id, image_id)]
        self.unreadable.append({"annotation_id": ids[0], "image_id": ids[1], "text": text})

    def _take_picture(self, entry: dict[str, Any]) -> None:
        image_id, file_name = entry.get("id"), entry.get("file_name")
        if type(image_id) is not int or not isinstance(file_name, str):
            self._refuse(None, image_id, f"a picture's id is {shown(image_id)}, its file_name {shown(file_name)}")
            return
        size = (entry.get("width"), entry.get("height"))
        known = all(type(side) is int and side > 0 for side in size)
        self.pictures.append(
            PictureEntry(image_id=image_id, file_name=file_name, size=(int(size[0]), int(size[1])) if known else None)  # type: ignore[arg-type]
        )

    def _take_person(self, entry: dict[str, Any]) -> str | None:
        """Keep an annotation, or say why not."""
        if type(entry.get("id")) is not int or type(entry.get("image_id")) is not int:
            return f"its id is {shown(entry.get('id'))}, its image_id {shown(entry.get('image_id'))}, expected numbers"
        crowd = entry.get("iscrowd") in (1, True)
        values: list[Any] = []
        for place, (name, count) in enumerate(self.fields.items()):
            found = entry.get(name)
            if found is None and (place or crowd):
                found = [0] * (3 * count)
            if not isinstance(found, list) or (count and len(found) != 3 * count) or len(found) % 3:
                return f"{name} is {shown(found)}, expected 3 numbers a keypoint"
            values += found
        box = entry.get("bbox")
        try:
            numbers = array("d", values)
            corners = array("d", [np.nan] * 4 if box is None else box)
        except (TypeError, OverflowError):
            return "its keypoints or its bbox hold something else than numbers"
        if len(corners) != 4:
            return f"its bbox is {shown(box)}, expected x, y, width, height"
        stated = entry.get("num_keypoints")
        self.ids.append(entry["id"])
        self.image_ids.append(entry["image_id"])
        self.category_ids.append(entry["category_id"] if type(entry.get("category_id")) is int else -1)
        self.stated.append(stated if type(stated) is int else -1)
        self.crowd.append(crowd)
        self.lengths.append(len(numbers))
        self.values.extend(numbers)
        self.boxes.extend(corners)
        return None

    def people(self, category: Mapping[str, Any], keypoint_set: KeypointSet, where: str) -> LabelledPeople:
        """Everything as arrays, without what does not fit.

        Raises:
            DataError: nobody is left.
        """
        num = len(keypoint_set)
        ids, image_ids, lengths = (np.array(column, np.int64) for column in (self.ids, self.image_ids, self.lengths))
        crowd, boxes = np.array(self.crowd, bool), np.array(self.boxes).reshape(-1, 4)
        wanted, categories = category.get("id"), np.array(self.category_ids, np.int64)
        mine = np.isin(categories, (wanted, -1)) if type(wanted) is int else np.ones(len(ids), bool)
        place = {entry.image_id: row for row, entry in reversed(list(enumerate(self.pictures)))}
        picture = np.array([place.get(image_id, -1) for image_id in image_ids.tolist()], np.int64)
        fits = lengths == 3 * num
        starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        keypoints = np.zeros((len(ids), num, 3))
        if fits.any():
            values = np.array(self.values)
            index = starts[fits, None] + np.arange(3 * num)
            keypoints[fits] = values[index].reshape(-1, num, 3)
        finite = np.isfinite(keypoints).all(axis=(1, 2))
        people = mine & ~crowd
        for bad, text in (
            (picture < 0, "its picture is not among `images`"),
            (~fits, f"its keypoints are not the {num} of {keypoint_set.name!r}"),
            (~finite, "a coordinate is NaN or infinite"),
        ):
            for row in np.flatnonzero(people & bad).tolist():
                self._refuse(int(ids[row]), int(image_ids[row]), text)
            people &= ~bad
        if not people.any():
            said = f" ({self.unreadable[0]['text']})" if self.unreadable else ""
            raise DataError(
                f"{where}: none of its {len(ids)} annotations is a person with {num} keypoints{said}. Expected "
                "COCO-keypoints JSON; --keypoints NAME says which keypoints they are."
            )
        crowd &= picture >= 0
        return LabelledPeople(
            keypoint_set=keypoint_set,
            pictures=self.pictures,
            annotation_id=ids[people],
            picture=picture[people],
            keypoints=keypoints[people],
            bbox_xywh=np.where(np.isfinite(boxes).all(axis=1, keepdims=True), boxes, np.nan)[people],
            stated=np.array(self.stated, np.int64)[people],
            crowd_picture=picture[crowd],
            crowd_bbox_xywh=boxes[crowd],
            unreadable=self.unreadable,
        )
