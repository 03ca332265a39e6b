"""Batches of crops from shards, in an order that (seed, epoch, rank, world) alone decides.

`plan` says which person goes where in which batch; here pictures are read in arrival order, each decoded once for all
of its persons, and every crop is written straight to its place in a batch to come. Those unfinished batches are the
shuffle buffer: about `shuffle_buffer` crops are held.

Decoding runs in `config.train.loader.processes` processes (0: in the prefetch thread itself), with equal batches for
any number. A thread keeps `prefetch_batches` finished batches ready, in pinned memory if there is a CUDA device.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from cigpose.config import Config, LoaderConfig
from cigpose.files.cache import ShardCache
from cigpose.files.errors import DataError
from cigpose.loader.crops import CropMaker, Crops, WantedPicture
from cigpose.loader.pixels import check_extra
from cigpose.loader.plan import RankPlan, Segment, eval_plan, picture_rng, train_plan
from cigpose.loader.shards import ShardSet, ShardTable

Batch = dict[str, Any]

PICTURES_PER_JOB = 8
"""Pictures a process gets at a time; their crops come back through a pipe."""


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
        FileNotFoundError: an index or a shard is missing.
        ConfigError: a transform in `config.augmentation` that cannot be used, of whichever stage.
        ValueError: fewer persons than ranks x accumulation steps, or a start beyond the epoch.
    """
    loader = config.train.loader
    check_extra(config)
    sets = _open(config, config.data.train, root)
    plan = train_plan(
        [count for shards in sets.values() for count in shards.counts()],
        seed=config.seed,
        epoch=epoch,
        rank=rank,
        world=world,
        batch=config.train.batch_per_worker,
        accumulate=config.train.accumulate_steps,
        buffer=loader.shuffle_buffer,
    )
    if not 0 <= start_batch <= len(plan.batch_sizes):
        raise ValueError(f"start_batch is {start_batch}, but the epoch has {len(plan.batch_sizes)} batches.")

    def order(pool: int, num_pictures: int) -> np.ndarray:
        return picture_rng(config.seed, epoch, rank, pool).permutation(num_pictures)

    return Loader(sets, plan, CropMaker(config, epoch=epoch), loader, start_batch=start_batch, order=order)


def eval_loader(
    config: Config, dataset: str, *, rank: int, world: int, root: Path = Path("data/shards"), shift: float = 0.0
) -> Loader:
    """Evaluation batches of one rank: its share of the persons (or detections), in the order of the shards.

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
        crop in image pixels after padding and aspect fix, `image_id`, `person_id` (B,) int64 (the annotation's id; of a
        detection its number in the dataset), `bbox_xyxy` (B, 4), `box_score` (B,) float32. Keypoints of detections are
        not known: 0 and not visible.

    Raises:
        DataError: shards that cannot be used, or detections wanted where there are none.
        FileNotFoundError: an index or a shard is missing.
    """
    sets = _open(config, (dataset,), root)
    boxes = config.evaluate.boxes
    if boxes == "detections" and not sets[dataset].index.detections:
        raise DataError(
            f"{sets[dataset].address}: holds no detections, but `boxes` (of evaluate; of train.validation while "
            f"training) is 'detections'. Name a file in data.datasets.{dataset}.detections, or take ground_truth."
        )
    counts = sets[dataset].counts(detections=boxes == "detections")
    plan = eval_plan(counts, rank=rank, world=world, batch=config.evaluate.batch)
    # The model's own number was chosen for the machine that trained it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = dataclasses.replace(config.train.loader, processes=min(config.train.loader.processes, cores))
    return Loader(sets, plan, CropMaker(config, epoch=None, boxes=boxes, shift=shift), options)


def _open(config: Config, datasets: Iterable[str], root: Path) -> dict[str, ShardSet]:
    options = config.train.loader
    # Of pictures that are not decoded yet: of the pool at work, the next, the one before, and of the jobs under way.
    held = 3 * options.open_shards + PICTURES_PER_JOB * (2 * options.processes + 1)
    cache = ShardCache(options.cache, options.cache_gb, held)
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
        order: Any = None,
    ) -> None:
        self.plan = plan
        self._sets = sets
        self._maker = maker
        self._options = options
        self._start_batch = start_batch
        self._order = order
        self._starts = plan.batch_starts

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
            batches = np.searchsorted(self._starts, crops.positions, side="right") - 1
            for i, (batch, position) in enumerate(zip(batches.tolist(), crops.positions, strict=True)):
                if batch not in filling:
                    filling[batch] = _empty_batch(int(self.plan.batch_sizes[batch]), crops)
                _put(filling[batch], position - int(self._starts[batch]), crops, i)
                missing[batch] -= 1
            while turn < len(missing) and missing[turn] == 0:
                yield _to_tensors(filling.pop(turn))
                turn += 1
        assert turn == len(missing), f"batch {turn} of {len(missing)} lacks {missing[turn]} persons"

    def _crops(self) -> Iterator[Crops]:
        """The crops of all jobs, in the order of the jobs."""
        cv2.setNumThreads(0)  # processes are the parallelism; OpenCV's own threads would only get in their way
        jobs = _Jobs(self)
        results: Iterable[Crops | DataError]
        if self._options.processes == 0:
            results = (self._maker[job] for job in jobs)
        else:
            results = DataLoader(
                self._maker,  # type: ignore[arg-type]
                batch_size=None,
                sampler=jobs,
                num_workers=self._options.processes,
                worker_init_fn=_start_process,
                collate_fn=_same,
            )
        for result in results:
            if isinstance(result, DataError):
                raise result
            yield result

    def jobs(self) -> Iterator[list[WantedPicture]]:
        """Lists of pictures in arrival order, without those whose persons all came before `start_batch`."""
        first = int(self._starts[self._start_batch])
        pools = [
            (number, arrival, segments)
            for number, (arrival, segments) in enumerate(self.plan.pools(self._options.open_shards))
            if (self.plan.positions[arrival : arrival + sum(map(len, segments))] >= first).any()
        ]
        pictures = itertools.chain.from_iterable(
            self._pictures(number, arrival, tables, first)
            for (number, arrival, _), tables in zip(pools, self._tables([p[2] for p in pools]), strict=True)
        )
        while job := list(itertools.islice(pictures, PICTURES_PER_JOB)):
            yield job

    def _tables(self, pools: list[tuple[Segment, ...]]) -> Iterator[list[tuple[Segment, ShardTable]]]:
        """The pools' shards, opened (fetched, verified, counted) one pool ahead by a thread."""
        ahead = ThreadPoolExecutor(1, thread_name_prefix="cigpose-shards")
        try:
            waiting = [ahead.submit(self._open_pool, pool) for pool in pools[:2]]
            for pool in [*pools[2:], None, None]:
                if waiting:
                    yield waiting.pop(0).result()
                if pool is not None:
                    waiting.append(ahead.submit(self._open_pool, pool))
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)

    def _open_pool(self, pool: tuple[Segment, ...]) -> list[tuple[Segment, ShardTable]]:
        return [(segment, self._sets[segment.dataset].table(segment.number)) for segment in pool]

    def _pictures(
        self, pool: int, arrival: int, tables: list[tuple[Segment, ShardTable]], first_position: int
    ) -> Iterator[WantedPicture]:
        """The pictures of a pool in their order, with the persons that are wanted."""
        entries = [entry for segment, table in tables for entry in _cut_table(segment, table, self._maker.boxes)]
        order = range(len(entries)) if self._order is None else self._order(pool, len(entries)).tolist()
        for chosen in order:
            table, dataset, image, persons = entries[chosen]
            positions = self.plan.positions[arrival : arrival + len(persons)].tolist()
            numbers = range(self.plan.first_person + arrival, self.plan.first_person + arrival + len(persons))
            arrival += len(persons)
            wanted = [i for i, position in enumerate(positions) if position >= first_position]
            if wanted:
                yield WantedPicture(
                    path=table.path,
                    dataset=dataset,
                    key=table.keys[image],
                    json_extent=tuple(table.json_extents[image].tolist()),
                    jpeg_extent=tuple(table.jpeg_extents[image].tolist()),
                    persons=tuple(persons[i] for i in wanted),
                    positions=tuple(positions[i] for i in wanted),
                    numbers=tuple(numbers[i] for i in wanted),
                )


class _Jobs:
    """What a DataLoader calls a sampler."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[WantedPicture]]:
        return self._loader.jobs()


def _cut_table(segment: Segment, table: ShardTable, boxes: str) -> list[tuple[ShardTable, str, int, range]]:
    """(table, dataset, image, places of its persons) of every image that has persons in the segment."""
    counts = table.detections if boxes == "detections" else table.persons
    ends = np.cumsum(counts)
    first = np.maximum(segment.first - (ends - counts), 0).tolist()
    last = np.minimum(segment.last - (ends - counts), counts).tolist()
    return [(table, segment.dataset, i, range(a, b)) for i, (a, b) in enumerate(zip(first, last, strict=True)) if a < b]


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
