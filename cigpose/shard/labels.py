"""annotations.json beside the shards: COCO-format ground truth of a whole split, for pycocotools and our evaluation."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson

from cigpose.files.atomic import written_file
from cigpose.keypoints import KeypointSet
from cigpose.shard.intake import Intake


def write_ground_truth(intake: Intake, path: Path, lost: Collection[int]) -> None:
    """Write every picture and every readable annotation of the split, crowds included, with their original fields.

    Annotations keep the bytes they had in the source; sizes of pictures are the true ones.

    Args:
        intake: all of the split.
        path: of the file.
        lost: ids of images that could not be read; they are left out with their persons.
    """
    assert intake.ground_truth_file is not None
    with (
        written_file(path) as part,
        part.open("wb") as file,
        intake.ground_truth_file.open("rb") as annotations,
    ):
        file.write(b'{"annotations":[\n')
        for i, (offset, length) in enumerate(intake.truths(lost)):
            annotations.seek(offset)
            file.write(b",\n" if i else b"")
            file.write(annotations.read(length))
        file.write(b'\n],\n"categories":')
        file.write(orjson.dumps(intake.categories or [_category(intake.keypoints)]))
        file.write(b',\n"images":[\n')
        kept = (
            entry
            for picture, entry in zip(intake.pictures, intake.image_fields, strict=True)
            if picture.image_id not in lost
        )
        for i, entry in enumerate(kept):
            file.write((b",\n" if i else b"") + entry)
        file.write(b"\n]}\n")


def _category(keypoints: KeypointSet) -> dict[str, Any]:
    """For files that list no categories (UBody): the one there is, as COCO writes it."""
    lines = [[a + 1, b + 1] for a, b in keypoints.lines]
    return {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(keypoints.names), "skeleton": lines}
