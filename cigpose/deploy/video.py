"""Videos: poses of everybody in every frame, with numbers that stay, drawn and as JSON.

A record of `<name>.jsonl` is one frame:
    {"frame", "time_s", "width", "height", "persons": [{"id", "bbox_xyxy", "score", "keypoints", ...}, ...]}
with the persons of `Poses.to_records`, as predicted. `<name>.json` and the drawn video have the smoothed keypoints,
where smoothing is asked for.

Three threads: one decodes ahead, one detects and predicts, one draws and encodes. A run that was stopped reads from its
records who was where, and goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cigpose.deploy.ahead import read_ahead
from cigpose.deploy.boxes import BoxFile
from cigpose.deploy.drawing import Painter, ascii_link, refuse_existing, video_writer
from cigpose.deploy.journal import Journal
from cigpose.deploy.media import Outcome, pose_record
from cigpose.deploy.predictor import Predictor
from cigpose.deploy.results import Results, write_pose_results
from cigpose.deploy.smoothing import Smoother
from cigpose.deploy.sources import Source, utf8
from cigpose.deploy.tracks import Seen, Tracker, followed
from cigpose.progress import progress

FRAMES_AT_ONCE = 16
UNSURE_FRAMES = 2
"""Frames by which the count in a whole video's header may be wrong."""

Frame = tuple[int, np.ndarray, Seen]


def predict_video(
    predictor: Predictor,
    source: Source,
    results: Results,
    *,
    boxes: BoxFile | None = None,
    draw: bool = True,
    min_score: float = 0.3,
    detect_every: int = 1,
    smooth: bool = False,
) -> Outcome:
    """Poses of every frame of a video: `<name>.jsonl` as they are done, `<name>.json` at the end.

    Frames that an earlier run finished are not predicted again, but drawn again if the drawn video was not finished.

    Args:
        predictor: the model.
        source: the video.
        results: the folder; the drawn video in it has the same frame rate, and the sound if ffmpeg is installed.
        boxes: of persons, `image_id` is the frame; None: those the predictor's detector finds; without one each frame
            is one person's box.
        draw: write the drawn video.
        min_score: keypoints below are not drawn; all are in the JSON.
        detect_every: detect people in every so many frames; between two detections their boxes are interpolated.
        smooth: take the trembling out of the keypoints (`cigpose.deploy.smoothing`).

    Raises:
        ValueError: it cannot be decoded, its boxes cannot be used, or the drawing cannot be encoded.
    """
    stamp, known = source.stamp(), results.found.get("videos", {}).get(source.shown, {})
    target = results.place(source.drawing) if draw else None
    if target and not known:
        refuse_existing(target)
    lines, path = (results.path / f"{source.name}{ending}" for ending in (".jsonl", ".json"))
    if known.get("source") != stamp:
        lines.unlink(missing_ok=True)
        results.note_video(source.shown, known := {"source": stamp})
    journal, outcome = Journal(lines, "frame"), Outcome(done=[source])
    outcome.before = len(journal)
    if not ("frames" in known and path.exists() and (target is None or target.exists())):
        painter = Painter(predictor.keypoint_set, results, min_score)
        people = _People(predictor, journal, boxes, detect_every if predictor.detector and not boxes else 1)
        start = time.perf_counter()
        facts = _predict_frames(people, source, target, painter, smooth)
        outcome.seconds = time.perf_counter() - start
        known = known | dataclasses.asdict(facts)
        shown = _shown(facts.rate, smooth)
        records = ((number, shown(journal[number])) for number in range(facts.frames))
        write_pose_results(path, records, predictor.keypoint_set)
        results.note_video(source.shown, known)
    outcome.frames = known["frames"]
    outcome.persons = sum(len(journal[number]["persons"]) for number in range(outcome.frames))
    if known["declared_frames"] - outcome.frames > UNSURE_FRAMES:
        outcome.skipped.append(
            f"{utf8(source.path)}: {outcome.frames} of {known['declared_frames']} frames could be decoded; the file "
            "is cut or damaged, or its header is wrong. Poses are those of the decoded frames."
        )
    if boxes and not any(len(boxes.of(number)) for number in range(outcome.frames)):
        outcome.skipped.append(f"{utf8(source.path)}: the boxes name none of its {outcome.frames} frames (from 0).")
    return outcome


@dataclass(frozen=True)
class _Facts:
    frames: int
    declared_frames: int
    rate: float


@dataclass
class _People:
    """Who is in a frame, and in which pose: from the records of an earlier run as far as they go."""

    predictor: Predictor
    journal: Journal
    boxes: BoxFile | None
    every: int

    def __post_init__(self) -> None:
        self._tracker = Tracker()

    def detect(self, number: int, frame: np.ndarray) -> Seen:
        if number in self.journal:
            persons = self.journal[number]["persons"]
            found = np.array([[*person["bbox_xyxy"], person["box_score"]] for person in persons]).reshape(-1, 5)
            ids = np.array([person["id"] for person in persons], dtype=np.int64)
            self._tracker.note(ids, found)
            return Seen(found, ids)
        if self.boxes:
            found = self.boxes.of(number)
        elif self.predictor.detector:
            found = self.predictor.detector(frame)
        else:
            found = np.array([[0.0, 0.0, frame.shape[1], frame.shape[0], 1.0]])
        found = np.column_stack([np.round(found[:, :4], 2), np.round(found[:, 4:], 4)])  # as the records have them
        return Seen(found, self._tracker.update(found))

    def predict(self, group: list[Frame], rate: float) -> list[Mapping[str, Any]]:
        """The frames' records; those that are not recorded yet are."""
        fresh = [item for item in group if item[0] not in self.journal]
        found = self.predictor.predict_many([frame for _, frame, _ in fresh], [seen.boxes for *_, seen in fresh])
        records = {
            number: {
                "frame": number,
                "time_s": round(number / rate, 4),
                **pose_record(dataclasses.replace(poses, track_ids=seen.ids)),
            }
            for (number, _, seen), poses in zip(fresh, found, strict=True)
        }
        self.journal.append(records.values())
        return [records.get(number) or self.journal[number] for number, *_ in group]


def _predict_frames(people: _People, source: Source, target: Path | None, painter: Painter, smooth: bool) -> _Facts:
    """Poses of the frames that the journal lacks, a drawing of all."""
    with _reader(source.path) as reader:
        rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
        total = max(int(reader.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        decoded = read_ahead(_frames(reader), FRAMES_AT_ONCE)  # from here on the reader is its thread's
        with contextlib.closing(decoded):
            first = next(decoded, None)
            if first is None:
                raise ValueError(f"{utf8(source.path)}: OpenCV cannot decode a single frame. Convert it to H.264 .mp4.")
            shown = _shown(rate, smooth)
            count = 0
            with (
                video_writer(target, rate, (first.shape[1], first.shape[0]), source.path) as show,
                progress(total=total or None, desc=utf8(source.path.name), unit="frame") as bar,
                ThreadPoolExecutor(1, thread_name_prefix="cigpose-draw") as pool,
            ):

                def draw(group: list[Frame], records: list[Mapping[str, Any]]) -> None:
                    for (_, frame, _), record in zip(group, records, strict=True):
                        show(painter.drawn(frame, shown(record)))

                drawing: Future[None] | None = None
                frames = followed(enumerate(itertools.chain([first], decoded)), people.detect, people.every)
                for group in _groups(frames, FRAMES_AT_ONCE):
                    try:
                        records = people.predict(group, rate)
                    except ValueError as err:
                        raise ValueError(f"{utf8(source.path)}: frames from {group[0][0]}: {err}") from err
                    if drawing is not None:
                        drawing.result()
                    if target:
                        drawing = pool.submit(draw, group, records)
                    count += len(group)
                    bar.update(len(group))
                if drawing is not None:
                    drawing.result()
    return _Facts(count, total, rate)


def _shown(rate: float, smooth: bool) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What is drawn, and given as result, of the records of frame after frame."""
    return Smoother(rate) if smooth else dict


def _groups(items: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _frames(reader: Any) -> Iterator[np.ndarray]:
    while True:
        good, frame = reader.read()
        if not good:
            return
        yield frame


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Any]:
    with ascii_link(path, path.suffix) as name:
        reader = cv2.VideoCapture(name)
        try:
            yield reader
        finally:
            reader.release()
