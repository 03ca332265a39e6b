"""Reader of UBody: whole-body people in videos, annotated at 30 frames per second.

Annotations number the frames of a constant 30 fps extraction, whatever the clip's own rate: frame i of it shows source
frame ceil(i * fps / 30 - 1/2). Only the frames wanted become pictures; clips stay in their zip until their turn.

Ids are unique only within a scene. Here they continue from scene to scene, in the order of the scenes: each is raised
by one more than the highest of the scenes before.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson

from cigpose.config import DatasetConfig
from cigpose.files.archives import Extent, ExtentReader, MemberLookup, find_member, list_members, open_spec
from cigpose.files.errors import DataError, shown
from cigpose.files.jsonstream import parse_element, split_arrays
from cigpose.shard.intake import Intake
from cigpose.shard.persons import NOT_FIRST, is_id
from cigpose.shard.pictures import Frame, Picture
from cigpose.shard.tars import Sample, ShardJob, encode_jpeg

ANNOTATION_FPS = 30
_ANNOTATIONS = "keypoint_annotation.json"


@dataclass(slots=True)
class _Bases:
    """What the ids of the present scene are raised by."""

    image: int = 0
    annotation: int = 0


def read_ubody(dataset: DatasetConfig, raw: Path, intake: Intake) -> None:
    """Read the frames and persons of the wanted scenes, split and interval into `intake`.

    Every person of a frame is taken; with `first_person_only` the first annotation of each frame alone, as the original
    converter does.

    Raises:
        FileNotFoundError: a file, archive member or scene is not there.
        DataError: a file cannot be read as a whole; single bad entries are counted by `intake`.
    """
    path = raw / dataset.annotations
    members = list_members(path)
    files = {name.split("/")[-2]: name for name in members if name.endswith(f"/{_ANNOTATIONS}")}
    if not files:
        raise FileNotFoundError(f"{path}: holds no <scene>/{_ANNOTATIONS}. Is it UBody's annotations.zip?")
    if unknown := set(dataset.scenes) - set(files):
        raise FileNotFoundError(f"{path}: has no scenes {sorted(unknown)}. It has: {', '.join(sorted(files))}.")
    test_videos = _test_videos(dataset, raw)
    clips = _clips(list_members(raw / dataset.images))
    bases = _Bases()
    for scene in dataset.scenes or sorted(files):
        extent = find_member(members, files[scene], path)
        places, bases_next = _read_scene_images(dataset, scene, extent, clips, test_videos, intake, bases)
        bases_next.annotation = _read_scene_persons(dataset, scene, extent, places, intake, bases)
        bases = bases_next
    if not intake.num_annotations:
        raise DataError(f"{path}: no annotation in the wanted scenes, split and interval. Look at data.datasets.")


def video_name(file_name: str) -> str:
    """The video that a frame belongs to, as the split files name it: its folder, cut at `_Trim`."""
    parts = file_name.strip("/").split("/")
    return parts[-2].split("_Trim")[0] if len(parts) > 1 else ""


def source_frame(index: int, fps: Fraction) -> int:
    """The clip's frame (from 0) that frame `index` (from 0) of the 30 fps extraction shows."""
    return max(math.ceil(index * fps / ANNOTATION_FPS - Fraction(1, 2)), 0)


def num_extracted(num_frames: int, fps: Fraction) -> int:
    """Frames that the 30 fps extraction of a clip has."""
    return round(num_frames * ANNOTATION_FPS / fps)


def _read_scene_images(
    dataset: DatasetConfig,
    scene: str,
    extent: Extent,
    clips: MemberLookup,
    test_videos: frozenset[str] | None,
    intake: Intake,
    bases: _Bases,
) -> tuple[dict[int, int | None], _Bases]:
    """Take the wanted pictures; returns id in the scene -> place (None: not wanted), and the next scene's bases."""
    places: dict[int, int | None] = {}
    for key, element in _elements(extent, ("images", "annotations")):
        if key == "annotations":
            if places:
                break
            continue
        where = f"{extent.where}: image {len(places) + 1} of the list"
        entry = parse_element(element, where)
        frame = _frame_number(entry)
        if frame is None or not is_id(entry.get("id")) or entry["id"] in places:
            intake.bad.add(f"{where}: expected a new id and a file_name <clip>/<clip>/<frame>.png, got {shown(entry)}")
            continue
        places[entry["id"]] = None
        if entry["id"] % dataset.frame_interval or not _in_split(entry["file_name"], dataset, test_videos):
            continue
        name = f"{scene}/{entry['file_name'].lstrip('/')}"
        clip = clips.find(name.rpartition("/")[0])
        picture = Picture(
            key=f"{scene.replace('.', '-')}-{entry['id']:08d}",
            image_id=bases.image + entry["id"],
            file_name=name,
            width=entry["width"],
            height=entry["height"],
            source=None if clip is None else Frame(clip=clip, index=frame - 1),
        )
        places[entry["id"]] = intake.add_picture(picture, {**entry, "file_name": name})
    if not places:
        raise DataError(f"{extent.where}: lists no images. Is it UBody's {_ANNOTATIONS}?")
    return places, _Bases(image=bases.image + max(places) + 1)


def _read_scene_persons(
    dataset: DatasetConfig,
    scene: str,
    extent: Extent,
    places: dict[int, int | None],
    intake: Intake,
    bases: _Bases,
) -> int:
    """Take the persons of the wanted pictures; returns the next scene's base of annotation ids."""
    highest = -1
    seen: set[int] = set()
    peopled: set[int] = set()
    for _, element in _elements(extent, ("annotations",)):
        annotation = parse_element(element, f"{extent.where}: an annotation after {len(seen)}")
        where = f"{scene}: annotation {shown(annotation.get('id'))}"
        image_id, identity = annotation.get("image_id"), annotation.get("id")
        if not is_id(identity) or identity in seen:
            intake.bad.add(f"{where}: its id is missing or there twice")
            continue
        seen.add(identity)
        highest = max(highest, identity)
        if not is_id(image_id) or image_id not in places:
            intake.bad.add(f"{where}: its image id {shown(image_id)} is not in `images`")
            continue
        place = places[image_id]
        if place is None:
            continue
        intake.num_annotations += 1
        if dataset.first_person_only and image_id in peopled:
            intake.dropped[NOT_FIRST] += 1
            continue
        peopled.add(image_id)
        annotation |= {"id": bases.annotation + identity, "image_id": bases.image + image_id}
        intake.add_annotation(annotation, place, orjson.dumps(annotation) if dataset.ground_truth else b"", where)
    return bases.annotation + highest + 1


def _frame_number(entry: dict[str, Any]) -> int | None:
    """Number in the file name, from 1."""
    name = entry.get("file_name")
    if not isinstance(name, str) or type(entry.get("width")) is not int or type(entry.get("height")) is not int:
        return None
    stem = name.rpartition("/")[2].partition(".")[0]
    return int(stem) if stem.isdigit() and int(stem) > 0 and name.strip("/").count("/") else None


def _in_split(file_name: str, dataset: DatasetConfig, test_videos: frozenset[str] | None) -> bool:
    if test_videos is None:
        return True
    return (video_name(file_name) in test_videos) == (dataset.split == "val")


def _test_videos(dataset: DatasetConfig, raw: Path) -> frozenset[str] | None:
    """Names of the test videos; None if the dataset takes both sides of the split."""
    if dataset.split is None:
        return None
    if dataset.split_file is None:
        raise DataError("data.datasets: split is given without split_file. Name splits.zip:splits/<list>.npy there.")
    with open_spec(raw, dataset.split_file) as stream:
        data = stream.read()
    try:
        names = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as err:
        raise DataError(f"{raw / dataset.split_file}: not an array of names ({err}). Download it again.") from err
    return frozenset(str(name) for name in names.ravel())


def _clips(members: dict[str, Extent]) -> MemberLookup:
    """Clips by the folder of their frames: the clip's path without its ending.

    The extraction cuts names at their first dot; annotations of a clip with dots may use either form.
    """
    folders: dict[str, Extent] = {}
    for name, extent in members.items():
        folder, _, file = name.rpartition("/")
        for stem in {file.partition(".")[0], file.rpartition(".")[0]}:
            folders.setdefault(f"{folder}/{stem}", extent)
    return MemberLookup(folders)


def _elements(extent: Extent, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    folder = Path(extent.path).parent
    spec = f"{Path(extent.path).name}:{extent.name}" if extent.in_zip or extent.offset else Path(extent.path).name
    with open_spec(folder, spec) as stream:
        yield from split_arrays(stream, extent.where, wanted)


# ------------------------------------------------------------------------------------------------- frames, in workers


def read_frames(job: ShardJob, reader: ExtentReader) -> Iterator[tuple[Sample, bytes | memoryview | DataError | None]]:
    """Pictures that are frames of clips: each clip is decoded once, up to the last frame wanted of it."""
    samples = list(job.samples)
    while samples:
        clip = _frame(samples[0]).clip
        run = next((i for i, sample in enumerate(samples) if _frame(sample).clip != clip), len(samples))
        group, samples = samples[:run], samples[run:]
        try:
            with _as_file(reader, clip, job.path) as path:
                yield from _in_order(group, path, job.jpeg_quality)
        except DataError as err:
            yield from ((sample, err) for sample in group)


def _in_order(group: list[Sample], path: Path, quality: int) -> Iterator[tuple[Sample, bytes | DataError | None]]:
    """Frames of one clip in the order of the samples; only those that come too early wait in memory."""
    wanted = [_frame(sample).index for sample in group]
    waiting: dict[int, bytes | DataError | None] = {}
    users = Counter(wanted)
    place = 0
    for index, jpeg in extract_frames(path, wanted, quality):
        waiting[index] = jpeg
        while place < len(group) and wanted[place] in waiting:
            yield group[place], waiting[wanted[place]]
            users[wanted[place]] -= 1
            if not users[wanted[place]]:
                del waiting[wanted[place]]
            place += 1


def extract_frames(path: Path, wanted: Iterable[int], quality: int) -> Iterator[tuple[int, bytes | DataError | None]]:
    """JPEGs of frames of the 30 fps extraction of a clip, in ascending order.

    Args:
        path: of the clip.
        wanted: frames, from 0.
        quality: of the JPEGs.

    Yields: number and JPEG of each; None if the clip ends before; an error if the clip claims the frame but is cut.

    Raises:
        DataError: the clip cannot be opened; before anything is yielded.
    """
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        rate, claimed = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if not capture.isOpened() or not rate > 0 or claimed <= 0:
            raise DataError(f"{path.name}: cannot be opened as a video; it is cut or damaged. Download it again.")
        fps = Fraction(rate).limit_denominator(1001)
        decoded, shown = 0, -1
        jpeg: bytes | DataError | None = None
        for index in sorted(set(wanted)):
            if index >= num_extracted(claimed, fps):
                yield index, None
                continue
            source = min(source_frame(index, fps), claimed - 1)
            if source != shown:
                while decoded < source and capture.grab():
                    decoded += 1
                done, image = capture.read() if decoded == source else (False, None)
                decoded += done
                shown = source
                jpeg = encode_jpeg(image, quality) if done and image is not None else None
            cut = DataError(f"{path.name} claims {claimed} frames, only {decoded} can be decoded; it is cut")
            yield index, cut if jpeg is None else jpeg
    finally:
        capture.release()


def _frame(sample: Sample) -> Frame:
    assert isinstance(sample.picture.source, Frame)
    return sample.picture.source


@contextmanager
def _as_file(reader: ExtentReader, clip: Extent, beside: Path) -> Iterator[Path]:
    """The clip as a file of its own, which OpenCV needs: itself if it is one, else a temporary copy."""
    if not clip.in_zip and not clip.offset:
        yield Path(clip.path)
        return
    folder = beside.with_suffix(".clip")
    folder.mkdir(exist_ok=True)
    path = folder / clip.name.rpartition("/")[2]
    try:
        with path.open("wb") as file:
            for chunk in reader.chunks(clip):
                file.write(chunk)
        yield path
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()
