"""The plain way to read shards: a webdataset pipeline of pictures and their persons, for models that are not ours.

Tars are read through, member after member, as webdataset does; every shard is compared with its index before anything
of it is given, and its samples are counted while they pass. Training has its own loader (`batches`): the same number of
steps on every rank and a start anywhere in an epoch need more than a stream.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from cigpose.files.cache import ShardCache
from cigpose.files.errors import DataError
from cigpose.loader.crops import decode_picture
from cigpose.loader.shards import AGAIN, ShardSet, check_counts, count_people, open_address

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
        FileNotFoundError: the index or a shard is missing.
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


def read_shard(shards: ShardSet, number: int) -> Iterator[dict[str, Any]]:
    """The samples of one shard as they are: `__key__`, `__url__` (the tar's path), `jpg` and `json` bytes.

    Raises:
        DataError: the tar is not the one the index lists, or does not hold what it says.
        OSError: it cannot be read or fetched.
    """
    path, entry = shards.fetch(number), shards.index.shards[number]
    images = persons = detections = 0
    for sample in _samples(path):
        if odd := {"jpg", "json"} - sample.keys():
            raise DataError(f"{path}: {sample['__key__']} has no .{min(odd)} beside it. {AGAIN}")
        num_persons, num_detections = count_people(sample["json"])
        images, persons, detections = images + 1, persons + num_persons, detections + num_detections
        yield sample
    check_counts(path, entry, images=images, persons=persons, detections=detections)


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        except (tarfile.TarError, ValueError) as err:
            raise DataError(f"{path}: cannot be read as a tar: {err.args[0]}. {AGAIN}") from err


def read_record(sample: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a sample of `read_shard`.

    Raises:
        DataError: it is not JSON.
    """
    try:
        record: dict[str, Any] = orjson.loads(sample["json"])
    except orjson.JSONDecodeError as err:
        raise DataError(f"{sample['__url__']}: {sample['__key__']}.json is not JSON ({err}). {AGAIN}") from err
    return record


def decode_sample(sample: dict[str, Any]) -> Pair:
    """Picture (H, W, 3) uint8 RGB and persons of a sample of `read_shard`.

    Raises:
        DataError: its record is not JSON, or its picture cannot be decoded or has another size than the record says.
    """
    record = read_record(sample)
    where = f"{sample['__url__']}: {sample['__key__']}.jpg"
    return decode_picture(where, sample["jpg"], 1, (record["width"], record["height"])), record["persons"]
