"""Who gets which person when: the order of an epoch, from the counts in the index alone.

An epoch is planned before anything is read, as a function of (seed, epoch, rank, world) and the shards' counts:

1. The shards of all datasets are permuted. Their persons, end to end, are cut into one contiguous range per rank, so a
   shard may be shared by ranks, at a person (`Segment`).
2. A rank reads its segments in *pools* of a few shards; the pictures of a pool come in random order (`loader`), each
   with all of its persons. Numbering persons as they come gives their *arrival* 0, 1, 2, ...
3. Arrivals pass a shuffle buffer. Which arrival leaves it when needs no pictures to be known: `shuffled_positions`.

Because a person's place in the epoch is known before it is decoded, an epoch can be entered at any batch by skipping
pictures whose persons all came before it, and the number of processes that decode cannot change a batch.

A training epoch holds every person exactly once. All batches are full but those of the last optimiser step, which share
what is left evenly; a rest too small to give every rank one person joins the step before (`train_batch_sizes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARDS, _PICTURES, _BUFFER = range(3)
"""First number of a generator's seed: what it is used for."""


@dataclass(frozen=True, slots=True)
class ShardCount:
    """One shard as the plan sees it."""

    dataset: str
    number: int
    """Position in the dataset's index."""
    persons: int
    """Persons, or detections in evaluation on detected boxes."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Persons `first` (included) to `last` (excluded) of a shard, in the order of the file."""

    dataset: str
    number: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class RankPlan:
    """What one rank reads, and where each of its persons stands in the epoch."""

    segments: tuple[Segment, ...]
    first_person: int
    """Number of the rank's first person in the whole order."""
    batch_sizes: np.ndarray
    """(num_batches,) persons of each batch."""
    positions: np.ndarray
    """(persons,) place in the rank's output of the i-th person to arrive."""

    @property
    def batch_starts(self) -> np.ndarray:
        """(num_batches + 1,) position of each batch's first person, and the end."""
        return np.concatenate([[0], np.cumsum(self.batch_sizes)])

    def pools(self, num_shards: int) -> list[tuple[int, tuple[Segment, ...]]]:
        """The segments in groups of `num_shards`, each with the arrival of its first person."""
        groups, arrival = [], 0
        for start in range(0, len(self.segments), num_shards):
            group = self.segments[start : start + num_shards]
            groups.append((arrival, group))
            arrival += sum(map(len, group))
        return groups


def train_batch_sizes(total: int, *, batch: int, world: int, accumulate: int = 1) -> np.ndarray:
    """Persons in every batch of every rank of a training epoch.

    Args:
        total: persons in all.
        batch: persons of a full batch.
        world: number of ranks.
        accumulate: batches of an optimiser step; the number of batches is a multiple of it.

    Returns: (num_batches, world) int64; sums to `total`, no entry is 0.

    Raises:
        ValueError: there are not enough persons for one in every batch of a step.
    """
    shares = world * accumulate
    if total < shares:
        raise ValueError(
            f"The training data hold {total} persons, but {world} workers x {accumulate} accumulation steps need at"
            f" least {shares}. Use fewer workers."
        )
    full, rest = divmod(total, shares * batch)
    steps = [shares * batch] * full
    if rest >= shares:
        steps.append(rest)
    elif rest:
        steps[-1] += rest
    share = np.arange(shares)
    sizes = np.stack([step // shares + (share < step % shares) for step in steps])
    return sizes.reshape(len(steps) * accumulate, world)


def _cut(shards: Sequence[ShardCount], first: int, last: int) -> tuple[Segment, ...]:
    """The segments that hold persons `first` to `last` of the shards laid end to end."""
    segments, start = [], 0
    for shard in shards:
        begin, end = max(first - start, 0), min(last - start, shard.persons)
        if begin < end:
            segments.append(Segment(shard.dataset, shard.number, begin, end))
        start += shard.persons
    return tuple(segments)


def shuffled_positions(num_persons: int, buffer: int, rng: np.random.Generator) -> np.ndarray:
    """Where each arrival leaves a shuffle buffer.

    The buffer grows and shrinks by half a person an arrival, from and to an eighth of its size, so that the first batch
    does not wait for a full buffer and the last one is not far behind the last picture.

    Args:
        num_persons: number of arrivals.
        buffer: most persons held at a time; 0 keeps the order.
        rng: generator of the draws.

    Returns: (num_persons,) int64, a permutation: position of each arrival.
    """
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


def train_plan(
    shards: Sequence[ShardCount],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    batch: int,
    accumulate: int,
    buffer: int,
) -> RankPlan:
    """One rank's part of a training epoch.

    Args:
        shards: all shards of all datasets, in the same order on every rank.
        seed: seed of the run.
        epoch: epoch from 0.
        rank: this worker.
        world: number of workers.
        batch: persons of a full batch.
        accumulate: batches of an optimiser step.
        buffer: persons held for shuffling.

    Raises:
        ValueError: too few persons for one in every batch of a step.
    """
    permuted = [shards[i] for i in np.random.default_rng([_SHARDS, seed, epoch]).permutation(len(shards))]
    sizes = train_batch_sizes(sum(s.persons for s in shards), batch=batch, world=world, accumulate=accumulate)
    ends = np.cumsum(sizes.sum(axis=0)).tolist()
    first, last = ([0, *ends])[rank], ends[rank]
    return RankPlan(
        segments=_cut(permuted, first, last),
        first_person=first,
        batch_sizes=sizes[:, rank],
        positions=shuffled_positions(last - first, buffer, np.random.default_rng([_BUFFER, seed, epoch, rank])),
    )


def picture_rng(seed: int, epoch: int, rank: int, pool: int) -> np.random.Generator:
    """The generator that orders the pictures of a pool."""
    return np.random.default_rng([_PICTURES, seed, epoch, rank, pool])


def eval_plan(shards: Sequence[ShardCount], *, rank: int, world: int, batch: int) -> RankPlan:
    """One rank's part of an evaluation: its share of the persons in the order of the files, each exactly once.

    Shares differ by at most one person; with more ranks than persons some are empty.
    """
    total = sum(shard.persons for shard in shards)
    first, last = total * rank // world, total * (rank + 1) // world
    num = last - first
    return RankPlan(
        segments=_cut(shards, first, last),
        first_person=first,
        batch_sizes=np.array([min(batch, num - start) for start in range(0, num, batch)], dtype=np.int64),
        positions=np.arange(num),
    )
