"""A picture of a dataset, and where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass

from cigpose.files.archives import Extent


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture inside a video."""

    clip: Extent
    index: int
    """From 0, at 30 frames per second."""


@dataclass(slots=True)
class Picture:
    """One image of the dataset; its place in `Intake.pictures` is its order."""

    key: str
    """Name of its members in the shards: unique, without dots."""
    image_id: int
    file_name: str
    width: int
    height: int
    source: Extent | Frame | None
    """None: listed, but nowhere to be found."""
