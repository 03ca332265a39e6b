"""What a reader hands to the shard writer: pictures in order, valid persons spilled to disk, and everything refused.

The reader knows a format; the intake applies the rule of `persons`, counts, and keeps memory small: a person leaves for
a temporary file as soon as it is read, and only its place there (24 bytes) stays; so does a picture.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson

from cigpose.files.errors import DataError, shown
from cigpose.keypoints import KeypointSet
from cigpose.shard.persons import (
    OTHER_PERSON_CATEGORY,
    Dropped,
    detection_record,
    is_id,
    person_categories,
    person_record,
)
from cigpose.shard.pictures import Picture
from cigpose.shard.spill import Spill, SpilledPictures

_NO_CATEGORY = -1
_FEW = 10_000
EXAMPLES = 5
"""Bad samples quoted in messages and in the index."""


@dataclass
class BadSamples:
    """Unreadable samples: how many, and the first few in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, sentence: str, count: int = 1) -> None:
        """Count `count` persons lost for the reason in `sentence`."""
        self.count += count
        if len(self.examples) < EXAMPLES:
            self.examples.append(sentence)

    def merge(self, other: BadSamples) -> None:
        """Add another's counts behind one's own."""
        self.count += other.count
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def check(self, total: int, max_share: float, dataset: str) -> None:
        """Refuse more than `max_share` of `total`.

        Raises:
            DataError: with the first few.
        """
        if self.count <= max_share * max(total, 1):
            return
        more = "" if self.count <= len(self.examples) else f" (and {self.count - len(self.examples)} more)"
        raise DataError(
            f"{dataset}: {self.count} of {total} persons unreadable, data.sharding.max_bad_share allows "
            f"{max_share:g}: {'; '.join(self.examples)}{more}. Mend or replace the file, or raise max_bad_share."
        )


class SeenIds:
    """Ids that were there, in 8 bytes each for the most part: a Python set would take ten times as much.

    The newest are in a set; when that holds more than a sixteenth of all it goes into a sorted array.
    """

    def __init__(self) -> None:
        self._newest, self._sorted = set[int](), np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._newest) + len(self._sorted)

    def add(self, identity: int) -> bool:
        """Note an id below 2^63; False if it was there before."""
        if identity in self._newest:
            return False
        if len(self._sorted):
            place = int(np.searchsorted(self._sorted, identity))
            if place < len(self._sorted) and self._sorted[place] == identity:
                return False
        self._newest.add(identity)
        if len(self._newest) > max(_FEW, len(self._sorted) // 16):
            newest = np.fromiter(self._newest, np.int64, len(self._newest))
            self._sorted = np.sort(np.concatenate([self._sorted, newest]))
            self._newest.clear()
        return True


class Intake:
    """Collects one dataset. Use as a context manager: it owns two files in `folder`."""

    def __init__(self, folder: Path, keypoints: KeypointSet, *, ground_truth: bool) -> None:
        self.keypoints = keypoints
        self.pictures = SpilledPictures(folder / "pictures.bin")
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.bad = BadSamples()
        self.num_annotations = 0
        self.persons_file = folder / "persons.bin"
        self.ground_truth_file = folder / "annotations.part" if ground_truth else None
        self.detections: dict[int, list[bytes]] = {}
        """Place of the picture -> its detected boxes."""
        self.image_fields = Spill(folder / "images.part")
        """The whole entry of each picture, as JSON, for the ground truth alone."""
        self.categories: list[Any] = []
        """As listed by the file, before or behind the annotations."""
        self._bad_of: dict[int | None, BadSamples] = {}
        self._spill = self.persons_file.open("wb")
        self._truth = self.ground_truth_file.open("wb") if self.ground_truth_file else None
        self._places = (array("q"), array("q"), array("q"), array("q"))  # picture, offset, length, category
        self._truth_places = (array("q"), array("q"), array("q"))
        self._offset = self._truth_offset = 0

    def __enter__(self) -> Intake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close the temporary files."""
        self._spill.close()
        if self._truth:
            self._truth.close()

    def add_picture(self, picture: Picture, fields: Mapping[str, Any]) -> int:
        """Take a picture; returns its place."""
        place = len(self.pictures)
        self.pictures.append(picture)
        if self._truth:
            mended = {"id": picture.image_id, "width": picture.width, "height": picture.height}
            self.image_fields.append(orjson.dumps({**fields, **mended}))
        return place

    def add_annotation(self, annotation: dict[str, Any], place: int, raw: bytes, where: str) -> None:
        """Take an annotation of the picture at `place`: a valid person, a dropped or a bad one.

        Args:
            annotation: parsed.
            place: of its picture.
            raw: its JSON, as it goes into the ground truth.
            where: how messages name it.
        """
        category = annotation.get("category_id")
        if not is_id(category) and "category_id" in annotation:
            self.bad.add(f"{where}: its category_id is {shown(category)}, expected a whole number from 0")
            return
        try:
            record = person_record(annotation, self.keypoints, self.pictures.size(place))
            data = b"" if isinstance(record, Dropped) else _packed(record)
        except DataError as err:
            self._bad_of.setdefault(category, BadSamples()).add(f"{where}: {err}")
            return
        if self._truth:
            _note(self._truth_places, place, self._truth_offset, len(raw))
            self._truth_offset += self._truth.write(raw)
        if isinstance(record, Dropped):
            self.dropped[record.reason] += 1
            return
        _note(self._places, place, self._offset, len(data), _NO_CATEGORY if category is None else category)
        self._offset += self._spill.write(data)

    def add_detection(self, detection: dict[str, Any], place: int, where: str) -> None:
        """Take a detected box of the picture at `place`."""
        try:
            record = detection_record(detection)
            data = b"" if isinstance(record, Dropped) else _packed(record)
        except DataError as err:
            self.bad.add(f"{where}: {err}")
            return
        if isinstance(record, Dropped):
            self.dropped[record.reason] += 1
            return
        self.detections.setdefault(place, []).append(data)

    def settle_categories(self) -> None:
        """Keep the persons of the categories that hold persons, once all are known; count the others as dropped."""
        persons = person_categories(self.categories)
        for category, bad in self._bad_of.items():
            if category is None or category in persons:
                self.bad.merge(bad)
            else:
                self.dropped[OTHER_PERSON_CATEGORY] += bad.count
        self._bad_of.clear()
        kept = np.isin(np.frombuffer(self._places[3], np.int64), [_NO_CATEGORY, *persons])
        if others := int(len(kept) - kept.sum()):
            self.dropped[OTHER_PERSON_CATEGORY] += others
            columns = (np.frombuffer(column, np.int64)[kept] for column in self._places)
            self._places = tuple(array("q", column.tobytes()) for column in columns)  # type: ignore[assignment]

    def persons_by_picture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the persons lie in `persons_file`, in the order of the annotations within each picture.

        They are handed over, and not kept here.

        Returns: (P + 1,) int64, first row of each of the P pictures and the end; (N,) offsets; (N,) lengths.
        """
        pictures, offsets, lengths = (np.frombuffer(column, np.int64) for column in self._places[:3])
        order = np.argsort(pictures, kind="stable")
        first = np.searchsorted(pictures[order], np.arange(len(self.pictures) + 1))
        self._places = (array("q"), array("q"), array("q"), array("q"))
        return first, offsets[order], lengths[order]

    def truths(self, lost: Collection[int]) -> Iterator[tuple[int, int]]:
        """(offset, length) in `ground_truth_file` of each readable annotation, but for `lost` image ids."""
        places = {place for place, picture in enumerate(self.pictures) if picture.image_id in lost}
        for place, offset, length in zip(*self._truth_places, strict=True):
            if place not in places:
                yield offset, length


def _packed(record: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as err:
        raise DataError("it holds a number of more than 64 bits") from err


def _note(columns: tuple[array[int], ...], *row: int) -> None:
    for column, value in zip(columns, row, strict=True):
        column.append(value)
