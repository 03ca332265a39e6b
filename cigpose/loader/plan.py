"""Who gets which person when: the order of an epoch, from the counts in the index alone.

An epoch is planned before anything is read, as a function of (seed, epoch, rank, world) and the shards' counts:

1. The shards of all datasets are permuted. Their persons, end to end, are cut into one contiguous range per rank, and
   each range into S contiguous *streams* of equal length (within one person). A shard may be shared by streams, at a
   person (`Segment`).
2. The streams of a rank are taken in turn, a person of each: the i-th person of stream s has *slot* i S + s of the
   rank's epoch. So S shards are always mixed, and the persons of one picture lie S slots apart.
3. Slots pass a shuffle buffer. Which slot leaves it when needs no pictures to be known: `Shuffle`.

Because a person's place in the epoch is known before it is decoded, whoever reads a stream knows where its crops
belong: the number of processes that read cannot change a batch, and an epoch can be entered at any batch by passing
over pictures whose persons all came before it. Nothing here is as long as the epoch: segments are as many as the rank's
shards, and the buffer's order is worked out a few thousand slots at a time.

A training epoch holds every person exactly once. All batches are full but those of the last optimiser step, which share
what is left evenly; a rest too small to give every rank one person joins the step before (`train_batch_sizes`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SHARDS, _BUFFER = 0, 2
"""First number of a generator's seed: what it is used for."""
_BLOCK = 4096
"""Fewest slots whose order is worked out at a time."""

Counts = Mapping[str, np.ndarray]
"""Dataset -> (N,) persons (or, in evaluation on detected boxes, detections) of each of its shards."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Persons `first` (included) to `last` (excluded) of a shard, in the order of the file."""

    dataset: str
    number: int
    """Position of the shard in the dataset's index."""
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Stream:
    """What is read in turn with the other streams of a rank."""

    segments: tuple[Segment, ...]
    first_person: int
    """Number of its first person in the whole order."""


class Shuffle:
    """Where each slot leaves a shuffle buffer: a permutation of the slots that is never held as a whole.

    Each slot draws how many slots it waits, up to the size of the buffer; they leave in the order of slot plus wait. So
    none is moved by more than `reach`, and most are by less than half of it. The first waits are short, so that the
    first batch does not wait for a full buffer.
    """

    def __init__(self, num_slots: int, buffer: int, seed: Sequence[int]) -> None:
        """The order of an epoch.

        Args:
            num_slots: persons of the epoch.
            buffer: longest wait; 0 keeps the order.
            seed: of the draws.
        """
        self.num_slots = num_slots
        self.reach = buffer
        self._start = buffer // 8
        self._seed = tuple(seed)
        self._size = max(self.reach, _BLOCK)
        self._places = functools.lru_cache(maxsize=2)(self._places_of_block)
        self._times = functools.lru_cache(maxsize=3)(self._times_of_block)

    def __getitem__(self, slots: Sequence[int] | range) -> list[int]:
        """The places in the epoch of some slots."""
        if not self.reach:
            return list(slots)
        found = (divmod(slot, self._size) for slot in slots)
        return [int(self._places(block)[i]) for block, i in found]

    def last_slot_of(self, places: int) -> int:
        """The last of the slots that have the first so many places: when it has come, they all have."""
        if not self.reach:
            return places - 1
        block = min(places - 1 + self.reach, self.num_slots - 1) // self._size
        found = np.flatnonzero(self._places(block) < places)
        if not len(found):
            block -= 1
            found = np.flatnonzero(self._places(block) < places)
        return block * self._size + int(found[-1])

    def _places_of_block(self, block: int) -> np.ndarray:
        """Who leaves before a block's slots is in it, in the blocks beside it, or in those before: all of these."""
        first = max(block - 1, 0)
        times = [self._times(number) for number in range(first, block + 2)]
        ranks = np.argsort(np.argsort(np.concatenate(times), kind="stable"), kind="stable")
        begin = sum(map(len, times[: block - first]))
        return first * self._size + ranks[begin : begin + len(times[block - first])]

    def _times_of_block(self, block: int) -> np.ndarray:
        slots = np.arange(block * self._size, min((block + 1) * self._size, self.num_slots))
        draws = np.random.default_rng([_BUFFER, *self._seed, block]).random(self._size)
        return slots + draws[: len(slots)] * np.minimum(self.reach, self._start + slots)


@dataclass(frozen=True)
class RankPlan:
    """What one rank reads, and where each of its persons stands in the epoch."""

    streams: tuple[Stream, ...]
    num_persons: int
    batch_sizes: np.ndarray
    """(num_batches,) persons of each batch."""
    places: Shuffle
    """Slot -> place in the rank's epoch."""

    @property
    def batch_starts(self) -> np.ndarray:
        """(num_batches + 1,) place of each batch's first person, and the end."""
        return np.concatenate([[0], np.cumsum(self.batch_sizes)])


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


def train_plan(
    counts: Counts,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    batch: int,
    accumulate: int,
    streams: int,
    buffer: int,
) -> RankPlan:
    """One rank's part of a training epoch.

    Args:
        counts: persons of all shards, with the datasets in the same order on every rank.
        seed: seed of the run.
        epoch: epoch from 0.
        rank: this worker.
        world: number of workers.
        batch: persons of a full batch.
        accumulate: batches of an optimiser step.
        streams: shards read side by side.
        buffer: persons held for shuffling.

    Raises:
        ValueError: too few persons for one in every batch of a step.
    """
    shards = _Shards(counts)
    sizes = train_batch_sizes(shards.total, batch=batch, world=world, accumulate=accumulate)
    ends = np.cumsum(sizes.sum(axis=0)).tolist()
    first, last = ([0, *ends])[rank], ends[rank]
    shards.permute(np.random.default_rng([_SHARDS, seed, epoch]))
    return RankPlan(
        streams=shards.cut(first, last, streams),
        num_persons=last - first,
        batch_sizes=sizes[:, rank],
        places=Shuffle(last - first, buffer, (seed, epoch, rank)),
    )


def eval_plan(counts: Counts, *, rank: int, world: int, batch: int, streams: int) -> RankPlan:
    """One rank's part of an evaluation: its share of the persons in the order of the files, each exactly once.

    Shares differ by at most one person; with more ranks than persons some are empty.
    """
    shards = _Shards(counts)
    first, last = shards.total * rank // world, shards.total * (rank + 1) // world
    num = last - first
    return RankPlan(
        streams=shards.cut(first, last, streams),
        num_persons=num,
        batch_sizes=np.array([min(batch, num - start) for start in range(0, num, batch)], dtype=np.int64),
        places=Shuffle(num, 0, ()),
    )


class _Shards:
    """The shards of all datasets, end to end."""

    def __init__(self, counts: Counts) -> None:
        self._datasets = list(counts)
        sizes = [len(persons) for persons in counts.values()]
        self._persons = np.concatenate([np.asarray(persons, dtype=np.int64) for persons in counts.values()])
        self._dataset = np.repeat(np.arange(len(sizes)), sizes)
        self._number = np.concatenate([np.arange(size) for size in sizes])
        self._ends = np.cumsum(self._persons)
        self.total = int(self._persons.sum())

    def permute(self, rng: np.random.Generator) -> None:
        order = rng.permutation(len(self._persons))
        self._persons, self._dataset, self._number = (
            column[order] for column in (self._persons, self._dataset, self._number)
        )
        self._ends = np.cumsum(self._persons)

    def cut(self, first: int, last: int, streams: int) -> tuple[Stream, ...]:
        """The streams of a rank's persons. The first ones are the longer ones, so that slots have no gaps."""
        length, longer = divmod(last - first, streams)
        ends = first + length * np.arange(streams + 1) + np.minimum(np.arange(streams + 1), longer)
        bounds = itertools.pairwise(ends.tolist())
        return tuple(Stream(self._segments(a, b), a) for a, b in bounds)

    def _segments(self, first: int, last: int) -> tuple[Segment, ...]:
        begin, end = np.searchsorted(self._ends, [first, last], side="right") if first < last else (0, 0)
        found = []
        for i in range(int(begin), min(int(end) + 1, len(self._ends))):
            start = int(self._ends[i] - self._persons[i])
            a, b = max(first - start, 0), min(last - start, int(self._persons[i]))
            if a < b:
                found.append(Segment(self._datasets[self._dataset[i]], int(self._number[i]), a, b))
        return tuple(found)
