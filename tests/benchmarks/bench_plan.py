"""The plan of an epoch at scale, and how well it mixes: nothing is read, only counted.

    python tests/benchmarks/bench_plan.py [--images 100000000] [--ranks 1000]

1. What one rank spends to open the index and to plan its part of an epoch: seconds and megabytes, its own and with the
   tables of offsets that the former loader would need for the same shards.
2. How mixed an epoch is, against the former loader (`offset_loader`) and a plain shuffle of everybody, with shards that
   are in the order of the source and with shards whose pictures were shuffled when they were written. *Distance* is the
   mean distance of neighbours' places in the source, over that of a plain shuffle. *Kin* is the share of persons of a
   batch for whom another person of it stands within 50 pictures in the source, as frames of one scene do.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from offset_loader import arrivals_of, shuffled_positions

from cigpose.config import LoaderConfig
from cigpose.loader.plan import train_plan
from cigpose.shard.index import parse_index

IMAGES_PER_SHARD = 1000
PERSONS_PER_IMAGE = 2.3
BATCH = 64
NEAR = 50


def measured(job: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, seconds (without the measuring of memory), megabytes that stay."""
    start = time.perf_counter()
    job()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    result = job()
    kept = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    return result, seconds, kept


def show_scale(images: int, ranks: int) -> None:
    num = images // IMAGES_PER_SHARD
    persons = np.random.default_rng(0).poisson(IMAGES_PER_SHARD * PERSONS_PER_IMAGE, num)
    shards = [
        {"name": f"big-{i:06d}.tar", "sha256": f"{i:064x}", "bytes": 10**8, "images": IMAGES_PER_SHARD}
        | {"persons": int(persons[i]), "detections": 0}
        for i in range(num)
    ]
    totals = {"images": num * IMAGES_PER_SHARD, "persons": int(persons.sum()), "detections": 0}
    facts = {"format": 2, "dataset": "big", "keypoints": "coco", "num_keypoints": 17, "dropped": {}, "sources": {}}
    text = json.dumps({**facts, **totals, "ground_truth": None, "ground_truth_sha256": None, "shards": shards})
    del shards
    index, seconds, kept = measured(lambda: parse_index(text, "index.json"))
    print(f"index of {num:,} shards, {len(text) / 1e6:.0f} MB: {seconds:.2f} s, {kept:.0f} MB kept")
    counts = {"big": np.array([entry.persons for entry in index.shards])}
    loader = LoaderConfig()
    spent = []
    for rank in range(0, ranks, max(ranks // 5, 1)):

        def plan(rank: int = rank) -> Any:
            made = train_plan(
                counts,
                seed=0,
                epoch=0,
                rank=rank,
                world=ranks,
                batch=BATCH,
                accumulate=1,
                streams=loader.open_shards,
                buffer=loader.shuffle_buffer,
            )
            made.places[[0, made.num_persons // 2, made.num_persons - 1]]
            return made

        spent.append(measured(plan))
    made = spent[-1][0]
    shards_read = sum(len(stream.segments) for stream in made.streams)
    print(
        f"plan of one of {ranks:,} ranks: {max(s for _, s, _ in spent):.3f} s, {max(m for *_, m in spent):.1f} MB kept;"
        f" {made.num_persons:,} persons in {len(made.batch_sizes):,} batches, {shards_read} segments of shards"
    )
    print(f"tables of offsets for those shards would be {shards_read * IMAGES_PER_SHARD * 6 * 8 / 1e6:.0f} MB more")
    print(f"peak of this whole process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def streams_order(counts: list[np.ndarray]) -> np.ndarray:
    """Persons (numbered through all shards) in the order of an epoch."""
    totals, loader = np.array([count.sum() for count in counts]), LoaderConfig()
    plan = train_plan(
        {"a": totals},
        seed=0,
        epoch=0,
        rank=0,
        world=1,
        batch=BATCH,
        accumulate=1,
        streams=loader.open_shards,
        buffer=loader.shuffle_buffer,
    )
    starts = np.concatenate([[0], np.cumsum(totals)])
    by_slot = np.empty(plan.num_persons, dtype=np.int64)
    for number, stream in enumerate(plan.streams):
        people = [np.arange(s.first, s.last) + starts[s.number] for s in stream.segments]
        by_slot[number :: len(plan.streams)] = np.concatenate(people)
    order = np.empty_like(by_slot)
    order[plan.places[range(plan.num_persons)]] = by_slot
    return order


def offsets_order(counts: list[np.ndarray]) -> np.ndarray:
    first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    starts = np.concatenate([[0], np.cumsum([len(count) for count in counts])])
    pictures = [int(starts[shard]) + i for shard, i in arrivals_of(counts, 0)]
    arrivals = np.concatenate([np.arange(first[picture], first[picture + 1]) for picture in pictures])
    order = np.empty_like(arrivals)
    order[shuffled_positions(len(arrivals), LoaderConfig().shuffle_buffer, np.random.default_rng(0))] = arrivals
    return order


def mixture(order: np.ndarray, picture_of: np.ndarray) -> tuple[float, float]:
    """Distance of neighbours, and kin in a batch."""
    pictures = picture_of[order]
    distance = float(np.abs(np.diff(pictures)).mean() / picture_of.max() * 3)
    full = np.sort(pictures[: len(pictures) // BATCH * BATCH].reshape(-1, BATCH), axis=1)
    near = np.diff(full, axis=1) <= NEAR
    padded = np.pad(near, ((0, 0), (1, 1)))
    return distance, float((padded[:, 1:] | padded[:, :-1]).mean())


def show_mixture(num_shards: int) -> None:
    rng = np.random.default_rng(0)
    num_pictures = num_shards * IMAGES_PER_SHARD
    persons = 1 + rng.poisson(PERSONS_PER_IMAGE - 1, num_pictures)
    shuffled = np.concatenate([rng.permutation(IMAGES_PER_SHARD) + i * IMAGES_PER_SHARD for i in range(num_shards)])
    for title, source in (("in the order of the source", None), ("each shuffled when written", shuffled)):
        written = persons if source is None else persons[source]
        counts = list(written.reshape(num_shards, -1))
        place = np.repeat(np.arange(num_pictures) if source is None else source, written)
        print(f"{num_pictures:,} pictures, shards {title}:")
        orders = {
            "streams": streams_order(counts),
            "by offset": offsets_order(counts),
            "plain": rng.permutation(len(place)),
        }
        for name, order in orders.items():
            distance, kin = mixture(order, place)
            print(f"  {name:<10} distance {distance:.3f}, kin {kin:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=64, help="of the data set whose mixture is shown; COCO has 64")
    options = parser.parse_args()
    show_scale(options.images, options.ranks)
    show_mixture(options.shards)


if __name__ == "__main__":
    main()
