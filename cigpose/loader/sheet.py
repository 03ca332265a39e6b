"""What a dataset's shards hold, in words and as a contact sheet of what training makes of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice, pairwise

import cv2
import numpy as np

from cigpose.config import Config
from cigpose.draw import draw_poses, label_picture, pack_pictures
from cigpose.files.errors import DataError
from cigpose.loader.crops import CropMaker, WantedPicture
from cigpose.loader.samples import read_persons, read_record, read_shard
from cigpose.loader.shards import ShardSet
from cigpose.shard.index import ShardIndex

TILE_HEIGHT = 384
MAX_SHARDS = 4
"""Shards looked into for the sheet."""
LOOKED_AT = 200
"""Pictures at the beginning of each whose order is looked at."""
MANY, MORE_THAN_CHANCE = 0.6, 0.2
"""Share of pictures behind their like from which a shuffle is advised; by how much it exceeds a random order's."""
_NUMBERED = re.compile(r"(.*?)(\d*)(\.[^./]*)?", re.DOTALL)


def describe(index: ShardIndex) -> str:
    """What the index says, as lines of text."""
    size = sum(shard.bytes for shard in index.shards)
    lines = [
        f"{index.dataset}: {index.num_keypoints} keypoints ({index.keypoints}), format {index.format}",
        f"  {len(index.shards):>9,} shards, {size / 1e6:,.1f} MB",
        f"  {index.images:>9,} images",
        f"  {index.persons:>9,} persons, {index.persons / max(index.images, 1):.2f} an image",
        f"  {index.detections:>9,} detections",
        f"  ground truth: {index.ground_truth or 'none'}",
    ]
    for title, counts in (("left out", index.dropped), ("mended", index.mended)):
        lines += [f"  {title}: {count:,} {reason}" for reason, count in counts.items()]
    if index.bad.get("count"):
        lines.append(f"  unreadable: {index.bad['count']:,}, such as {'; '.join(index.bad.get('examples', []))}")
    lines += [f"  from {file}: sha256 {digest[:16]}..." for file, digest in index.sources.items()]
    return "\n".join(lines)


def describe_order(shards: ShardSet) -> str | None:
    """A sentence if like stands beside like in the shards, as the frames of videos do, so that batches mix badly.

    Raises:
        DataError: a shard is damaged.
        OSError: one cannot be read or fetched.
    """
    names = []
    for number in np.unique(np.linspace(0, len(shards.index.shards) - 1, MAX_SHARDS).astype(int)).tolist():
        with closing(read_shard(shards, number)) as samples:
            names.append([str(read_record(sample).get("file_name", "")) for sample in islice(samples, LOOKED_AT)])
    share = share_behind_their_like(names)
    if share is None:
        return None
    return (
        f"  order: {share:.0%} of the pictures stand behind the one before of their folder or video; with "
        "data.sharding.shuffle: true batches mix them better"
    )


def share_behind_their_like(names: Sequence[Sequence[str]]) -> float | None:
    """Share of pictures that follow the one before them of one source, if these are many.

    Args:
        names: of the pictures of some shards, in order. What stands before the last number names the source; when
            shuffled, half of the neighbours of one source are in the order of their numbers.

    Returns: None if they are few, or hardly more than in a random order, as with a single source.
    """
    parsed = [[(found[1], int(found[2] or 0)) for found in map(_NUMBERED.fullmatch, shard) if found] for shard in names]
    behind = [one[0] == other[0] and one[1] < other[1] for shard in parsed for one, other in pairwise(shard)]
    sources = Counter(source for shard in parsed for source, _ in shard)
    by_chance = sum(count**2 for count in sources.values()) / max(sources.total(), 1) ** 2
    share = sum(behind) / max(len(behind), 1)
    return share if share > max(MANY, by_chance + MORE_THAN_CHANCE) else None


def contact_sheet(shards: ShardSet, config: Config, *, num_persons: int, seed: int = 0) -> np.ndarray:
    """Crops of persons drawn by chance: for evaluation, and augmented by each stage.

    Args:
        shards: the dataset.
        config: crop size, augmentation and keypoints.
        num_persons: persons on the sheet.
        seed: of the choice.

    Returns: uint8 (H, W, 3) BGR, three tiles a person.

    Raises:
        DataError: the dataset holds no persons, or a shard or picture is damaged.
    """
    pictures = _choose(shards, num_persons, seed)
    stages = [("as it is", None), ("stage 1", 0), ("stage 2", config.augmentation.stage2_from_epoch)]
    columns = []
    for title, epoch in stages:
        crops = CropMaker(config, epoch=epoch).make(pictures)
        arrays = crops.arrays
        columns.append(
            [
                _tile(crop, points, visible, config, f"{title} {key.rpartition('/')[2] if epoch is None else ''}")
                for crop, points, visible, key in zip(
                    arrays["crops"], arrays["keypoints"], arrays["visible"], crops.keys, strict=True
                )
            ]
        )
    groups = [np.hstack(tiles) for tiles in zip(*columns, strict=True)]
    return pack_pictures(groups)


def _choose(shards: ShardSet, num_persons: int, seed: int) -> list[WantedPicture]:
    """Persons of a few shards, each with its image, without repetition."""
    rng = np.random.default_rng(seed)
    filled = [number for number, entry in enumerate(shards.index.shards) if entry.persons]
    if not filled:
        raise DataError(f"{shards.address}: holds no persons. Shard it again from the right annotations.")
    numbers = rng.permutation(filled)[:MAX_SHARDS].tolist()
    ends = np.cumsum([shards.index.shards[number].persons for number in numbers])
    chosen = np.sort(rng.permutation(ends[-1])[:num_persons])
    pictures: list[WantedPicture] = []
    for number, end in zip(numbers, ends.tolist(), strict=True):
        start = end - shards.index.shards[number].persons
        wanted = (chosen[(chosen >= start) & (chosen < end)] - start).tolist()
        pictures += _pictures_of(shards, number, wanted) if wanted else []
    return pictures


def _pictures_of(shards: ShardSet, number: int, wanted: list[int]) -> Iterator[WantedPicture]:
    """The image of each of some persons of a shard, who are given by their places in it, in order."""
    persons = read_persons(shards, number, 0, wanted[-1] + 1)
    members = ((sample, place) for sample, places in persons for place in places)
    for person, (sample, place) in enumerate(members):
        if person in wanted:
            one = {"persons": (place,), "slots": (person,), "places": (person,), "numbers": (person,)}
            yield WantedPicture(dataset=shards.dataset, shard=number, sample=sample, **one)


def _tile(crop: np.ndarray, keypoints: np.ndarray, visible: np.ndarray, config: Config, text: str) -> np.ndarray:
    """A crop (H, W, 3) RGB, enlarged, with its visible keypoints and a line of text; BGR."""
    factor = TILE_HEIGHT / crop.shape[0]
    image = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), None, fx=factor, fy=factor)
    points = (keypoints[None] + 0.5) * factor - 0.5
    return label_picture(draw_poses(image, points, visible[None], config.keypoint_set), text.strip())
