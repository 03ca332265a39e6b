"""Person boxes from a file of detections."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cigpose.deploy.sources import Media


class BoxFile:
    """Person boxes from a COCO-style list of detections.

    Entries are `{"bbox": [x, y, w, h], "score": s, ...}` with `file_name` (as given to the predictor, or its last
    part), or `image_id` (the number that is the picture's name; for videos the frame, from 0). Entries with another
    `category_id` than 1 are left out; `score` is 1 where absent.

    Args:
        path: the JSON file.
        min_score: boxes below are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a list.
    """

    def __init__(self, path: str | Path, *, min_score: float = 0.0) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no detections there.")
        try:
            entries = json.loads(path.read_bytes())
        except ValueError as err:
            raise ValueError(f"{path}: not valid JSON ({err}).") from err
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of detections, got {type(entries).__name__}.")
        self._path = path
        self._boxes: dict[str | int, list[list[float]]] = {}
        for number, entry in enumerate(entries):
            key, box = self._entry(entry, f"{path}: detection {number}")
            if entry.get("category_id", 1) == 1 and box[4] >= min_score:
                self._boxes.setdefault(key, []).append(box)
        if not self._boxes:
            raise ValueError(
                f"{path}: of {len(entries)} detections none is a person's with a score of {min_score} or more."
            )

    @staticmethod
    def _entry(entry: Any, where: str) -> tuple[str | int, list[float]]:
        if not isinstance(entry, Mapping) or not ("file_name" in entry or "image_id" in entry):
            raise ValueError(f"{where}: expected a mapping with file_name or image_id, got {entry!r:.80}.")
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{where}: expected bbox [x, y, w, h], got {entry.get('bbox')!r:.80}.") from err
        try:
            key = str(entry["file_name"]) if "file_name" in entry else int(entry["image_id"])
            score = float(entry.get("score", 1.0))
        except (TypeError, ValueError) as err:
            raise ValueError(f"{where}: expected a whole number as image_id and a number as score ({err}).") from err
        return key, [x, y, x + width, y + height, score]

    def of(self, *keys: str | int) -> np.ndarray:
        """(N, 5) boxes filed under the first of the keys that is known; (0, 5) if none is: nobody was found there."""
        for key in keys:
            if key in self._boxes:
                return np.array(self._boxes[key])
        return np.zeros((0, 5))

    def of_picture(self, name: str) -> np.ndarray:
        """(N, 5) boxes of a picture, by its name, the last part of it, or the number it is."""
        path = Path(name)
        number: tuple[int, ...] = (int(path.stem),) if path.stem.isdigit() else ()
        return self.of(name, path.name, *number)

    def refuse_unmatched(self, media: Media) -> None:
        """See that some source is meant at all.

        Raises:
            ValueError: no picture is named, and no frame of a video can be.
        """
        frames = media.videos and any(isinstance(key, int) and key >= 0 for key in self._boxes)
        if not frames and not any(len(self.of_picture(source.shown)) for source in media.pictures):
            named = ", ".join(map(repr, itertools.islice(self._boxes, 3)))
            raise ValueError(
                f"{self._path}: names none of the {len(media.pictures)} pictures; its boxes are of {named}, ... "
                "Expected file_name as in the folder, or image_id, the number that is the picture's name."
            )
