"""Does the jobs of a dataset, one shard each, in as many processes as are worth it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cigpose.data.archives import Extent, sha256_of
from cigpose.data.intake import BadSamples
from cigpose.data.tars import Pictures, ShardJob, ShardStats, write_shard

_WORTH_A_PROCESS = 256 << 20
"""Bytes of photographs copied in about the time a process takes to start."""


def run_jobs(jobs: list[ShardJob], pictures: Pictures, processes: int) -> Iterator[tuple[ShardJob, ShardStats]]:
    """Do the jobs; results in their order.

    Args:
        jobs: at least one.
        pictures: how the reader gets at them.
        processes: how many; 0 for one per core, but fewer where there is little to copy.

    Raises:
        ChildProcessError: a process of several was killed.
    """
    processes = _num_processes(jobs, processes)
    if processes == 1:
        for job in jobs:
            yield job, _do(job, pictures)
        return
    # spawn: a fork would inherit threads of OpenCV, torch and our own in whatever state they are.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: list[tuple[ShardJob, Future[ShardStats]]] = []
        todo = iter(jobs)
        try:
            for job in todo:
                waiting.append((job, pool.submit(_do, job, pictures)))
                if len(waiting) >= 2 * processes:
                    done, future = waiting.pop(0)
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool as err:
            raise ChildProcessError(
                f"{jobs[0].path.parent}: a sharding process was killed (out of memory?). Run again: finished shards "
                "are kept; fewer data.sharding.processes need less memory."
            ) from err
        finally:
            pool.shutdown(cancel_futures=True)


def _num_processes(jobs: list[ShardJob], wanted: int) -> int:
    cores = wanted or len(os.sched_getaffinity(0))
    sources = [sample.picture.source for job in jobs for sample in job.samples]
    photographs = [source.size for source in sources if isinstance(source, Extent)]
    if not wanted and not jobs[0].verify_images and len(photographs) == len(sources):
        cores = min(cores, 1 + sum(photographs) // _WORTH_A_PROCESS)
    return min(cores, len(jobs))


def _do(job: ShardJob, pictures: Pictures) -> ShardStats:
    """One shard, unless an earlier run finished it; the note beside it says so."""
    note = job.path.with_suffix(".done")
    if note.is_file() and job.path.is_file():
        values = json.loads(note.read_text())
        if sha256_of(job.path) == values["sha256"]:
            return ShardStats(**{**values, "bad": BadSamples(**values["bad"])})
    stats = write_shard(job, pictures)
    write_json(note, asdict(stats))
    return stats


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, values: Any) -> None:
    """Write a small JSON file, at once or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
