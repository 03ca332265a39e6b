"""Reader of CrowdPose: COCO-like JSON, whose early train and test files swap width and height."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cigpose.config import DatasetConfig
from cigpose.files.archives import Extent, ExtentReader
from cigpose.files.errors import DataError
from cigpose.files.jpeg import jpeg_size
from cigpose.shard.formats.coco import read_coco
from cigpose.shard.intake import Intake

_HEAD = 1 << 16


def read_crowdpose(dataset: DatasetConfig, raw: Path, intake: Intake) -> None:
    """Read a CrowdPose split into `intake`, as `read_coco`; a swapped picture size is put right and counted.

    Boxes are clipped to the picture, so the size must be known before the persons are read: that of every picture is
    looked up in its own header.

    Raises:
        FileNotFoundError: a file or archive member is not there.
        DataError: a file cannot be read as a whole; single bad entries are counted by `intake`.
    """
    with ExtentReader() as reader:

        def true_size(entry: dict[str, Any], source: Extent) -> tuple[int, int]:
            size = (int(entry["width"]), int(entry["height"]))
            swapped = (size[1], size[0])
            return swapped if swapped != size and _size(reader, source) == swapped else size

        read_coco(dataset, raw, intake, true_size)


def _size(reader: ExtentReader, source: Extent) -> tuple[int, int] | None:
    """Size of a picture from its header; None if it cannot be told, which the shard writer will say."""
    try:
        try:
            return jpeg_size(reader.head(source, _HEAD))
        except DataError:
            return jpeg_size(reader.read(source))
    except DataError:
        return None
