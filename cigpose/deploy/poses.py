"""What a predictor says of a picture: its people, their keypoints by name, and the forms that others want.

N persons, K keypoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from cigpose.deploy.sessions import MissingPackageError
from cigpose.draw import draw_poses
from cigpose.evaluate.coco import result_entry
from cigpose.files.atomic import write_bytes
from cigpose.keypoints import KeypointSet

if TYPE_CHECKING:
    import pandas
    import supervision

SURE = 1.5
"""Keypoints with this many times the smallest score to draw are drawn opaque."""


class Keypoint(NamedTuple):
    """One keypoint of one person."""

    x: float
    """Image pixels."""
    y: float
    score: float
    """From 0 to 1, see `Poses.scores`."""
    raw_score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class PosedPerson:
    """One of the people of a picture: `person["left_wrist"]` is a `Keypoint`."""

    keypoint_set: KeypointSet
    keypoints: np.ndarray
    """(K, 2) float32 x, y in image pixels."""
    scores: np.ndarray
    """(K,) float32 from 0 to 1."""
    raw_scores: np.ndarray
    """(K,) float32."""
    bbox_xyxy: np.ndarray
    """(4,) float32."""
    box_score: float
    """As it was given, or the detector's."""
    score: float
    """From 0 to 1, see `Poses.person_scores`."""
    raw_score: float
    track_id: int | None = None
    """In videos: the same person's number in all frames, from 1."""

    def __getitem__(self, name: str) -> Keypoint:
        """A keypoint by its name.

        Raises:
            KeyError: the model has none of this name.
        """
        if name not in self.keypoint_set.names:
            raise KeyError(f"{name!r} is no keypoint of {self.keypoint_set.name}; see `keypoint_set.names`")
        k = self.keypoint_set.names.index(name)
        x, y = self.keypoints[k].tolist()
        return Keypoint(x, y, float(self.scores[k]), float(self.raw_scores[k]))

    def __iter__(self) -> Iterator[str]:
        """The names of the keypoints."""
        return iter(self.keypoint_set.names)

    def __len__(self) -> int:
        return len(self.keypoints)


@dataclass(frozen=True, kw_only=True, eq=False)
class Poses:
    """The people of one picture, in the order of their boxes; iterating gives a `PosedPerson` each."""

    keypoint_set: KeypointSet
    keypoints: np.ndarray
    """(N, K, 2) float32 x, y in image pixels."""
    scores: np.ndarray
    """(N, K) float32 from 0 to 1: the chance that the keypoint is right, as the calibration of the model says
    (`cigpose.evaluate.calibration`); without one (`calibrated` is False) the raw scores cut off at 0 and 1."""
    raw_scores: np.ndarray
    """(N, K) float32, SimCC maxima as the evaluation takes them: no probabilities, may exceed 1."""
    person_scores: np.ndarray
    """(N,) float64 from 0 to 1: box score times the mean of the `scores` of the keypoints that count."""
    raw_person_scores: np.ndarray
    """(N,) float64, the evaluation's: box score times the mean raw score of the keypoints above its threshold. Those
    are the keypoints that count."""
    bbox_xyxy: np.ndarray
    """(N, 4) float32."""
    box_scores: np.ndarray
    """(N,) float64, as they were given, or the detector's; 1 where boxes came without."""
    image_size: tuple[int, int]
    """(width, height)."""
    calibrated: bool = False
    """Whether `scores` are probabilities."""
    track_ids: np.ndarray | None = None
    """(N,) int64, in videos."""
    image: np.ndarray | None = None
    """The picture, uint8 (H, W, 3) BGR; None for poses that were read from a file."""

    def __len__(self) -> int:
        return len(self.keypoints)

    def __iter__(self) -> Iterator[PosedPerson]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> PosedPerson:
        """The i-th person."""
        return PosedPerson(
            keypoint_set=self.keypoint_set,
            keypoints=self.keypoints[i],
            scores=self.scores[i],
            raw_scores=self.raw_scores[i],
            bbox_xyxy=self.bbox_xyxy[i],
            box_score=float(self.box_scores[i]),
            score=float(self.person_scores[i]),
            raw_score=float(self.raw_person_scores[i]),
            track_id=None if self.track_ids is None else int(self.track_ids[i]),
        )

    @classmethod
    def from_records(
        cls, persons: Sequence[Mapping[str, Any]], image_size: tuple[int, int], keypoint_set: KeypointSet
    ) -> Poses:
        """What `to_records` was made of, as exactly as it was written."""
        shape = -1, len(keypoint_set)
        triples = np.array([person["keypoints"] for person in persons], np.float32).reshape(*shape, 3)
        ids = [person["id"] for person in persons if "id" in person]
        return cls(
            keypoint_set=keypoint_set,
            keypoints=triples[..., :2],
            scores=triples[..., 2],
            raw_scores=np.array([person["raw_scores"] for person in persons], np.float32).reshape(shape),
            person_scores=np.array([person["score"] for person in persons], np.float64),
            raw_person_scores=np.array([person["raw_score"] for person in persons], np.float64),
            bbox_xyxy=np.array([person["bbox_xyxy"] for person in persons], np.float32).reshape(-1, 4),
            box_scores=np.array([person["box_score"] for person in persons], np.float64),
            image_size=image_size,
            track_ids=np.array(ids) if persons and len(ids) == len(persons) else None,
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per person.

        `bbox_xyxy`, `box_score`, `score`, `raw_score`, `keypoints` [[x, y, score], ...], `raw_scores`; in videos `id`.
        """
        points, scores = self.keypoints.astype(np.float64), self.scores.astype(np.float64)
        triples = np.concatenate([np.round(points, 2), np.round(scores, 4)[..., None]], axis=-1).tolist()
        boxes = np.round(self.bbox_xyxy.astype(np.float64), 2).tolist()
        raw_scores = np.round(self.raw_scores.astype(np.float64), 4).tolist()
        return [
            {
                **({} if self.track_ids is None else {"id": int(self.track_ids[i])}),
                "bbox_xyxy": boxes[i],
                "box_score": round(float(self.box_scores[i]), 4),
                "score": round(float(self.person_scores[i]), 4),
                "raw_score": round(float(self.raw_person_scores[i]), 4),
                "keypoints": triples[i],
                "raw_scores": raw_scores[i],
            }
            for i in range(len(self))
        ]

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """The persons as entries of a COCO (COCO-WholeBody) result file, with the evaluation's raw scores."""
        return [pose_entry(image_id, record, self.keypoint_set) for record in self.to_records()]

    def to_pandas(self) -> pandas.DataFrame:
        """A row per keypoint: person, person_score, keypoint, x, y, score, raw_score, and in videos track_id.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as err:
            raise MissingPackageError("to_pandas: pandas is not installed. Run `pip install pandas`.") from err
        count, names = len(self), self.keypoint_set.names
        columns = {
            "person": np.repeat(np.arange(count), len(names)),
            "person_score": np.repeat(self.person_scores, len(names)),
            "keypoint": list(names) * count,
            "x": self.keypoints[..., 0].ravel(),
            "y": self.keypoints[..., 1].ravel(),
            "score": self.scores.ravel(),
            "raw_score": self.raw_scores.ravel(),
        }
        if self.track_ids is not None:
            columns["track_id"] = np.repeat(self.track_ids, len(names))
        return pandas.DataFrame(columns)

    def to_supervision(self) -> supervision.KeyPoints:
        """As `supervision.KeyPoints`, whose annotators draw them.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as err:
            raise MissingPackageError(
                "to_supervision: supervision is not installed. Run `pip install 'supervision>=0.29'`."
            ) from err
        if not len(self):
            return supervision.KeyPoints.empty()
        return supervision.KeyPoints(
            xy=self.keypoints.astype(np.float32),
            class_id=np.zeros(len(self), dtype=int),
            keypoint_confidence=self.scores.astype(np.float32),
            detection_confidence=self.person_scores.astype(np.float32),
        )

    def plot(self, image: np.ndarray | None = None, *, min_score: float = 0.3, boxes: bool = False) -> np.ndarray:
        """The picture with the poses on it.

        Args:
            image: uint8 (H, W, 3) BGR; None: the picture they were predicted in.
            min_score: keypoints below are not drawn, doubtful ones are translucent.
            boxes: draw the boxes too.

        Returns: uint8 (H, W, 3) BGR, a new array.

        Raises:
            ValueError: there is no picture.
        """
        image = self.image if image is None else image
        if image is None:
            raise ValueError("plot: these poses came without their picture. Give it as `image`.")
        options = {"min_score": min_score, "sure_score": SURE * min_score}
        corners = self.bbox_xyxy if boxes else None
        return draw_poses(image, self.keypoints, self.scores, self.keypoint_set, boxes_xyxy=corners, **options)

    def save(self, path: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
        """Write the drawn picture, or, to a name that ends in .json, a COCO result file.

        Args:
            path: the file; written whole or not at all.
            overwrite: an existing file may be replaced.
            **options: of `plot`.

        Raises:
            FileExistsError: there is a file of this name.
            ValueError: OpenCV cannot write such a picture.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path}: exists. Give another name, or overwrite=True.")
        if path.suffix.lower() == ".json":
            write_bytes(path, json.dumps(self.to_coco(), allow_nan=False).encode())
            return path
        try:
            good, content = cv2.imencode(path.suffix.lower(), self.plot(**options))
        except cv2.error:
            good = False
        if not good:
            raise ValueError(f"{path}: OpenCV cannot write such a file. Give a name that ends in .jpg, .png or .json.")
        write_bytes(path, content.tobytes())
        return path


def pose_entry(image_id: int, record: Mapping[str, Any], keypoint_set: KeypointSet) -> dict[str, Any]:
    """One person of `Poses.to_records` as an entry of a COCO result file: what the evaluation would have written.

    Args:
        image_id: of the picture.
        record: of the person.
        keypoint_set: of the model.
    """
    detection = np.array(record["keypoints"], dtype=np.float64)
    detection[:, 2] = record["raw_scores"]
    entry = result_entry(image_id, detection, record["raw_score"], np.array(record["bbox_xyxy"]), keypoint_set)
    return {**entry, **({"track_id": record["id"]} if "id" in record else {})}
