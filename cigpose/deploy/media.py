"""Pictures and videos: poses of everybody, drawn and as JSON, in a folder as `cigpose.deploy.results` describes it.

A record of poses.jsonl, or of a video's own file, is one picture or frame:
    {"file_name" | "frame", "time_s", "width", "height", "persons": [{"bbox_xyxy", "score", "keypoints"}, ...], ...}
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cigpose.deploy.boxes import BoxFile
from cigpose.deploy.journal import Journal
from cigpose.deploy.predictor import Poses, Predictor, check_boxes, read_image
from cigpose.deploy.results import Results, image_ids, write_pose_results
from cigpose.deploy.sources import Source, utf8
from cigpose.files.atomic import write_bytes, written_file
from cigpose.progress import progress

PICTURES_AT_ONCE = 16
PIXELS_AT_ONCE = 100_000_000
UNSURE_FRAMES = 2
"""Frames by which the count in a whole video's header may be wrong."""


@dataclass
class Outcome:
    """What came of the pictures, or of a video."""

    done: list[Source] = field(default_factory=list)
    before: int = 0
    """Pictures or frames of them that an earlier run had finished."""
    frames: int = 0
    persons: int = 0
    skipped: list[str] = field(default_factory=list)
    """A sentence for each picture or video that could not be used, or not all of it."""


def predict_pictures(
    predictor: Predictor,
    pictures: Sequence[Source],
    results: Results,
    *,
    boxes: BoxFile | None = None,
    draw: bool = True,
    min_score: float = 0.3,
) -> Outcome:
    """Poses of pictures: `poses.jsonl` as they are done, `poses.json` at the end.

    Pictures that an earlier run finished, and that did not change since, are not predicted again.

    Args:
        predictor: the model.
        pictures: what `find_media` found.
        results: the folder.
        boxes: of persons; None: each picture is one person's box.
        draw: write the drawn pictures.
        min_score: keypoints below are not drawn; all are in the JSON.
    """
    journal, outcome = Journal(results.path / "poses.jsonl", "file_name"), Outcome()
    painter = _Painter(predictor, results, min_score) if draw else None
    with progress(pictures, total=len(pictures), desc="pictures", unit="picture") as bar:
        opened = (_open(source, journal, painter, boxes, outcome) for source in bar)
        for group in _batches(item for item in opened if item):
            fresh = [item for item in group if not item.is_done]
            found = predictor.predict_many([item.image for item in fresh], [item.boxes for item in fresh])
            journal.append(
                {"file_name": item.source.shown, **_record(poses), "source": item.stamp}
                for item, poses in zip(fresh, found, strict=True)
            )
            outcome.done += [item.source for item in fresh]
            if painter is not None:
                outcome.skipped += painter.write_all(group, journal)
    finished = sorted(outcome.done, key=lambda source: source.name)
    ids = image_ids([source.name for source in finished])
    images = []

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for image_id, source in zip(ids, finished, strict=True):
            record = journal[source.shown]
            outcome.persons += len(record["persons"])
            images.append({"id": image_id, **{key: record[key] for key in ("file_name", "width", "height")}})
            yield image_id, record

    write_pose_results(results.path / "poses.json", records(), predictor.keypoint_set)
    results.note(images=images)
    return outcome


def predict_video(
    predictor: Predictor,
    source: Source,
    results: Results,
    *,
    boxes: BoxFile | None = None,
    draw: bool = True,
    min_score: float = 0.3,
) -> Outcome:
    """Poses of every frame of a video: `<name>.jsonl` as they are done, `<name>.json` at the end.

    Frames that an earlier run finished are not predicted again, but drawn again if the drawn video was not finished.

    Args:
        predictor: the model.
        source: the video.
        results: the folder; the drawn video in it has the same frame rate and no sound.
        boxes: of persons, `image_id` is the frame; None: each frame is one person's box.
        draw: write the drawn video.
        min_score: keypoints below are not drawn; all are in the JSON.

    Raises:
        ValueError: it cannot be decoded, its boxes cannot be used, or the drawing cannot be encoded.
    """
    stamp, known = source.stamp(), results.found.get("videos", {}).get(source.shown, {})
    target = results.place(source.drawing) if draw else None
    if target and not known:
        _refuse_existing(target)
    lines, path = (results.path / f"{source.name}{ending}" for ending in (".jsonl", ".json"))
    if known.get("source") != stamp:
        lines.unlink(missing_ok=True)
        results.note_video(source.shown, known := {"source": stamp})
    journal, outcome = Journal(lines, "frame"), Outcome(done=[source])
    outcome.before = len(journal)
    if not ("frames" in known and path.exists() and (target is None or target.exists())):
        painter = _Painter(predictor, results, min_score)
        known = known | _predict_frames(predictor, source, journal, boxes, target, painter)
        frames = ((number, journal[number]) for number in range(known["frames"]))
        write_pose_results(path, frames, predictor.keypoint_set)
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


@dataclass
class _Opened:
    source: Source
    image: np.ndarray
    stamp: dict[str, int]
    boxes: np.ndarray | None
    is_done: bool
    """Its drawing alone is missing."""


def _batches(opened: Iterable[_Opened]) -> Iterator[list[_Opened]]:
    """Pictures that are in memory together."""
    batch: list[_Opened] = []
    pixels = 0
    for item in opened:
        batch.append(item)
        pixels += item.image.shape[0] * item.image.shape[1]
        if len(batch) == PICTURES_AT_ONCE or pixels >= PIXELS_AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _open(
    source: Source, journal: Journal, painter: _Painter | None, boxes: BoxFile | None, outcome: Outcome
) -> _Opened | None:
    """A picture whose poses or drawing are missing; None, with a sentence, if it is broken."""
    try:
        return _read(source, journal, painter, boxes, outcome)
    except (ValueError, OSError) as err:
        outcome.skipped.append(str(err))
        return None


def _read(
    source: Source, journal: Journal, painter: _Painter | None, boxes: BoxFile | None, outcome: Outcome
) -> _Opened | None:
    stamp, is_known = source.stamp(), source.shown in journal
    is_done = is_known and journal[source.shown]["source"] == stamp
    target = painter.results.place(source.drawing) if painter else None
    if target and not is_known:
        _refuse_existing(target)
    if is_done:
        outcome.before += 1
        outcome.done.append(source)
        if target is None or target.exists():
            return None
    image = read_image(source.path)
    wanted = boxes.of_picture(source.shown) if boxes else None
    try:
        check_boxes(wanted, (image.shape[1], image.shape[0]))
    except ValueError as err:
        raise ValueError(f"{utf8(source.path)}: {err}") from err
    return _Opened(source, image, stamp, wanted, is_done)


def _predict_frames(
    predictor: Predictor,
    source: Source,
    journal: Journal,
    boxes: BoxFile | None,
    target: Path | None,
    painter: _Painter,
) -> dict[str, int]:
    """Poses of the frames that the journal lacks, a drawing of all. How many there are, and how many were declared."""
    with _reader(source.path) as reader:
        frames = _frames(reader)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{utf8(source.path)}: OpenCV cannot decode a single frame. Convert it to H.264 .mp4.")
        rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
        total = max(int(reader.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        count = 0
        with (
            _video_writer(target, rate, (first.shape[1], first.shape[0])) as show,
            progress(total=total or None, desc=utf8(source.path.name), unit="frame") as bar,
        ):
            for group in _groups(enumerate(itertools.chain([first], frames)), PICTURES_AT_ONCE):
                fresh = [(number, frame) for number, frame in group if number not in journal]
                wanted = [boxes.of(number) if boxes else None for number, _ in fresh]
                try:
                    found = predictor.predict_many([frame for _, frame in fresh], wanted)
                except ValueError as err:
                    raise ValueError(f"{utf8(source.path)}: frames from {group[0][0]}: {err}") from err
                journal.append(
                    {"frame": number, "time_s": round(number / rate, 4), **_record(poses)}
                    for (number, _), poses in zip(fresh, found, strict=True)
                )
                for number, frame in group if target else ():
                    show(painter.drawn(frame, journal[number]))
                count += len(group)
                bar.update(len(group))
    return {"frames": count, "declared_frames": total}


@dataclass
class _Painter:
    """Draws records, not what they were made of, so that a run that was stopped draws the same."""

    predictor: Predictor
    results: Results
    min_score: float

    def drawn(self, image: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        size = image.shape[1], image.shape[0]
        poses = Poses.from_records(record["persons"], size, len(self.predictor.keypoint_set))
        return self.predictor.draw(image, poses, min_score=self.min_score, sure_score=1.5 * self.min_score)

    def write_all(self, opened: Iterable[_Opened], journal: Journal) -> list[str]:
        """Sentences about those that could not be drawn."""
        failed = []
        for item in opened:
            try:
                self.write(item.source, item.image, journal[item.source.shown])
            except ValueError as err:
                failed.append(str(err))
        return failed

    def write(self, source: Source, image: np.ndarray, record: Mapping[str, Any]) -> None:
        target = self.results.place(source.drawing)
        try:
            good, content = cv2.imencode(target.suffix.lower(), self.drawn(image, record))
        except cv2.error:
            good = False
        if not good:
            raise ValueError(f"{utf8(target)}: OpenCV cannot encode it. Use --no-drawings for the JSON alone.")
        write_bytes(target, content.tobytes())


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{utf8(target)}: exists, and `cigpose predict` did not write it. Move it elsewhere.")


def _record(poses: Poses) -> dict[str, Any]:
    return {"width": poses.image_size[0], "height": poses.image_size[1], "persons": poses.to_records()}


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
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
    with _plain_name(path, path.suffix) as name:
        reader = cv2.VideoCapture(name)
        try:
            yield reader
        finally:
            reader.release()


@contextlib.contextmanager
def _video_writer(path: Path | None, rate: float, size: tuple[int, int]) -> Iterator[Callable[[np.ndarray], object]]:
    if path is None:
        yield lambda frame: None
        return
    with written_file(path) as part, _plain_name(part, ".mp4") as name:
        writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
        try:
            if not writer.isOpened():
                raise ValueError(f"{utf8(path)}: OpenCV cannot encode a video here. Use --no-drawings for JSON alone.")
            yield lambda frame: writer.write(frame)
        finally:
            writer.release()


@contextlib.contextmanager
def _plain_name(path: Path, ending: str) -> Iterator[str]:
    """A link: OpenCV crashes on names that are not UTF-8, and goes by the ending."""
    with tempfile.TemporaryDirectory(prefix="cigpose-") as folder:
        link = Path(folder) / f"video{ending}"
        link.symlink_to(path.resolve())
        yield str(link)
