"""Batches of crops from shards, in an order that (seed, epoch, rank, world) alone decides.

`plan` says which person goes where in which batch; `feed` reads the pictures when they are due. Here each is decoded
once for all of its persons, and every crop is written straight to its place in a batch to come. Those unfinished
batches are the shuffle buffer: about `shuffle_buffer` crops are held.

Decoding runs in `config.train.loader.processes` processes (0: in the prefetch thread itself), with equal batches for
any number. A thread keeps `prefetch_batches` finished batches ready, in pinned memory if there is a CUDA device.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cigpose.config import Config, LoaderConfig
from cigpose.files.cache import ShardCache
from cigpose.files.errors import DataError
from cigpose.loader.crops import CropMaker, Crops, WantedPicture
from cigpose.loader.feed import Feed
from cigpose.loader.pixels import check_extra
from cigpose.loader.plan import RankPlan, eval_plan, train_plan
from cigpose.loader.samples import DETECTIONS, PERSONS
from cigpose.loader.shards import ShardSet

Batch = dict[str, Any]

SLOTS_PER_ROUND = 16
"""Persons due of each process before the next one's crops are taken: they come through pipes, process after process."""


def train_loader(
    config: Config, *, epoch: int, rank: int, world: int, start_batch: int = 0, root: Path = Path("data/shards")
) -> Loader:
    """Augmented training batches of one rank and epoch.

    Over all ranks every person of `config.data.train` comes exactly once. All ranks have the same number of batches, a
    multiple of `accumulate_steps`; all batches are full but those of the last step, which share the rest evenly.

    Args:
        config: the experiment.
        epoch: from 0; decides order, augmentation and its stage.
        rank: this worker.
        world: number of workers.
        start_batch: first batch to give; those before are neither read nor decoded.
        root: folder of the shard folders, where `config.data.locations` names no other.

    Returns: iterable of dicts: `crops` (B, H, W, 3) uint8 RGB, `keypoints` (B, K, 2) float32 in crop pixels, `visible`
        (B, K) float32 0 or 1, `keys` list of "<dataset>/<image key>#<person id>". `len` is the number of batches left.

    Raises:
        DataError: shards that cannot be used; while iterating also a damaged shard or picture.
        FileNotFoundError: an index is missing; while iterating also a shard.
        ConfigError: a transform in `config.augmentation` that cannot be used, of whichever stage.
        ValueError: fewer persons than ranks x accumulation steps, or a start beyond the epoch.
    """
    loader = config.train.loader
    check_extra(config)
    sets = _open(config, config.data.train, root)
    plan = train_plan(
        {dataset: shards.counts() for dataset, shards in sets.items()},
        seed=config.seed,
        epoch=epoch,
        rank=rank,
        world=world,
        batch=config.train.batch_per_worker,
        accumulate=config.train.accumulate_steps,
        streams=loader.open_shards,
        buffer=loader.shuffle_buffer,
    )
    if not 0 <= start_batch <= len(plan.batch_sizes):
        raise ValueError(f"start_batch is {start_batch}, but the epoch has {len(plan.batch_sizes)} batches.")

    return Loader(sets, plan, CropMaker(config, epoch=epoch), loader, start_batch=start_batch)


def eval_loader(config: Config, dataset: str, *, rank: int, world: int, root: Path = Path("data/shards")) -> Loader:
    """Evaluation batches of one rank: its share of the persons (or detections), streams in turn.

    Over all ranks every one comes exactly once; shares differ by one at most and may be empty, so the loop over batches
    must hold no collective operation. The last batch may be short.

    Args:
        config: the experiment; `evaluate.boxes` chooses annotated or detected boxes.
        dataset: its name.
        rank: this worker.
        world: number of workers.
        root: as for `train_loader`.

    Returns: batches as those of `train_loader`, without augmentation, and with `center`, `scale` (B, 2) float32 of the
        crop in image pixels after padding and aspect fix, `number` (B,) int64 of the person in the order of the shards,
        `image_id`, `person_id` (B,) int64 (the annotation's id; of a detection its number), `bbox_xyxy` (B, 4),
        `box_score` (B,) float32. Keypoints of detections are not known: 0 and not visible.

    Raises:
        DataError: shards that cannot be used, or detections wanted where there are none.
        FileNotFoundError: an index is missing; while iterating also a shard.
    """
    sets = _open(config, (dataset,), root)
    boxes = config.evaluate.boxes
    if boxes == "detections" and not sets[dataset].index.detections:
        raise DataError(
            f"{sets[dataset].address}: holds no detections, but `boxes` (of evaluate; of train.validation while "
            f"training) is 'detections'. Name a file in data.datasets.{dataset}.detections, or take ground_truth."
        )
    what = DETECTIONS if boxes == "detections" else PERSONS
    plan = eval_plan(
        {dataset: sets[dataset].counts(detections=what == DETECTIONS)},
        rank=rank,
        world=world,
        batch=config.evaluate.batch,
        streams=config.train.loader.open_shards,
    )
    # The model's own number was chosen for the machine that trained it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = dataclasses.replace(config.train.loader, processes=min(config.train.loader.processes, cores))
    return Loader(sets, plan, CropMaker(config, epoch=None, boxes=boxes), options, what=what)


def _open(config: Config, datasets: Iterable[str], root: Path) -> dict[str, ShardSet]:
    options = config.train.loader
    cache = ShardCache(options.cache, options.cache_gb, options.open_shards)
    sets = {
        dataset: ShardSet.open(dataset, root, config.data.locations, cache=cache, verify=options.verify)
        for dataset in datasets
    }
    for shards in sets.values():
        shards.check_keypoints(config.keypoint_set.name, len(config.keypoint_set))
    return sets


class Loader:
    """Batches of a plan. Each iteration gives the same ones again."""

    def __init__(
        self,
        sets: dict[str, ShardSet],
        plan: RankPlan,
        maker: CropMaker,
        options: LoaderConfig,
        *,
        start_batch: int = 0,
        what: str = PERSONS,
    ) -> None:
        self.plan = plan
        self._sets = sets
        self._maker = maker
        self._options = options
        self._start_batch = start_batch
        self._starts = plan.batch_starts
        self._feed = Feed(sets, plan, first_place=int(self._starts[start_batch]), what=what)

    def __len__(self) -> int:
        """Batches an iteration gives."""
        return len(self.plan.batch_sizes) - self._start_batch

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in order; loader processes and thread end with the iteration."""
        if len(self) == 0:
            return iter(())
        return _prefetched(self._batches(), self._options.prefetch_batches)

    def _batches(self) -> Iterator[Batch]:
        """Put crops in their places; give each batch when it is full and its turn."""
        filling: dict[int, Batch] = {}
        missing = self.plan.batch_sizes.copy()
        turn = self._start_batch
        for crops in self._crops():
            batches = np.searchsorted(self._starts, crops.places, side="right") - 1
            for i, (batch, place) in enumerate(zip(batches.tolist(), crops.places, strict=True)):
                if batch not in filling:
                    filling[batch] = _empty_batch(int(self.plan.batch_sizes[batch]), crops)
                _put(filling[batch], place - int(self._starts[batch]), crops, i)
                missing[batch] -= 1
            while turn < len(missing) and missing[turn] == 0:
                yield _to_tensors(filling.pop(turn))
                turn += 1
        assert turn == len(missing), f"batch {turn} of {len(missing)} lacks {missing[turn]} persons"

    def _crops(self) -> Iterator[Crops]:
        """The crops of all rounds, process after process."""
        cv2.setNumThreads(0)  # processes are the parallelism; OpenCV's own threads would only get in their way
        rounds: Iterable[list[Crops] | Exception] = _Rounds(self)
        if self._options.processes:
            rounds = DataLoader(
                rounds,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=self._options.processes,
                worker_init_fn=_start_process,
                collate_fn=_same,
            )
        for result in rounds:
            if isinstance(result, Exception):
                raise result
            yield from result

    def rounds(self, process: int, processes: int) -> Iterator[list[Crops]]:
        """What one of some processes makes; every one makes as many rounds, so that none is far ahead of the others."""
        length = SLOTS_PER_ROUND * processes
        pictures, due = self._feed.pictures(process, processes), self._feed.first_slot
        following = next(pictures, None)
        while due < self.plan.num_persons:
            due += length
            now: list[Crops] = []
            while following is not None and following.slots[0] < due:
                now.append(self._make(following))
                following = next(pictures, None)
            yield now

    def _make(self, picture: WantedPicture) -> Crops:
        try:
            return self._maker.make([picture])
        except DataError:
            self._sets[picture.dataset].confirm(picture.shard)  # a tar that is another one is named as such
            raise


class _Rounds(IterableDataset[Any]):
    """What a DataLoader iterates in each of its processes; an error is an item, so that it crosses as it is."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[Crops] | Exception]:
        here = get_worker_info()
        try:
            yield from self._loader.rounds(here.id, here.num_workers) if here else self._loader.rounds(0, 1)
        except (DataError, OSError) as err:
            yield err


def _empty_batch(size: int, crops: Crops) -> Batch:
    """Arrays to be filled. Memory is taken as it is written to, so a batch costs what it holds."""
    batch: Batch = {name: np.empty((size, *array.shape[1:]), array.dtype) for name, array in crops.arrays.items()}
    batch["keys"] = [""] * size
    return batch


def _put(batch: Batch, row: int, crops: Crops, i: int) -> None:
    for name, array in crops.arrays.items():
        batch[name][row] = array[i]
    batch["keys"][row] = crops.keys[i]


def _to_tensors(batch: Batch) -> Batch:
    pin = torch.cuda.is_available()
    tensors: Batch = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            tensors[name] = tensor.pin_memory() if pin else tensor
        else:
            tensors[name] = value
    return tensors


def _same(value: Any) -> Any:
    return value


def _start_process(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _prefetched(source: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The items of `source`, made by a thread up to `depth` ahead. Its errors are raised here."""
    ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(max(depth, 1))
    stop = threading.Event()

    def put(item: Batch | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put(item, None):
                    return
            put(None, None)
        except BaseException as err:
            put(None, err)
        finally:
            source.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="cigpose-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
