"""What the training process itself spends on a crop that loader processes make, and how long it waits between epochs.

    python tests/benchmarks/bench_processes.py [--folder DIR] [--images 300] [--epochs 6] [--step 0.3]

Both sides make the same stage-1 crops, 256 x 192, of the same rendered pictures in the same order (those of
`bench_loader`), for a loop that pauses after each batch as a training step would. "Pipes" is the loader as it was: a
torch DataLoader whose processes send crops through pipes, started anew each epoch. Seconds of the CPU are those of the
reading process with all its threads. The gap is from the end of an epoch's last step to the next epoch's first batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CIGPOSE_NO_PROGRESS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2
import numpy as np
import torch
from bench_loader import prepare
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cigpose.config import Config
from cigpose.loader import batches as loader_module
from cigpose.loader.batches import TrainLoader, train_loader
from cigpose.loader.crops import Crops
from cigpose.loader.epochs import Epoch

GOAL_US, GOAL_GAP_S = 50, 0.1
SLOTS_PER_ROUND = 16
Batches = Callable[[int], Iterator[dict[str, Any]]]


class Rounds(IterableDataset[list[Crops]]):
    """What each process of the DataLoader sends."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Crops]]:
        cv2.setNumThreads(0)
        here = get_worker_info()
        due, pictures = 0, self.epoch.feed.pictures(here.id, here.num_workers)
        following = next(pictures, None)
        while due < self.epoch.plan.num_persons:
            due += SLOTS_PER_ROUND * here.num_workers
            now = []
            while following is not None and following.slots[0] < due:
                now.append(self.epoch.make(following))
                following = next(pictures, None)
            yield now


def pipes(config: Config, root: Path, number: int) -> Iterator[dict[str, Any]]:
    epoch = train_loader(config, epoch=number, rank=0, world=1, root=root).epoch

    def batches() -> Iterator[dict[str, Any]]:
        starts, missing, turn = epoch.plan.batch_starts, epoch.plan.batch_sizes.copy(), 0
        filling: dict[int, dict[str, Any]] = {}
        rounds = DataLoader(Rounds(epoch), None, num_workers=config.train.loader.processes, collate_fn=lambda v: v)
        for crops in (crops for now in rounds for crops in now):
            where = np.searchsorted(starts, crops.places, side="right") - 1
            for i, (batch, place) in enumerate(zip(where.tolist(), crops.places, strict=True)):
                if batch not in filling:
                    filling[batch] = loader_module._empty_batch(int(epoch.plan.batch_sizes[batch]), crops)
                loader_module._put(filling[batch], place - int(starts[batch]), crops, i)
                missing[batch] -= 1
            while turn < len(missing) and missing[turn] == 0:
                yield loader_module._to_tensors(filling.pop(turn))
                turn += 1

    return loader_module._prefetched(batches(), config.train.loader.prefetch_batches)


def measure(batches: Batches, epochs: int, step: float) -> tuple[float, float]:
    """Microseconds of the CPU for a crop, and the median gap in seconds."""
    crops, gaps, before = 0, [], 0.0
    for number in range(epochs + 1):
        if number == 1:  # what is done once in a training has been done
            crops, before = 0, time.process_time()
        asked = time.perf_counter()
        for i, batch in enumerate(batches(number)):
            if i == 0 and number:
                gaps.append(time.perf_counter() - asked)
            crops += len(batch["keys"])
            time.sleep(step)
    return (time.process_time() - before) / crops * 1e6, statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the pictures here for another run")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.3, help="seconds that follow each batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        config = prepare(folder, options.images)
        loader = replace(config.train.loader, processes=options.processes, open_shards=16)
        config = replace(config, train=replace(config.train, loader=loader))
        root = folder / "shards"
        with closing(TrainLoader(config, rank=0, world=1, root=root)) as lasting:
            ours = measure(lasting.batches, options.epochs, options.step)
        theirs = measure(lambda number: pipes(config, root, number), options.epochs, options.step)
    print(f"{os.cpu_count()} cores, {options.processes} loader processes, CUDA: {torch.cuda.is_available()}")
    for name, (spent, gap) in (("ours", ours), ("pipes", theirs)):
        print(f"{name:<6} {spent:6.1f} us of the reading process's CPU a crop, gap {gap:.3f} s")
    print(f"goals: {GOAL_US} us, gap {GOAL_GAP_S} s; pipes / ours: {theirs[0] / ours[0]:.1f} of the CPU")


if __name__ == "__main__":
    main()
