"""The pictures of an epoch as they are due: the streams of a plan read through webdataset and taken in turn.

P processes share the S streams of a rank evenly: laid end to end, a P-th of them is each one's. A stream in which two
shares meet is read by both, and each decodes its part of the pictures; with P a divisor of S there is none. Whoever
reads a person knows its place in the epoch, so that nothing but the work depends on P.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import webdataset as wds

from cigpose.loader.crops import WantedPicture
from cigpose.loader.plan import RankPlan, Segment
from cigpose.loader.samples import PERSONS, read_persons
from cigpose.loader.shards import ShardSet

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are evenly spread however many there are."""


class Feed:
    """What is to be decoded from some place of a rank's epoch on."""

    def __init__(
        self, sets: Mapping[str, ShardSet], plan: RankPlan, *, first_place: int = 0, what: str = PERSONS
    ) -> None:
        """The epoch, or the rest of one.

        Args:
            sets: the datasets by name.
            plan: of the epoch.
            first_place: persons with places before it are passed over without being decoded.
            what: `persons` or `detections`.
        """
        self._sets = sets
        self._plan = plan
        self._first_place = first_place
        self._what = what
        self.first_slot = max(first_place - plan.places.reach, 0)
        """All slots before have places before `first_place`."""

    def pictures(self, process: int = 0, processes: int = 1) -> Generator[WantedPicture, None, None]:
        """The pictures that one of some processes has to decode, in the order of their first slots.

        Raises:
            DataError: a shard that is damaged, cut or another one.
            OSError: one that cannot be read or fetched.
        """
        num = len(self._plan.streams)
        mine = range(process * num // processes, -(-(process + 1) * num // processes))
        with ExitStack() as stack:  # a shard that is given up in the middle is closed, and not when memory is cleared
            streams = [stack.enter_context(closing(self._stream(n, process, processes))) for n in mine]
            yield from heapq.merge(*streams, key=lambda picture: picture.slots[0])

    def _stream(self, number: int, process: int, processes: int) -> Generator[WantedPicture, None, None]:
        """A process's pictures of a stream."""
        segments, person = self._segments(number)
        choose = partial(self._wanted, number, person, process, processes)
        yield from wds.DataPipeline(partial(iter, segments), self._read, choose)

    def _segments(self, number: int) -> tuple[list[Segment], int]:
        """What is left of a stream, and the place in it of the first person of that."""
        streams, stream = len(self._plan.streams), self._plan.streams[number]
        seen = max(-(-(self.first_slot - number) // streams), 0)
        left, position = [], 0
        for segment in stream.segments:
            passed = min(max(seen - position, 0), len(segment))
            if passed < len(segment):
                left.append(Segment(segment.dataset, segment.number, segment.first + passed, segment.last))
            position += len(segment)
        return left, seen

    def _read(self, segments: Iterable[Segment]) -> Iterator[tuple[Segment, dict[str, Any], range]]:
        for segment in segments:
            shards = self._sets[segment.dataset]
            for sample, persons in read_persons(shards, segment.number, segment.first, segment.last, self._what):
                yield segment, sample, persons

    def _wanted(
        self,
        stream: int,
        person: int,
        process: int,
        processes: int,
        samples: Iterable[tuple[Segment, dict[str, Any], range]],
    ) -> Iterator[WantedPicture]:
        streams, first_person = len(self._plan.streams), self._plan.streams[stream].first_person
        for number, (segment, sample, persons) in enumerate(samples):
            members = range(person, person + len(persons))
            person = members.stop
            if int((stream + number * _GOLDEN % 1) * processes / streams) != process:
                continue
            slots = [member * streams + stream for member in members]
            places = self._plan.places[slots]
            wanted = [i for i, place in enumerate(places) if place >= self._first_place]
            if wanted:
                yield WantedPicture(
                    dataset=segment.dataset,
                    shard=segment.number,
                    sample=sample,
                    persons=tuple(persons[i] for i in wanted),
                    slots=tuple(slots[i] for i in wanted),
                    places=tuple(places[i] for i in wanted),
                    numbers=tuple(first_person + members[i] for i in wanted),
                )
