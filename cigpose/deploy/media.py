"""Pictures: poses of everybody, drawn and as JSON, in a folder as `cigpose.deploy.results` describes it.

A record of poses.jsonl is one picture:
    {"file_name", "width", "height", "persons": [{"bbox_xyxy", "score", "keypoints", ...}, ...], "source"}
with the persons of `Poses.to_records`. Pictures are decoded, and people detected, in threads before the network needs
them; drawings are written in threads while it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cigpose.deploy.ahead import mapped_ahead, num_threads
from cigpose.deploy.boxes import BoxFile
from cigpose.deploy.drawing import Painter, refuse_existing
from cigpose.deploy.journal import Journal
from cigpose.deploy.poses import Poses
from cigpose.deploy.predictor import Predictor, check_boxes, read_image
from cigpose.deploy.results import Results, image_ids, write_pose_results
from cigpose.deploy.sources import Source, utf8
from cigpose.progress import progress

PICTURES_AT_ONCE = 16
PIXELS_AT_ONCE = 100_000_000


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
    seconds: float = 0.0
    """Of a video: how long the frames took that were not done before."""


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
        boxes: of persons; None: those the predictor's detector finds; without one each picture is one person's box.
        draw: write the drawn pictures.
        min_score: keypoints below are not drawn; all are in the JSON.
    """
    journal, outcome = Journal(results.path / "poses.jsonl", "file_name"), Outcome()
    painter = Painter(predictor.keypoint_set, results, min_score) if draw else None

    def opened(source: Source) -> _Opened:
        return _open(source, journal, painter, boxes, predictor)

    with (
        progress(pictures, total=len(pictures), desc="pictures", unit="picture") as bar,
        ThreadPoolExecutor(num_threads(), thread_name_prefix="cigpose-draw") as pool,
    ):
        drawing: list[Future[str | None]] = []
        for group in _batches(_usable(mapped_ahead(opened, bar), outcome)):
            fresh = [item for item in group if not item.is_done]
            found = predictor.predict_many([item.pixels for item in fresh], [item.boxes for item in fresh])
            journal.append(
                {"file_name": item.source.shown, **pose_record(poses), "source": item.stamp}
                for item, poses in zip(fresh, found, strict=True)
            )
            outcome.done += [item.source for item in fresh]
            outcome.skipped += _sentences(drawing)
            if painter is not None:
                drawing = [pool.submit(_draw, painter, item, journal) for item in group]
        outcome.skipped += _sentences(drawing)
    _write_results(outcome, journal, results, predictor)
    return outcome


def pose_record(poses: Poses) -> dict[str, Any]:
    """What a line of JSON says of a picture or frame."""
    return {"width": poses.image_size[0], "height": poses.image_size[1], "persons": poses.to_records()}


def _write_results(outcome: Outcome, journal: Journal, results: Results, predictor: Predictor) -> None:
    """The COCO result file of all finished pictures, and their ids."""
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


@dataclass
class _Opened:
    source: Source
    image: np.ndarray | None = None
    """None: there is nothing to do, or `problem` says why not."""
    stamp: dict[str, int] = field(default_factory=dict)
    boxes: np.ndarray | None = None
    is_done: bool = False
    """Poses are known; its drawing may be missing."""
    problem: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        assert self.image is not None
        return self.image


def _usable(opened: Iterable[_Opened], outcome: Outcome) -> Iterator[_Opened]:
    """Pictures whose poses or drawing are missing; the others are counted."""
    for item in opened:
        if item.is_done:
            outcome.before += 1
            outcome.done.append(item.source)
        if item.problem:
            outcome.skipped.append(item.problem)
        elif item.image is not None:
            yield item


def _batches(opened: Iterable[_Opened]) -> Iterator[list[_Opened]]:
    """Pictures that are in memory together."""
    batch: list[_Opened] = []
    pixels = 0
    for item in opened:
        batch.append(item)
        pixels += item.pixels.shape[0] * item.pixels.shape[1]
        if len(batch) == PICTURES_AT_ONCE or pixels >= PIXELS_AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _open(
    source: Source, journal: Journal, painter: Painter | None, boxes: BoxFile | None, predictor: Predictor
) -> _Opened:
    item = _Opened(source)
    try:
        _read(item, journal, painter, boxes, predictor)
    except (ValueError, OSError) as err:
        item.problem = str(err)
    return item


def _read(
    item: _Opened, journal: Journal, painter: Painter | None, boxes: BoxFile | None, predictor: Predictor
) -> None:
    source = item.source
    item.stamp, is_known = source.stamp(), source.shown in journal
    target = painter.results.place(source.drawing) if painter else None
    if target and not is_known:
        refuse_existing(target)
    item.is_done = is_known and journal[source.shown]["source"] == item.stamp
    if item.is_done and (target is None or target.exists()):
        return
    image = read_image(source.path)
    try:
        if boxes:
            item.boxes = boxes.of_picture(source.shown)
        elif predictor.detector and not item.is_done:
            item.boxes = predictor.detector(image)
        check_boxes(item.boxes, (image.shape[1], image.shape[0]))
    except ValueError as err:
        raise ValueError(f"{utf8(source.path)}: {err}") from err
    item.image = image


def _draw(painter: Painter, item: _Opened, journal: Journal) -> str | None:
    try:
        painter.write(item.source, item.pixels, journal[item.source.shown])
    except ValueError as err:
        return str(err)
    return None


def _sentences(drawing: Iterable[Future[str | None]]) -> list[str]:
    """What became of drawings, once they are done."""
    return [sentence for future in drawing if (sentence := future.result())]
