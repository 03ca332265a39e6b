"""A user's data where the stages look for them: data/raw/NAME, made of links to the pictures and labels as COCO JSON.

images/...         a link to each labelled picture (a zip: images.zip, one link)
train.json         labels to train on      val.json   labels to measure on
dataset.json       where they came from: what says that the folder is ours to write anew

Each picture has its link, not the folder: DVC does not look into folders behind links, and would not see a change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cigpose.dataset.labels import OwnLabels, coco_document, is_labelled
from cigpose.dataset.reading import Photographs
from cigpose.files.atomic import claimed, clear_leftovers, write_json, written_folder
from cigpose.files.errors import DataError

MARK = "dataset.json"
SIDES = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Side:
    """Pictures of one purpose and their labels."""

    labels: OwnLabels
    images: Sequence[dict[str, Any]]
    photographs: Photographs

    @property
    def people(self) -> list[dict[str, Any]]:
        """Who is on them and can be trained on."""
        wanted = {image["id"] for image in self.images}
        return [person for person in self.labels.people if person["image_id"] in wanted and is_labelled(person)]


def dataset_keys(name: str) -> tuple[str, str]:
    """Names in params.yaml of the two sides."""
    return f"{name}-train", f"{name}-val"


def datasets_of(name: str, sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """`data.datasets` of params.yaml for what `write_raw` writes."""
    return {
        key: {
            "raw": name,
            "reader": "coco",
            "images": _images_name(side, index, sides),
            "annotations": f"{SIDES[index]}.json",
            "ground_truth": index == 1,
        }
        for index, (key, side) in enumerate(zip(dataset_keys(name), sides, strict=True))
    }


def refuse_strangers(folder: Path) -> None:
    """See that a raw folder is not there, or was written by `write_raw`.

    Raises:
        DataError: it is somebody else's.
    """
    if folder.exists() and not (folder / MARK).is_file():
        raise DataError(
            f"{folder}: is there, and was not made by `cigpose dataset init`. Give another --name, or move it away."
        )


def write_raw(folder: Path, sides: Sequence[Side], names: Sequence[str], origin: Mapping[str, Any]) -> None:
    """Make data/raw/NAME, whole or not at all, in place of one that was made so.

    Args:
        folder: data/raw/NAME.
        sides: to train on, and to measure on.
        names: of the keypoints.
        origin: where they came from, kept in the folder.

    Raises:
        DataError: the folder is somebody else's.
        ClaimedError: another process makes it.
    """
    lock = folder.parent.with_name(f".raw-{folder.name}.lock")
    with claimed(lock, f"`cigpose dataset init` of {folder.name}"):
        clear_leftovers(folder)
        refuse_strangers(folder)
        with written_folder(folder) as part:
            for index, side in enumerate(sides):
                _link(part / _images_name(side, index, sides), side)
                document = coco_document(side.labels, side.images, names)
                (part / f"{SIDES[index]}.json").write_text(json.dumps(document), encoding="utf-8")
            write_json(part / MARK, dict(origin))


def _images_name(side: Side, index: int, sides: Sequence[Side]) -> str:
    is_shared = sides[0].photographs.path == sides[1].photographs.path
    stem = "images" if is_shared or index == 0 else "images-val"
    return stem if side.photographs.path.is_dir() else f"{stem}.zip"


def _link(target: Path, side: Side) -> None:
    source = side.photographs.path.absolute()
    if not source.is_dir():
        if not target.is_symlink():
            target.symlink_to(source)
        return
    for image in side.images:
        place = target / image["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            os.symlink(source / image["file_name"], place)
