"""The pictures that labels are of: missing, unreadable, of another size than stated, there twice, people unlabelled.

Nothing is unpacked and nothing decoded that need not be.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cigpose.dataset.check_labels import LabelledPeople
from cigpose.dataset.check_rules import overlap
from cigpose.dataset.faults import Finding
from cigpose.dataset.reading import Photographs
from cigpose.files.archives import ExtentReader
from cigpose.files.errors import DataError
from cigpose.progress import progress

LEAST_DETECTION = 0.5
"""Score below which a detector is not believed against the labels."""
_SAME_PERSON = 0.3  # overlap of a detected and a labelled box
_WITHIN = 0.6  # share of a detected box in one labelled box, or in a crowd


class PhotoFolder:
    """Pictures of a folder, a zip or a tar, by the rows of `LabelledPeople.pictures`.

    Raises:
        FileNotFoundError: there is no such place.
        DataError: it cannot be read, or holds none of the pictures.
    """

    def __init__(self, photos: Path, people: LabelledPeople) -> None:
        self._photographs = Photographs(photos)
        self.people = people
        self.extents = [self._photographs.find(entry.file_name) for entry in people.pictures]
        if not any(self.extents):
            name = people.pictures[0].file_name if people.pictures else "?"
            raise DataError(
                f"{photos}: none of the {len(people.pictures)} pictures of the labels is there; looked for {name!r}."
            )

    def read(self, row: int) -> np.ndarray | None:
        """A picture's pixels, uint8 (H, W, 3) BGR; None where it cannot be had."""
        extent = self.extents[row]
        if extent is None:
            return None
        try:
            return self._photographs.decode(extent)
        except (DataError, OSError):
            return None

    def check(self) -> list[Finding]:
        """What is wrong with the files as such."""
        return [*self._unlike_their_entries(), *self._same_bytes()]

    def _unlike_their_entries(self) -> Iterator[Finding]:
        bar = progress(enumerate(self.extents), total=len(self.extents), desc="check pictures", unit="image")
        for row, extent in bar:
            entry = self.people.pictures[row]
            problem = f"{entry.file_name} is missing"
            if extent is not None:
                try:
                    size = self._photographs.size(extent)
                except (DataError, OSError) as err:
                    problem = f"{entry.file_name} cannot be read: {err}"
                else:
                    if entry.size is None or size == entry.size:
                        continue
                    stated = "{} x {}".format(*entry.size)
                    problem = f"{entry.file_name} has {size[0]} x {size[1]} pixels, the labels say {stated}"
                    if size == entry.size[::-1]:
                        problem += ": turned by its EXIF orientation?"
            yield Finding(kind="picture", suspicion=0.95, text=problem, image_id=entry.image_id)

    def _same_bytes(self) -> Iterator[Finding]:
        """Only files of one length can be the same; only these are read."""
        lengths: dict[int, dict[tuple[str, str], int]] = defaultdict(dict)
        for row, extent in enumerate(self.extents):
            if extent is not None and extent.size:
                place = (extent.path, extent.name)
                if place in lengths[extent.size]:
                    yield self._twin(row, lengths[extent.size][place], "is the same file as")
                else:
                    lengths[extent.size][place] = row
        with ExtentReader() as reader:
            for rows in lengths.values():
                seen: dict[bytes, int] = {}
                for row in rows.values() if len(rows) > 1 else ():
                    extent = self.extents[row]
                    assert extent is not None
                    try:
                        digest = hashlib.sha256(reader.read(extent)).digest()
                    except (DataError, OSError):
                        continue
                    if digest in seen:
                        yield self._twin(row, seen[digest], "has the bytes of")
                    seen.setdefault(digest, row)

    def _twin(self, row: int, first: int, says: str) -> Finding:
        entry, other = self.people.pictures[row], self.people.pictures[first]
        text = f"{entry.file_name} {says} {other.file_name} (picture {other.image_id})"
        return Finding(
            kind="duplicate picture", suspicion=0.98, text=text, image_id=entry.image_id, other=other.image_id
        )


def find_unlabelled(people: LabelledPeople, detections: Mapping[int, np.ndarray]) -> list[Finding]:
    """People that a detector is sure of and nobody labelled.

    Args:
        people: the labels; people without keypoints, and crowds, count as labelled where they have a box.
        detections: row of `pictures` -> (D, 5) x0, y0, x1, y1, score.
    """
    found = []
    order = np.argsort(people.picture, kind="stable")
    starts = np.searchsorted(people.picture[order], np.arange(len(people.pictures) + 1))
    for row, boxes in detections.items():
        some = boxes[boxes[:, 4] >= LEAST_DETECTION]
        detected = np.concatenate([some[:, :2], some[:, 2:4] - some[:, :2]], axis=1)[:, None]
        crowd = people.crowd_bbox_xywh[people.crowd_picture == row]
        own = np.concatenate([people.bbox_xywh[order[starts[row] : starts[row + 1]]], crowd])[None]
        low = np.maximum(detected[..., :2], own[..., :2])
        high = np.minimum(detected[..., :2] + detected[..., 2:], own[..., :2] + own[..., 2:])
        within = np.maximum(high - low, 0).prod(axis=-1) / np.maximum(detected[..., 2:].prod(axis=-1), 1e-9)
        covered = (overlap(detected, own) >= _SAME_PERSON) | (np.nan_to_num(within) >= _WITHIN)
        entry = people.pictures[row]
        for place in np.flatnonzero(~covered.any(axis=1)).tolist():
            x, y, w, h = (float(value) for value in detected[place, 0])
            score = float(some[place, 4])
            text = f"{entry.file_name}: a person of score {score:.2f} at [{x:.0f}, {y:.0f}, {w:.0f}, {h:.0f}]"
            found.append(
                Finding(
                    kind="unlabelled person",
                    suspicion=min(score, 0.98),
                    text=text,
                    image_id=entry.image_id,
                    bbox_xywh=(x, y, w, h),
                )
            )
    return found
