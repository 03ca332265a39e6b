"""Batches of crops from shards, in an order that (seed, epoch, rank, world) alone decides.

`plan` says which person goes where in which batch; `feed` reads the pictures when they are due. Here each is decoded
once for all of its persons, and every crop is written straight to its place in a batch to come. Those unfinished
batches are the shuffle buffer: about `shuffle_buffer` crops are held.

Decoding runs in `config.train.loader.processes` processes (`processes`; 0: in the prefetch thread itself), with equal
batches for any number. A thread keeps `prefetch_batches` finished batches ready, in pinned memory if there is a CUDA
device.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from cigpose.config import Config, LoaderConfig
from cigpose.files.cache import ShardCache
from cigpose.files.errors import DataError
from cigpose.loader.crops import CropMaker, Crops
from cigpose.loader.epochs import Epoch, Epochs
from cigpose.loader.pixels import check_extra
from cigpose.loader.plan import eval_plan, train_plan
from cigpose.loader.processes import LoaderProcesses
from cigpose.loader.samples import DETECTIONS, PERSONS
from cigpose.loader.shards import ShardSet

Batch = dict[str, Any]
_REFERENCES = 3
"""To an array in a list of which nobody else knows: the list's, the loop's, the counting's."""


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
    check_extra(config)
    epoch_left = _train_epoch(config, _open(config, config.data.train, root), epoch, rank, world, start_batch)
    return Loader(epoch_left, config.train.loader)


def _train_epoch(
    config: Config,
    sets: Mapping[str, ShardSet],
    epoch: int,
    rank: int,
    world: int,
    start_batch: int,
    on_device: bool = False,
) -> Epoch:
    plan = train_plan(
        {dataset: shards.counts() for dataset, shards in sets.items()},
        seed=config.seed,
        epoch=epoch,
        rank=rank,
        world=world,
        batch=config.train.batch_per_worker,
        accumulate=config.train.accumulate_steps,
        streams=config.train.loader.open_shards,
        buffer=config.train.loader.shuffle_buffer,
    )
    if not 0 <= start_batch <= len(plan.batch_sizes):
        raise ValueError(f"start_batch is {start_batch}, but the epoch has {len(plan.batch_sizes)} batches.")
    return Epoch(sets, plan, CropMaker(config, epoch=epoch, on_device=on_device), start_batch)


def eval_loader(
    config: Config, dataset: str, *, rank: int, world: int, root: Path = Path("data/shards"), shift: float = 0.0
) -> Loader:
    """Evaluation batches of one rank: its share of the persons (or detections), streams in turn.

    Over all ranks every one comes exactly once; shares differ by one at most and may be empty, so the loop over batches
    must hold no collective operation. The last batch may be short.

    Args:
        config: the experiment; `evaluate.boxes` chooses annotated or detected boxes.
        dataset: its name.
        rank: this worker.
        world: number of workers.
        root: as for `train_loader`.
        shift: cut the crops out so far from where they belong, as a share of the box, each person in its own direction.

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
    return Loader(Epoch(sets, plan, CropMaker(config, epoch=None, boxes=boxes, shift=shift), what=what), options)


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
    """The batches of one epoch, or of the rest of one. Each iteration gives the same ones again."""

    def __init__(self, epoch: Epoch, options: LoaderConfig) -> None:
        self.epoch = epoch
        self.options = options

    def __len__(self) -> int:
        """Batches an iteration gives."""
        return self.epoch.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in order; loader processes and thread end with the iteration."""
        if len(self) == 0:
            return iter(())
        return _prefetched(_batches(Epochs(1, lambda _: self.epoch), self.options), self.options.prefetch_batches)


class TrainLoader:
    """The batches of a training, epoch after epoch, as `train_loader` gives them one by one.

    Loader processes are started once. At the end of an epoch they go on with the next, whose first batches are ready
    when it is asked for.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world: int,
        root: Path = Path("data/shards"),
        on_device: bool = False,
    ) -> None:
        """Open the shards; arguments and errors are those of `train_loader`.

        With `on_device` batches have `drawn` (B, NUM_DRAWN) int16 as well, and what it says of their pixels is not done
        yet: `device.change_pixels` does it, wherever the crops are by then. A stage with transforms of the user is all
        done here, and nothing is drawn.
        """
        check_extra(config)
        self._config = config
        self._place = (rank, world)
        self._on_device = on_device
        self._sets = _open(config, config.data.train, root)
        self._running: Generator[Batch, None, None] | None = None
        self._coming: tuple[int, int] | None = None
        """Epoch and batch that the running iteration gives next."""
        self.num_batches = len(self._epoch(0).plan.batch_sizes)
        """Of every epoch."""

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from one of them on, without a wait where they follow those given last."""
        if self._coming != (epoch, start_batch):
            self.close()
        if start_batch >= self.num_batches:
            return
        if self._running is None:
            left = max(self._config.train.epochs - epoch, 1)
            epochs = Epochs(left, lambda number: self._epoch(epoch + number, 0 if number else start_batch))
            options = self._config.train.loader
            self._running = _prefetched(_batches(epochs, options), options.prefetch_batches)
        self._coming = None
        for _ in range(start_batch, self.num_batches):
            yield next(self._running)
        self._coming = (epoch + 1, 0)

    def _epoch(self, epoch: int, start_batch: int = 0) -> Epoch:
        return _train_epoch(self._config, self._sets, epoch, *self._place, start_batch, self._on_device)

    def close(self) -> None:
        """End processes and thread."""
        if self._running is not None:
            self._running.close()
        self._running = self._coming = None


def _batches(epochs: Epochs, options: LoaderConfig) -> Generator[Batch, None, None]:
    """The batches of all epochs, made in processes or, with none, here."""
    cv2.setNumThreads(0)  # processes are the parallelism; OpenCV's own threads would only get in their way
    if not options.processes:
        for number in range(epochs.num):
            yield from _made_here(epochs.epoch(number))
        return
    buffers = _Buffers()
    with closing(LoaderProcesses(epochs, options.processes)) as processes:
        for rows, keys in processes.batches():
            yield {**{name: buffers.copy(name, array) for name, array in rows.items()}, "keys": keys}


def _made_here(epoch: Epoch) -> Iterator[Batch]:
    """Put crops in their places; give each batch when it is full and its turn."""
    starts, missing, turn = epoch.plan.batch_starts, epoch.plan.batch_sizes.copy(), epoch.start_batch
    filling: dict[int, Batch] = {}
    with closing(epoch.feed.pictures()) as pictures:
        for picture in pictures:
            crops = epoch.make(picture)
            batches = np.searchsorted(starts, crops.places, side="right") - 1
            for i, (batch, place) in enumerate(zip(batches.tolist(), crops.places, strict=True)):
                if batch not in filling:
                    filling[batch] = _empty_batch(int(epoch.plan.batch_sizes[batch]), crops)
                _put(filling[batch], place - int(starts[batch]), crops, i)
                missing[batch] -= 1
            while turn < len(missing) and missing[turn] == 0:
                yield _to_tensors(filling.pop(turn))
                turn += 1
    assert turn == len(missing), f"batch {turn} of {len(missing)} lacks {missing[turn]} persons"


class _Buffers:
    """Tensors that are copies, in memory that is used again: fresh memory would cost more than the copy."""

    def __init__(self) -> None:
        self._is_pinned = torch.cuda.is_available()
        self._arrays: dict[str, list[np.ndarray]] = {}

    def copy(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """A tensor of its own, pinned if there is a CUDA device: torch keeps such memory until its use there ends."""
        shared = torch.from_numpy(rows)
        if self._is_pinned:
            return torch.empty_like(shared, pin_memory=True).copy_(shared)
        arrays = self._arrays.setdefault(name, [])
        # As long as a tensor of an earlier batch lives, its array is held by more than the list and this loop.
        free = (a for a in arrays if len(a) >= len(rows) and sys.getrefcount(a) <= _REFERENCES)
        array = next(free, None)
        if array is None:
            array = np.empty_like(rows)
            arrays.append(array)
        return torch.from_numpy(array[: len(rows)]).copy_(shared)


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


def _prefetched(source: Generator[Batch, None, None], depth: int) -> Generator[Batch, None, None]:
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
            source.close()

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
        if thread is not threading.current_thread():  # which may be the one that collects what nobody holds any more
            thread.join()
