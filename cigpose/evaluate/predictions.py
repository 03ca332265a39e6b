"""Predicted persons: the container that prediction fills and evaluation reads.

N persons, K keypoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cigpose.files.atomic import written_file

# Field -> (dtype, shape after N); K stands for the number of keypoints.
FIELDS: dict[str, tuple[type, tuple[int | str, ...]]] = {
    "image_id": (np.int64, ()),
    "person_id": (np.int64, ()),
    "keypoints": (np.float32, ("K", 2)),
    "keypoint_scores": (np.float32, ("K",)),
    "center": (np.float32, (2,)),
    "scale": (np.float32, (2,)),
    "bbox_xyxy": (np.float32, (4,)),
    "box_score": (np.float32, ()),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predicted persons, a row each. Coordinates are pixels of the whole image."""

    image_id: np.ndarray
    """(N,) int64."""
    person_id: np.ndarray
    """(N,) int64: annotation id, or a running number for detected boxes. Rows of one image and id are duplicates."""
    keypoints: np.ndarray
    """(N, K, 2) float32 x, y."""
    keypoint_scores: np.ndarray
    """(N, K) float32, raw SimCC maxima: not probabilities, may exceed 1."""
    center: np.ndarray
    """(N, 2) float32 centre of the crop."""
    scale: np.ndarray
    """(N, 2) float32 width and height of the crop, after padding and aspect fix."""
    bbox_xyxy: np.ndarray
    """(N, 4) float32 box, without padding."""
    box_score: np.ndarray
    """(N,) float32; 1 for boxes of the ground truth."""

    def __post_init__(self) -> None:
        """Bring every column to its dtype; refuse columns of unequal length."""
        sizes: dict[str, int] = {"N": len(self.image_id), "K": np.shape(self.keypoints)[1]}
        for name, (dtype, tail) in FIELDS.items():
            column: np.ndarray = np.asarray(getattr(self, name), dtype=dtype)
            expected = (sizes["N"], *(sizes[size] if isinstance(size, str) else size for size in tail))
            if column.shape != expected:
                raise ValueError(f"predictions: {name} has shape {column.shape}, expected {expected}.")
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.image_id)

    @classmethod
    def empty(cls, num_keypoints: int) -> Predictions:
        """No person at all."""
        sizes: dict[str, int] = {"K": num_keypoints}
        columns: dict[str, np.ndarray] = {
            name: np.zeros((0, *(sizes[size] if isinstance(size, str) else size for size in tail)), dtype=dtype)
            for name, (dtype, tail) in FIELDS.items()
        }
        return cls(**columns)

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """All rows of several containers, in order.

        Raises:
            ValueError: `parts` is empty, or their numbers of keypoints differ.
        """
        if not parts:
            raise ValueError("predictions: nothing to concatenate; use Predictions.empty(num_keypoints).")
        if len(counts := {part.keypoints.shape[1] for part in parts}) > 1:
            raise ValueError(f"predictions: cannot join sets of {sorted(counts)} keypoints.")
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})

    def select(self, rows: np.ndarray | slice) -> Predictions:
        """The rows given by an index, a mask or a slice, in the order of the index."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in FIELDS})

    def save(self, path: str | Path) -> Path:
        """Write a compressed .npz, by way of a temporary name; equal contents give equal bytes."""
        path = Path(path)
        with written_file(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **{name: getattr(self, name) for name in FIELDS})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of predictions.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no predictions there. `dvc repro evaluate` writes them.")
        try:
            with np.load(path, allow_pickle=False) as archive:
                columns = {name: archive[name] for name in FIELDS}
        except (KeyError, ValueError, OSError, EOFError) as err:
            raise ValueError(f"{path}: not a file of predictions ({err}). Delete it and evaluate again.") from err
        return cls(**columns)
