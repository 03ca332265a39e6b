"""Who is who from one detection to the next, and where they are between two.

Boxes are matched by their overlap: the assignment with the greatest sum, a pair below `MIN_OVERLAP` being none. That is
SORT's first half (arXiv 1602.00763) without its motion model. Between two detections of one person the box is
interpolated, so that frames need no detection of their own and still share batches. Kept libraries track better through
long occlusions; they bring a detection framework each, or a motion model that needs tuning to the frame rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from cigpose.evaluate.calibration import box_overlaps

MIN_OVERLAP = 0.2
"""Intersection over union from which two boxes may be one person."""
PATIENCE = 5
"""Detections in a row that a person may be missed and be the same afterwards."""


@dataclass
class _Track:
    box: np.ndarray
    missed: int = 0


class Tracker:
    """Numbers the people of successive detections, from 1."""

    def __init__(self) -> None:
        self._tracks: dict[int, _Track] = {}
        self._next = 1

    def update(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) int64 numbers of (N, 4 or more) boxes."""
        ids = np.zeros(len(boxes), dtype=np.int64)
        known = list(self._tracks)
        if known and len(boxes):
            overlap = np.stack([box_overlaps(self._tracks[number].box, boxes[:, :4]) for number in known])
            for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
                if overlap[row, column] >= MIN_OVERLAP:
                    ids[column] = known[row]
        for i in np.flatnonzero(ids == 0):
            ids[i], self._next = self._next, self._next + 1
        self.note(ids, boxes)
        return ids

    def note(self, ids: np.ndarray, boxes: np.ndarray) -> None:
        """Take over what an earlier run had found at the next detection."""
        for track in self._tracks.values():
            track.missed += 1
        for number, box in zip(ids.tolist(), boxes, strict=True):
            self._tracks[number] = _Track(np.asarray(box[:4], dtype=np.float64))
            self._next = max(self._next, number + 1)
        self._tracks = {number: track for number, track in self._tracks.items() if track.missed <= PATIENCE}


@dataclass(frozen=True)
class Seen:
    """The people of one frame."""

    boxes: np.ndarray
    """(N, 5)."""
    ids: np.ndarray
    """(N,) int64."""


def between(first: Seen, second: Seen, share: float) -> Seen:
    """The people of `first` at a moment between two detections: interpolated, or where they were.

    Args:
        first: the earlier detection.
        second: the later one.
        share: of the time from one to the other that has gone by.
    """
    later = {number: row for row, number in enumerate(second.ids.tolist())}
    boxes = first.boxes.copy()
    for row, number in enumerate(first.ids.tolist()):
        if number in later:
            boxes[row, :4] += share * (second.boxes[later[number], :4] - boxes[row, :4])
    return Seen(np.round(boxes, 2), first.ids)


def followed(
    frames: Iterable[tuple[int, np.ndarray]], detect: Callable[[int, np.ndarray], Seen], every: int
) -> Iterator[tuple[int, np.ndarray, Seen]]:
    """Frames with their people, of whom every `every`-th frame's are detected.

    Args:
        frames: (number, picture), numbers from 0.
        detect: gives the people of a frame.
        every: 1 detects in all of them.
    """
    held: list[tuple[int, np.ndarray]] = []
    last: Seen | None = None
    for number, frame in frames:
        if number % every == 0:
            seen = detect(number, frame)
            if last is not None:
                for place, (earlier, picture) in enumerate(held):
                    yield earlier, picture, between(last, seen, place / len(held))
            held, last = [], seen
        held.append((number, frame))
    if last is not None:
        yield from ((number, picture, last) for number, picture in held)
