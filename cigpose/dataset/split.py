"""Which pictures are trained on and which measured on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from cigpose.dataset.labels import OwnLabels, is_labelled
from cigpose.files.errors import DataError

LEAST_SHARE, LARGEST_SHARE, WANTED_PEOPLE = 0.1, 0.3, 200
"""A tenth is held out; of few people more, until an AP over them tells something, but never half of all work."""


def held_out_share(num_people: int) -> float:
    """The share of pictures to measure on, for so many people."""
    return min(LARGEST_SHARE, max(LEAST_SHARE, WANTED_PEOPLE / max(num_people, 1)))


def split_pictures(
    labels: OwnLabels, share: float, by: Literal["picture", "folder"] = "picture"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pictures to train on, and to measure on; those with nobody stay with the former.

    Where the labels say the side of each picture, that is it. Else a picture's name decides, so that one that joins
    later moves no other.

    Args:
        labels: of both.
        share: of the pictures (folders) to measure on.
        by: `folder` keeps the pictures of a folder together: frames of a video, photographs of one day.

    Raises:
        DataError: a side is left without people.
    """
    chance = {image["id"]: _chance(_unit(image["file_name"], by)) for image in labels.images}
    is_said = bool(labels.sides) and {labels.sides.get(image["file_name"]) for image in labels.images} >= {
        "train",
        "val",
    }
    train: list[dict[str, Any]] = []
    val: list[dict[str, Any]] = []
    for image in labels.images:
        to_val = labels.sides.get(image["file_name"]) == "val" if is_said else chance[image["id"]] < share
        (val if to_val else train).append(image)
    peopled = {person["image_id"] for person in labels.people if is_labelled(person)}
    for side, images in (("train", train), ("val", val)):
        if not any(image["id"] in peopled for image in images):
            units = len({_unit(image["file_name"], by) for image in labels.images})
            raise DataError(
                f"{labels.source}: no people are left to {'train' if side == 'train' else 'measure'} on when {units} "
                f"{by}s are split {1 - share:.0%} to {share:.0%}. Give another --val-share, or a file as --val."
            )
    return train, val


def refuse_shared_pictures(train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]], where: str) -> None:
    """See that nobody is measured on a picture that was trained on.

    Raises:
        DataError: a picture is on both sides.
    """
    counts = Counter(image["file_name"] for image in (*train, *val))
    shared = [name for name, count in counts.items() if count > 1]
    if shared:
        raise DataError(
            f"{where}: {len(shared)} of its pictures are trained on too, such as {shared[0]}: its AP would mean "
            "nothing. Take them out of one of the two files."
        )


def _unit(file_name: str, by: str) -> str:
    return str(PurePosixPath(file_name).parent) if by == "folder" else file_name


def _chance(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
