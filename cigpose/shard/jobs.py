"""Does the jobs of a dataset, one shard each, in as many processes as are worth it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from cigpose.files.archives import Extent
from cigpose.files.atomic import write_json
from cigpose.files.digest import sha256_of
from cigpose.pool import map_in_processes
from cigpose.shard.intake import BadSamples
from cigpose.shard.tars import Pictures, ShardJob, ShardStats, write_shard

_WORTH_A_PROCESS = 768 << 20
"""Bytes of photographs copied in about the time a process takes to start (webdataset imports torch)."""


def run_jobs(jobs: Sequence[ShardJob], pictures: Pictures, processes: int) -> Iterator[tuple[ShardJob, ShardStats]]:
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
            yield job, _do(pictures, job)
        return
    try:
        yield from map_in_processes(functools.partial(_do, pictures), jobs, processes)
    except ChildProcessError as err:
        raise ChildProcessError(
            f"{jobs[0].path.parent}: {err}. Run again: finished shards are kept; fewer data.sharding.processes need "
            "less memory."
        ) from err


def _num_processes(jobs: Sequence[ShardJob], wanted: int) -> int:
    cores = wanted or len(os.sched_getaffinity(0))
    if not wanted and not jobs[0].verify_images:
        cores = _worth(jobs, cores)
    return min(cores, len(jobs))


def _worth(jobs: Sequence[ShardJob], cores: int) -> int:
    """How many of the cores there is enough to copy for; all of them for frames, which are encoded."""
    copied = 0
    for sample in (sample for job in jobs for sample in job.samples):
        if not isinstance(sample.picture.source, Extent):
            return cores
        copied += sample.picture.source.size
        if copied >= (cores - 1) * _WORTH_A_PROCESS:
            return cores
    return 1 + copied // _WORTH_A_PROCESS


def _do(pictures: Pictures, job: ShardJob) -> ShardStats:
    """One shard, unless an earlier run finished it; the note beside it says so."""
    note = job.path.with_suffix(".done")
    if note.is_file() and job.path.is_file():
        values = json.loads(note.read_text())
        if sha256_of(job.path) == values["sha256"]:
            return ShardStats(**{**values, "bad": BadSamples(**values["bad"])})
    stats = write_shard(job, pictures)
    write_json(note, asdict(stats), sort_keys=True)
    return stats
