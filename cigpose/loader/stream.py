"""The plain way to read shards: a webdataset pipeline of pictures and their persons, for models that are not ours.

Tars are read through, member after member, as webdataset does; every shard is compared with its index and its samples
are counted while they pass. Training reads the same way (`feed`), in an order that is planned: the same number of steps
on every rank and a start anywhere in an epoch need more than a stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from cigpose.files.cache import ShardCache
from cigpose.loader.crops import decode_picture
from cigpose.loader.samples import read_record, read_shard
from cigpose.loader.shards import ShardSet, open_address

Pair = tuple[np.ndarray, list[dict[str, Any]]]


def stream_pictures(
    address: str | Path,
    *,
    shuffle: int = 0,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    cache: str | None = None,
) -> wds.FluidWrapper:
    """A webdataset pipeline of (picture, persons): iterate over it, go on with `.map` or `.batched`, give it to torch.

    Pictures are (H, W, 3) uint8 RGB, turned by their EXIF orientation; persons are the records of docs/shards.md: `id`,
    `bbox_xyxy`, `keypoints` (K lists of x, y, v) in pixels of the picture, `area`. Every picture comes once, over all
    ranks and over all processes of a DataLoader, which share whole shards: with fewer shards than readers some get
    none, and their numbers of pictures differ.

    Args:
        address: folder of the shards, or its s3:// or http(s):// address.
        shuffle: pictures held for shuffling, of shards in random order; 0 keeps the order of the dataset.
        seed: with `epoch` and `rank` it decides the order.
        epoch: build a pipeline for each.
        rank: this reader.
        world: number of readers.
        cache: folder for remote shards; None: the user's cache directory.

    Raises:
        FileNotFoundError: the index is missing; while iterating a shard.
        DataError: the index cannot be used; while iterating a shard or picture that is damaged, cut or another one.
        OSError: while iterating, a shard that cannot be fetched.
    """
    shards = open_address(str(address), cache=ShardCache(cache))
    numbers = list(range(len(shards.index.shards)))
    if shuffle:
        random.Random(f"shards {seed} {epoch}").shuffle(numbers)
    return wds.FluidWrapper(partial(iter, numbers[rank::world])).compose(
        wds.split_by_worker,
        partial(_read, shards),
        partial(_shuffled, shuffle, f"pictures {seed} {epoch} {rank}"),
        wds.map(decode_sample),
    )


def _read(shards: ShardSet, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        yield from read_shard(shards, number)


def _shuffled(size: int, seed: str, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Begun anew with each iteration, so that a pipeline gives the same order again."""
    return wds.shuffle(size, initial=size // 8, rng=random.Random(seed))(samples) if size else samples


def decode_sample(sample: dict[str, Any]) -> Pair:
    """Picture (H, W, 3) uint8 RGB and persons of a sample of `read_shard`.

    Raises:
        DataError: its record is not JSON, or its picture cannot be decoded or has another size than the record says.
    """
    record = read_record(sample)
    where = f"{sample['__url__']}: {sample['__key__']}.jpg"
    return decode_picture(where, sample["jpg"], 1, (record["width"], record["height"])), record["persons"]
