"""Labelled people as every format is read to: COCO's lists, and what the file says of its keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cigpose.keypoints import Edge

BOX_MARGIN = 0.15
"""Of the labelled keypoints' extent, on each side, where a person has no box; and a pixel."""
AREA_SHARE = 0.53
"""Of the box, where a person has no area: CrowdPose's rule."""


@dataclass(kw_only=True)
class OwnLabels:
    """Pictures, people and keypoint names of one file or folder of labels."""

    source: str
    """The file, as messages name it."""
    kind: str
    """Its format, in words."""
    images: list[dict[str, Any]]
    """COCO's entries: `id`, `file_name`, `width`, `height`, and whatever else the file has."""
    people: list[dict[str, Any]]
    """COCO's annotations of one category: `id`, `image_id`, `keypoints` (x, y, v a keypoint), `bbox`, `area`."""
    names: tuple[str, ...] = ()
    """Of the keypoints, in their order; empty where the file does not say."""
    num_keypoints: int = 0
    edges: tuple[Edge, ...] = ()
    """Of the skeleton, from 0."""
    flip_pairs: tuple[Edge, ...] | None = None
    """Where the file says them."""
    sigmas: tuple[float, ...] | None = None
    """Where the file says them."""
    repeats: list[dict[str, Any]] = field(default_factory=list)
    """Further labels of people in `people`, by other annotators: as those, with `repeats`, the id of the person."""
    sides: dict[str, str] = field(default_factory=dict)
    """`file_name` -> train or val, where the file says it."""
    notes: list[str] = field(default_factory=list)
    """What had to be assumed, for the user."""

    @property
    def num_people(self) -> int:
        """Persons that count, see `is_labelled`."""
        return sum(map(is_labelled, self.people))


def is_labelled(person: Mapping[str, Any]) -> bool:
    """Whether a person can be trained on: is no crowd, and has a keypoint."""
    return not person.get("iscrowd") and any(v > 0 for v in person["keypoints"][2::3])


def complete_people(labels: OwnLabels) -> None:
    """Give a box and an area to those people who have none, and say so."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in labels.images}
    no_box = no_area = 0
    for person in (*labels.people, *labels.repeats):
        if person.get("bbox") is None and not person.get("iscrowd"):
            person["bbox"] = box_around(person["keypoints"], sizes[person["image_id"]])
            no_box += 1
        if person.get("area") is None and person.get("bbox") is not None:
            person["area"] = AREA_SHARE * person["bbox"][2] * person["bbox"][3]
            no_area += 1
        person.setdefault("iscrowd", 0)
    unlabelled = sum(not is_labelled(person) for person in labels.people)
    if unlabelled:
        labels.notes.append(f"{unlabelled} people are crowds or have no keypoint labelled: they are not trained on.")
    if no_box:
        labels.notes.append(
            f"{no_box} people have no box: theirs is the extent of their keypoints and {BOX_MARGIN:.0%} on each side."
        )
    if no_area:
        labels.notes.append(
            f"{no_area} people have no area: theirs is {AREA_SHARE} of the box, as CrowdPose takes it. AP compares "
            "with that of files with areas only roughly."
        )


def box_around(keypoints: Sequence[float], size: tuple[int, int]) -> list[float]:
    """x, y, width, height around the labelled keypoints, with a margin, within a picture of (width, height)."""
    points = [(x, y) for x, y, v in zip(keypoints[0::3], keypoints[1::3], keypoints[2::3], strict=True) if v > 0]
    if not points:
        return [0.0, 0.0, 0.0, 0.0]
    xs, ys = zip(*points, strict=True)
    margins = [BOX_MARGIN * max(max(side) - min(side), 1.0) + 1 for side in (xs, ys)]
    left, top = max(min(xs) - margins[0], 0.0), max(min(ys) - margins[1], 0.0)
    right, bottom = min(max(xs) + margins[0], size[0]), min(max(ys) + margins[1], size[1])
    return [left, top, max(right - left, 0.0), max(bottom - top, 0.0)]


def coco_document(labels: OwnLabels, images: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """COCO-keypoints JSON of some of the pictures and their people."""
    wanted = {image["id"] for image in images}
    category = {
        "id": 1,
        "name": "person",
        "keypoints": list(names[: labels.num_keypoints]),  # COCO-WholeBody's others have fields of their own
        "skeleton": [[a + 1, b + 1] for a, b in labels.edges],
    }
    people = [{**person, "category_id": 1} for person in labels.people if person["image_id"] in wanted]
    return {"images": list(images), "annotations": people, "categories": [category]}
