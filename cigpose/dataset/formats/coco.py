"""COCO-keypoints JSON: images, annotations, and a category with keypoint names and a skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cigpose.dataset.labels import OwnLabels
from cigpose.files.errors import DataError, shown
from cigpose.keypoints import Edge


def read_coco_labels(document: Mapping[str, Any], source: str, category: str | None) -> OwnLabels:
    """The people of one category of a COCO-keypoints file.

    Args:
        document: the parsed JSON.
        source: the file, for messages.
        category: name of the category; None for the only one whose annotations have keypoints.

    Raises:
        DataError: a list is missing, or it is not clear which category is meant.
    """
    lists: dict[str, Any] = {}
    for name in ("images", "annotations"):
        lists[name] = document.get(name)
        if not isinstance(lists[name], list) or not lists[name]:
            raise DataError(f"{source}: has no list `{name}`, expected COCO-keypoints JSON. Is this the right file?")
    entry = _category(document, lists["annotations"], source, category)
    people = [
        _person(annotation, source)
        for annotation in lists["annotations"]
        if annotation.get("category_id", entry.get("id")) == entry.get("id") and annotation.get("keypoints")
    ]
    counts = {len(person["keypoints"]) for person in people}
    if len(counts) != 1 or (count := counts.pop()) % 3:
        raise DataError(
            f"{source}: its people have {sorted(counts) or 'no'} numbers of `keypoints`, expected one count for all, "
            "x, y and visibility for each keypoint."
        )
    names = _names(entry, count // 3, source)
    labels = OwnLabels(
        source=source,
        kind="COCO keypoints JSON",
        images=[_image(image, source) for image in lists["images"]],
        people=people,
        names=names,
        num_keypoints=count // 3,
    )
    labels.edges = _edges(entry.get("skeleton") or [], count // 3, labels)
    if sigmas := entry.get("sigmas") or entry.get("keypoint_sigmas"):
        labels.sigmas = _sigmas(sigmas, count // 3, source)
    return labels


def _category(document: Mapping[str, Any], people: list[Any], source: str, wanted: str | None) -> Mapping[str, Any]:
    listed = [entry for entry in document.get("categories") or [{"id": 1, "name": "person"}]]
    used = {person.get("category_id") for person in people if person.get("keypoints")}
    known = [entry for entry in listed if entry.get("id") in used] or listed
    if wanted is not None:
        known = [entry for entry in listed if entry.get("name") == wanted]
        if not known:
            names = ", ".join(str(entry.get("name")) for entry in listed)
            raise DataError(f"{source}: has no category {wanted!r}, only {names}. Name one of these as --category.")
    if len(known) > 1:
        names = ", ".join(str(entry.get("name")) for entry in known)
        raise DataError(f"{source}: people of several categories have keypoints: {names}. Choose one by --category.")
    return dict(known[0])


def _names(entry: Mapping[str, Any], count: int, source: str) -> tuple[str, ...]:
    names = tuple(str(name) for name in entry.get("keypoints") or ())
    if names and len(names) != count:
        raise DataError(
            f"{source}: its category {entry.get('name')!r} names {len(names)} keypoints, its people have {count}. "
            "Mend the file, or name them by --keypoints."
        )
    return names


def _person(annotation: dict[str, Any], source: str) -> dict[str, Any]:
    where = f"{source}: annotation {shown(annotation.get('id'))}"
    values = annotation["keypoints"]
    if isinstance(values, list) and values and isinstance(values[0], list):
        values = [value for point in values for value in point]  # [[x, y, v], ...], as some tools write it
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise DataError(f"{where}: `keypoints` is {shown(values)}, expected numbers x, y, v for each keypoint.")
    return {**annotation, "keypoints": values}


def _image(image: dict[str, Any], source: str) -> dict[str, Any]:
    if not isinstance(image.get("file_name"), str) or "id" not in image:
        raise DataError(f"{source}: image {shown(image)} has no `id` or no `file_name`. Mend the file.")
    return dict(image)


def _edges(skeleton: list[Any], count: int, labels: OwnLabels) -> tuple[Edge, ...]:
    """From 0; COCO counts from 1, some tools from 0."""
    edges = [(int(edge[0]), int(edge[1])) for edge in skeleton if len(edge) == 2 and edge[0] != edge[1]]
    ends = [end for edge in edges for end in edge]
    first = 0 if 0 in ends else 1
    if ends and not (first <= min(ends) and max(ends) < count + first):
        raise DataError(
            f"{labels.source}: its skeleton joins keypoints {min(ends)} to {max(ends)}, there are {count}. Mend it."
        )
    if ends and first == 0:
        labels.notes.append("The skeleton counts keypoints from 0 where COCO counts from 1; it is taken as it counts.")
    return tuple(dict.fromkeys((min(a, b) - first, max(a, b) - first) for a, b in edges))


def _sigmas(values: Any, count: int, source: str) -> tuple[float, ...]:
    is_numbers = isinstance(values, list) and all(isinstance(value, (int, float)) and value > 0 for value in values)
    if not is_numbers or len(values) != count:
        raise DataError(f"{source}: `sigmas` is {shown(values)}, expected {count} numbers above 0. Mend or remove it.")
    return tuple(float(value) for value in values)
