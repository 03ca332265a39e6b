"""Reader of COCO-keypoints JSON and its pictures: COCO, COCO-WholeBody, rendered people, a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from cigpose.config import DatasetConfig
from cigpose.files.archives import Extent, MemberLookup, list_members, open_spec, split_spec
from cigpose.files.errors import DataError, shown
from cigpose.files.jsonstream import LIST, parse_element, split_arrays
from cigpose.shard.intake import Intake, SeenIds
from cigpose.shard.persons import is_id
from cigpose.shard.pictures import Picture

_LARGEST_SIDE = 65_535
"""Pixels; the most that a JPEG can have."""
Mend = Callable[[dict[str, Any], Extent], tuple[int, int]]
"""Image entry and its picture -> the picture's (width, height), where the entry is known to be unreliable."""


def read_coco(dataset: DatasetConfig, raw: Path, intake: Intake, mend_size: Mend | None = None) -> None:
    """Read every picture and person of a dataset into `intake`.

    Two passes, since the pictures may be listed behind the persons; the first ends where the pictures do.

    Args:
        dataset: which files.
        raw: the folder they are relative to.
        intake: takes what is read.
        mend_size: gives the true size of a picture (CrowdPose's early files swap width and height).

    Raises:
        FileNotFoundError: a file or archive member is not there.
        DataError: a file cannot be read as a whole; single bad entries are counted by `intake`.
    """
    places = _read_images(dataset, raw, intake, MemberLookup(list_members(raw / dataset.images)), mend_size)
    name = _name(dataset.annotations)
    seen = SeenIds()
    for key, element in _elements(raw, dataset.annotations, ("annotations", "categories")):
        if key == "categories":
            intake.categories.append(parse_element(element, f"{name}: category"))
            continue
        annotation = parse_element(element, f"{name}: annotation {intake.num_annotations + 1} of the list")
        intake.num_annotations += 1
        where = f"{name}: annotation {shown(annotation.get('id'))}"
        if problem := _id_problem(annotation, seen, places):
            intake.bad.add(f"{where}: {problem}")
            continue
        intake.add_annotation(annotation, places[annotation["image_id"]], element, where)
    if not intake.num_annotations:
        raise DataError(f"{raw / name}: has no annotations. Expected COCO-keypoints JSON with a list of that name.")
    if dataset.detections is not None:
        read_detections(raw, dataset.detections, intake, places)


def read_detections(raw: Path, spec: str, intake: Intake, places: dict[int, int]) -> None:
    """Read a JSON list of {bbox, score, category_id, image_id} into `intake`.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it cannot be read as a whole.
    """
    name = _name(spec)
    number = 0
    for _, element in _elements(raw, spec, (LIST,)):
        number += 1
        where = f"{name}: box {number}"
        detection = parse_element(element, where)
        image_id = detection.get("image_id")
        if not is_id(image_id) or image_id not in places:
            intake.bad.add(f"{where}: image id {shown(image_id)} is not in the annotation file")
            continue
        intake.add_detection(detection, places[image_id], where)
    if not number:
        raise DataError(f"{raw / name}: holds no boxes. Expected a JSON list of detections.")


def _read_images(
    dataset: DatasetConfig, raw: Path, intake: Intake, lookup: MemberLookup, mend_size: Mend | None
) -> dict[int, int]:
    """Take every picture; returns image id -> place in the intake."""
    name = _name(dataset.annotations)
    places: dict[int, int] = {}
    for key, element in _elements(raw, dataset.annotations, ("images", "annotations")):
        if key == "annotations":
            if places:
                break
            continue
        entry = parse_element(element, f"{name}: image {len(places) + 1} of the list")
        if problem := _entry_problem(entry, places):
            intake.bad.add(f"{name}: image {shown(entry.get('id'))}: {problem}")
            continue
        source = lookup.find(entry["file_name"])
        size = (entry["width"], entry["height"])
        if mend_size is not None and source is not None:
            size = mend_size(entry, source)
            if size != (entry["width"], entry["height"]):
                intake.mended["swapped_size"] += 1
        picture = Picture(
            key=f"{entry['id']:012d}",
            image_id=entry["id"],
            file_name=entry["file_name"],
            width=size[0],
            height=size[1],
            source=source,
        )
        places[entry["id"]] = intake.add_picture(picture, entry)
    if not places and intake.bad.count:
        raise DataError(
            f"{raw / name}: none of its images can be used: {'; '.join(intake.bad.examples)}. Mend the file."
        )
    if not places:
        raise DataError(f"{raw / name}: lists no images. Expected COCO-keypoints JSON with a list `images`.")
    return places


def _entry_problem(entry: dict[str, Any], places: dict[int, int]) -> str | None:
    if not is_id(entry.get("id")):
        return "its id is not a whole number from 0"
    if entry["id"] in places:
        return "its id is listed twice"
    if not isinstance(entry.get("file_name"), str):
        return "it has no file_name"
    try:
        orjson.dumps(entry)
    except orjson.JSONEncodeError as err:  # half of a surrogate pair in a name, a number of more than 64 bits
        return f"it cannot be written as JSON ({err})"
    for side in ("width", "height"):
        if type(entry.get(side)) is not int or not 0 < entry[side] <= _LARGEST_SIDE:
            return f"its {side} is {shown(entry.get(side))}, expected pixels"
    return None


def _id_problem(annotation: dict[str, Any], seen: SeenIds, places: dict[int, int]) -> str | None:
    if not is_id(annotation.get("id")):
        return "its id is not a whole number from 0"
    if not seen.add(annotation["id"]):
        return "its id is there twice"
    image_id = annotation.get("image_id")
    if not is_id(image_id) or image_id not in places:
        return f"its image id {shown(image_id)} is not in `images`"
    return None


def _elements(raw: Path, spec: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with open_spec(raw, spec) as stream:
        yield from split_arrays(stream, str(raw / spec), wanted)


def _name(spec: str) -> str:
    archive, member = split_spec(spec)
    return member or archive
