"""What is to be made of each epoch, in one process or several: its plan, its pictures, their crops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cigpose.files.errors import DataError
from cigpose.loader.crops import CropMaker, Crops, WantedPicture
from cigpose.loader.feed import Feed
from cigpose.loader.plan import RankPlan
from cigpose.loader.samples import PERSONS
from cigpose.loader.shards import ShardSet


@dataclass(frozen=True)
class Epoch:
    """One epoch of a rank, or the rest of one."""

    sets: Mapping[str, ShardSet]
    plan: RankPlan
    maker: CropMaker
    start_batch: int = 0
    what: str = PERSONS

    @property
    def num_batches(self) -> int:
        """Batches that are left."""
        return len(self.plan.batch_sizes) - self.start_batch

    @property
    def feed(self) -> Feed:
        """Its pictures."""
        first_place = int(self.plan.batch_starts[self.start_batch])
        return Feed(self.sets, self.plan, first_place=first_place, what=self.what)

    def make(self, picture: WantedPicture) -> Crops:
        """The crops of one of its pictures.

        Raises:
            DataError: it cannot be decoded, or its shard is not the one that the index lists.
        """
        try:
            return self.maker.make([picture])
        except DataError:
            self.sets[picture.dataset].confirm(picture.shard)  # a tar that is another one is named as such
            raise


class Epochs:
    """Epochs one after the other, of equally many persons and batches; each is planned when it is needed."""

    def __init__(self, num: int, make: Callable[[int], Epoch]) -> None:
        """The epochs.

        Args:
            num: how many.
            make: gives each by its number from 0; only the first may begin inside.
        """
        self.num = num
        self.epoch = lru_cache(maxsize=2)(make)
        first = self.epoch(0)
        self.start_batch = first.start_batch
        self.per_epoch = len(first.plan.batch_sizes)
        self.num_persons = first.plan.num_persons
        self.starts = first.plan.batch_starts
        self.largest = int(first.plan.batch_sizes.max(initial=0))

    @property
    def num_batches(self) -> int:
        """Batches in all, numbered from the beginning of the first epoch: those before `start_batch` are not made."""
        return self.num * self.per_epoch

    def size(self, batch: int) -> int:
        """Persons of a batch."""
        return int(self.starts[batch % self.per_epoch + 1] - self.starts[batch % self.per_epoch])

    def last_slot(self, batch: int) -> int:
        """The last slot, counted through all epochs, of a person of this batch or of one before."""
        number, within = divmod(min(batch, self.num_batches - 1), self.per_epoch)
        places = self.epoch(number).plan.places
        return number * self.num_persons + places.last_slot_of(int(self.starts[within + 1]))

    def where(self, number: int, places: list[int]) -> Iterator[tuple[int, int]]:
        """Batch, counted through all epochs, and row of some places of an epoch."""
        batches = np.searchsorted(self.starts, places, side="right") - 1
        rows = np.asarray(places) - self.starts[batches]
        return zip((batches + number * self.per_epoch).tolist(), rows.tolist(), strict=True)
