"""Folders of pictures and videos: poses of everybody, drawn and as JSON.

The JSON file is an array with one record per picture or frame, one record per line, written as it comes:
    {"file_name" | "frame", "time_s", "width", "height", "persons": [{"bbox_xyxy", "score", "keypoints"}, ...]}
It and the drawn video have a temporary name until they are complete.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cigpose.deploy.predictor import Poses, Predictor, read_image
from cigpose.progress import progress

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
PICTURES_AT_ONCE = 16

Boxes = np.ndarray | None
"""(N, 5) x0, y0, x1, y1, score; None: the whole picture."""


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
        self._boxes: dict[str | int, list[list[float]]] = {}
        for number, entry in enumerate(entries):
            key, box = self._entry(entry, f"{path}: detection {number}")
            if entry.get("category_id", 1) == 1 and box[4] >= min_score:
                self._boxes.setdefault(key, []).append(box)

    @staticmethod
    def _entry(entry: Any, where: str) -> tuple[str | int, list[float]]:
        if not isinstance(entry, Mapping) or not ("file_name" in entry or "image_id" in entry):
            raise ValueError(f"{where}: expected a mapping with file_name or image_id, got {entry!r:.80}.")
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{where}: expected bbox [x, y, w, h], got {entry.get('bbox')!r:.80}.") from err
        key = str(entry["file_name"]) if "file_name" in entry else int(entry["image_id"])
        return key, [x, y, x + width, y + height, float(entry.get("score", 1.0))]

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


def predict_pictures(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    *,
    boxes: BoxFile | None = None,
    draw: bool = True,
    min_score: float = 0.3,
) -> Path:
    """Poses of a picture, or of all pictures in a folder and below.

    Args:
        predictor: the model.
        source: the picture or folder.
        out: folder for `poses.json` and, under their own names, the drawn pictures (as .jpg).
        boxes: of persons; None: each picture is one person's box.
        draw: write the drawn pictures.
        min_score: keypoints below are not drawn; all are in the JSON.

    Returns: `poses.json`.

    Raises:
        FileNotFoundError: there is no picture.
        ValueError: one cannot be decoded.
    """
    source, out = Path(source), Path(out)
    base, files = _pictures(source)
    with _json_array(out / "poses.json") as write, progress(total=len(files), desc=source.name, unit="picture") as bar:
        for group in _groups(files, PICTURES_AT_ONCE):
            images = [read_image(file) for file in group]
            names = [file.relative_to(base).as_posix() for file in group]
            wanted = [boxes.of_picture(name) if boxes else None for name in names]
            for name, image, poses in zip(names, images, predictor.predict_many(images, wanted), strict=True):
                write({"file_name": name, **_record(poses)})
                if draw:
                    path = out / Path(name).with_suffix(".jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _write_picture(path, _drawn(predictor, image, poses, min_score))
                bar.update()
    return out / "poses.json"


def predict_video(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    *,
    boxes: BoxFile | None = None,
    draw: bool = True,
    min_score: float = 0.3,
) -> Path:
    """Poses of every frame of a video.

    Args:
        predictor: the model.
        source: the video.
        out: folder for `<name>.json` and, if drawn, `<name>.mp4` with the same frame rate and no sound.
        boxes: of persons, `image_id` is the frame; None: each frame is one person's box.
        draw: write the drawn video.
        min_score: keypoints below are not drawn; all are in the JSON.

    Returns: `<name>.json`.

    Raises:
        FileNotFoundError: there is no such video.
        ValueError: it cannot be decoded, or drawing cannot be encoded.
    """
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such video.")
    reader = cv2.VideoCapture(str(source))
    try:
        frames = _frames(reader)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{source}: OpenCV cannot decode a single frame of it. Convert it to H.264 .mp4.")
        rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
        total = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
        out.mkdir(parents=True, exist_ok=True)
        size = first.shape[1], first.shape[0]
        target = out / f"{source.stem}.mp4" if draw else None
        path = out / f"{source.stem}.json"
        with (
            _json_array(path) as write,
            _video_writer(target, rate, size) as show,
            progress(total=total if total > 0 else None, desc=source.name, unit="frame") as bar,
        ):
            numbered = enumerate(itertools.chain([first], frames))
            for group in _groups(numbered, PICTURES_AT_ONCE):
                wanted = [boxes.of(number) if boxes else None for number, _ in group]
                found = predictor.predict_many([frame for _, frame in group], wanted)
                for (number, frame), poses in zip(group, found, strict=True):
                    write({"frame": number, "time_s": round(number / rate, 4), **_record(poses)})
                    if draw:
                        show(_drawn(predictor, frame, poses, min_score))
                    bar.update()
    finally:
        reader.release()
    return path


def _pictures(source: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the pictures, sorted."""
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such picture or folder.")
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise FileNotFoundError(f"{source}: no pictures in it; known endings: {' '.join(sorted(PICTURES))}.")
    return source, files


def _frames(reader: Any) -> Iterator[np.ndarray]:
    while True:
        good, frame = reader.read()
        if not good:
            return
        yield frame


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _record(poses: Poses) -> dict[str, Any]:
    return {"width": poses.image_size[0], "height": poses.image_size[1], "persons": poses.to_records()}


def _drawn(predictor: Predictor, image: np.ndarray, poses: Poses, min_score: float) -> np.ndarray:
    return predictor.draw(image, poses, min_score=min_score, sure_score=1.5 * min_score)


def _write_picture(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path}: cannot be written. Is the folder writable, the disk full?")


@contextlib.contextmanager
def _json_array(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with temporary.open("w", encoding="ascii") as file:

            def write(record: Mapping[str, Any]) -> None:
                nonlocal count
                file.write("[\n" if count == 0 else ",\n")
                file.write(json.dumps(record, separators=(",", ":")))
                count += 1

            yield write
            file.write("\n]\n" if count else "[]\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _video_writer(path: Path | None, rate: float, size: tuple[int, int]) -> Iterator[Callable[[np.ndarray], object]]:
    if path is None:
        yield lambda frame: None
        return
    temporary = path.with_name(f".{path.stem}.part.mp4")
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    try:
        if not writer.isOpened():
            raise ValueError(f"{path}: OpenCV cannot encode a video here. Use --no-drawings for the JSON alone.")
        yield lambda frame: writer.write(frame)
        writer.release()
        temporary.replace(path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)
