"""The loader as it was before it read through webdataset: tables of where every member of a tar lies, and `pread`.

Kept for `bench_loader.py`: what reading costs, and how well an epoch was mixed. Shards are taken in pools of eight, the
pictures of a pool in random order; arrivals then pass a shuffle buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cigpose.config import Config
from cigpose.files.archives import Extent, list_members
from cigpose.files.digest import sha256_of
from cigpose.loader.crops import CropMaker, WantedPicture
from cigpose.loader.samples import count_people
from cigpose.loader.shards import ShardSet

POOL = 8


@cache
def table(path: Path, sha256: str) -> list[tuple[str, Extent, Extent, int]]:
    """(key, JPEG, record, persons) of every picture of a tar, which is verified first."""
    assert sha256_of(path) == sha256
    members = list_members(path)
    with path.open("rb") as file:
        rows = []
        for name, jpeg in members.items():
            if name.endswith(".jpg"):
                record = members[f"{name.removesuffix('.jpg')}.json"]
                num = count_people(os.pread(file.fileno(), record.size, record.offset))[0]
                rows.append((name.removesuffix(".jpg"), jpeg, record, num))
    return rows


def shuffled_positions(num_persons: int, buffer: int, rng: np.random.Generator) -> np.ndarray:
    """Where each arrival leaves a shuffle buffer that grows and shrinks by half a person an arrival."""
    arrivals = np.arange(num_persons)
    capacity = np.minimum(buffer, buffer // 8 + np.minimum(arrivals, arrivals[::-1]) // 2)
    draws = rng.random(num_persons)
    positions = np.empty(num_persons, dtype=np.int64)
    held: list[int] = []
    position = 0
    for arrival, limit in enumerate(capacity.tolist()):
        held.append(arrival)
        while len(held) > limit:
            chosen = int(draws[position] * len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            positions[held.pop()] = position
            position += 1
    rng.shuffle(held)
    positions[held] = np.arange(position, num_persons)
    return positions


def arrivals_of(counts: list[np.ndarray], seed: int) -> Iterator[tuple[int, int]]:
    """(shard, picture) in the order of one rank's epoch, given the persons of every picture of every shard."""
    order = np.random.default_rng([0, seed]).permutation(len(counts)).tolist()
    for start in range(0, len(order), POOL):
        places = [(shard, i) for shard in order[start : start + POOL] for i in range(len(counts[shard]))]
        for chosen in np.random.default_rng([1, seed, start]).permutation(len(places)).tolist():
            yield places[chosen]


def offset_batches(config: Config, shards: ShardSet, batch: int) -> Iterator[dict[str, Any]]:
    """One rank's first epoch."""
    tables = [table(Path(shards.address) / entry.name, entry.sha256) for entry in shards.index.shards]
    counts = [np.array([row[3] for row in rows]) for rows in tables]
    total, maker = int(sum(map(np.sum, counts))), CropMaker(config, epoch=0)
    positions = shuffled_positions(total, config.train.loader.shuffle_buffer, np.random.default_rng(2))
    sizes = np.minimum(batch, total - np.arange(0, total, batch))
    filling: dict[int, dict[str, Any]] = {}
    missing, turn, arrival = sizes.copy(), 0, 0
    files = [os.open(Path(shards.address) / entry.name, os.O_RDONLY) for entry in shards.index.shards]
    for shard, i in arrivals_of(counts, 0):
        key, jpeg, record, num = tables[shard][i]
        sample = {
            "__key__": key,
            "__url__": str(shards.address),
            "jpg": os.pread(files[shard], jpeg.size, jpeg.offset),
            "json": os.pread(files[shard], record.size, record.offset),
        }
        places, members = tuple(positions[arrival : arrival + num].tolist()), tuple(range(num))
        crops = maker.make([WantedPicture(shards.dataset, shard, sample, members, members, places, members)])
        arrival += num
        for row, place in enumerate(places):
            number, at = divmod(place, batch)
            if number not in filling:
                empty = {n: np.empty((sizes[number], *a.shape[1:]), a.dtype) for n, a in crops.arrays.items()}
                filling[number] = {**empty, "keys": [""] * int(sizes[number])}
            for name, array in crops.arrays.items():
                filling[number][name][at] = array[row]
            filling[number]["keys"][at] = crops.keys[row]
            missing[number] -= 1
        while turn < len(sizes) and missing[turn] == 0:
            yield {n: v if n == "keys" else torch.from_numpy(v) for n, v in filling.pop(turn).items()}
            turn += 1
    for file in files:
        os.close(file)
