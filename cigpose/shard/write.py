"""Datasets as webdataset tars: one sample per image, an index beside them. The format is described in docs/shards.md.

<dataset>/<dataset>-00000.tar ...   `<key>.jpg` and `<key>.json` of each image
<dataset>/annotations.json          ground truth of the whole split, if asked for
<dataset>/index.json                written last; what it lists is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cigpose.config import Config, DatasetConfig
from cigpose.download.manifest import MANIFEST, read_manifest
from cigpose.files.archives import list_members, split_spec
from cigpose.files.atomic import claimed, clear_leftovers, replace_folder, sync, write_json, write_text
from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError
from cigpose.progress import progress as show_progress
from cigpose.shard.formats.coco import read_coco
from cigpose.shard.formats.crowdpose import read_crowdpose
from cigpose.shard.formats.ubody import read_frames, read_ubody
from cigpose.shard.index import FORMAT, INDEX, ShardEntry, ShardIndex
from cigpose.shard.intake import Intake
from cigpose.shard.jobs import run_jobs
from cigpose.shard.labels import write_ground_truth
from cigpose.shard.pictures import Frame
from cigpose.shard.tars import Pictures, Sample, ShardJob, ShardStats, read_photographs

GROUND_TRUTH = "annotations.json"

_READERS: dict[str, tuple[Callable[[DatasetConfig, Path, Intake], None], Pictures]] = {
    "coco": (read_coco, read_photographs),
    "crowdpose": (read_crowdpose, read_photographs),
    "ubody": (read_ubody, read_frames),
}


def write_dataset(
    config: Config, key: str, raw_root: Path, out_root: Path, progress: Callable[..., Any] = show_progress
) -> ShardIndex:
    """Make the shards of one dataset of params.yaml.

    Everything is written to `<out_root>/<key>.partial`, which becomes `<out_root>/<key>` when it is complete. A run
    that was killed leaves the partial folder, and the next keeps its finished shards if sources and parameters are the
    same; one that fails leaves nothing. A dataset is sharded by one process at a time.

    Args:
        config: the experiment.
        key: of `config.data.datasets`.
        raw_root: folder of the raw folders, usually data/raw.
        out_root: folder of the shard folders, usually data/shards.
        progress: as `cigpose.progress.progress`.

    Raises:
        DataError: unknown key, unreadable file, more bad samples than allowed, or no person at all.
        FileNotFoundError: a raw file is missing.
        ChildProcessError: a process of several was killed.
        ClaimedError: another process shards this dataset.
    """
    if key not in config.data.datasets:
        raise DataError(f"data.datasets: no dataset {key!r}. There are: {', '.join(config.data.datasets)}.")
    if "." in key or "/" in key:
        raise DataError(f"data.datasets.{key}: a dataset's name must have no dot and no slash; shards are named by it.")
    dataset = config.data.datasets[key]
    final, partial = Path(out_root) / key, Path(out_root) / f"{key}.partial"
    raw = Path(raw_root) / dataset.raw
    sources = _source_paths(dataset, raw)
    # Not in out_root: DVC takes its digest, and a lock's content is another every time.
    lock = Path(out_root).with_name(f".{Path(out_root).name}-{key}.lock")
    with claimed(lock, f"a sharding of {key}"):
        clear_leftovers(final)
        _prepare(partial, _fingerprint(config, key, sources))
        try:
            with ThreadPoolExecutor(1) as thread:
                digests = thread.submit(_digests, raw, sources)
                index = _write(config, key, raw, partial, digests, progress)
        except ChildProcessError:
            raise
        except (ValueError, OSError):
            shutil.rmtree(partial, ignore_errors=True)  # the input must change, and then nothing of it can be kept
            raise
        replace_folder(partial, final)
    return index


def _write(
    config: Config, key: str, raw: Path, partial: Path, digests: Future[dict[str, str]], progress: Callable[..., Any]
) -> ShardIndex:
    dataset, sharding = config.data.datasets[key], config.data.sharding
    read, pictures = _READERS[dataset.reader]
    with Intake(partial, config.keypoint_set, ground_truth=dataset.ground_truth) as intake:
        read(dataset, raw, intake)
        intake.settle_categories()
    total = max(intake.num_annotations, 1)
    jobs = _Jobs(config, key, partial, intake)
    intake.bad.check(total, sharding.max_bad_share, key)
    if not jobs:
        raise DataError(
            f"{key}: no picture with a valid person; dropped: {dict(intake.dropped)}. Is this the right file?"
        )
    shards: list[ShardStats] = []
    synced: list[Future[None]] = []
    # One thread waits for the disk while the next shard is made.
    with ThreadPoolExecutor(1) as disk, progress(total=jobs.num_samples, desc=f"shard {key}", unit="image") as bar:
        for job, stats in run_jobs(jobs, pictures, sharding.processes):
            shards.append(stats)
            synced.append(disk.submit(sync, job.path))
            intake.bad.merge(stats.bad)
            intake.dropped.update(stats.dropped)
            intake.bad.check(total, sharding.max_bad_share, key)
            bar.update(len(job.samples))
    if dataset.ground_truth:
        lost = jobs.lost.union(*(shard.lost for shard in shards))
        write_ground_truth(intake, partial / GROUND_TRUTH, lost)
    for done in synced:
        done.result()
    truth = sha256_of(partial / GROUND_TRUTH) if dataset.ground_truth else None
    index = _index(config, key, intake, shards, digests.result(), truth)
    _clear(partial, shards)
    write_json(partial / INDEX, asdict(index), sort_keys=True)
    return index


def _index(
    config: Config,
    key: str,
    intake: Intake,
    shards: list[ShardStats],
    digests: dict[str, str],
    truth_sha256: str | None,
) -> ShardIndex:
    filled = [shard for shard in shards if shard.images]
    if not filled:
        raise DataError(f"{key}: no picture could be read: {'; '.join(intake.bad.examples) or dict(intake.dropped)}.")
    columns = ("name", "sha256", "bytes", "images", "persons", "detections")
    return ShardIndex(
        format=FORMAT,
        dataset=key,
        keypoints=config.keypoint_set.name,
        num_keypoints=len(config.keypoint_set),
        images=sum(shard.images for shard in filled),
        persons=sum(shard.persons for shard in filled),
        detections=sum(shard.detections for shard in filled),
        dropped={reason: count for reason, count in sorted(intake.dropped.items()) if count},
        sources=digests,
        ground_truth=None if truth_sha256 is None else GROUND_TRUTH,
        ground_truth_sha256=truth_sha256,
        shards=tuple(ShardEntry(**{column: getattr(shard, column) for column in columns}) for shard in filled),
        bad={"count": intake.bad.count, "examples": intake.bad.examples},
        mended=dict(sorted(intake.mended.items())),
    )


class _Jobs(Sequence[ShardJob]):
    """The jobs of a dataset, each made when it is asked for: the samples of all at once would be most of the memory.

    Args:
        config: the experiment.
        key: of the dataset.
        partial: folder of the shards.
        intake: all of the dataset.

    Attributes:
        num_samples: pictures in all jobs.
        lost: ids of pictures that are listed and not there; they are counted as bad by `intake`.
    """

    def __init__(self, config: Config, key: str, partial: Path, intake: Intake) -> None:
        self._sharding, self._dataset = config.data.sharding, config.data.datasets[key]
        self._stem, self._intake = partial / key, intake
        self._first, self._offsets, self._lengths = intake.persons_by_picture()
        self.lost: set[int] = set()
        self._places, peopled = array("q"), array("q")
        for place, picture in enumerate(intake.pictures):
            num_persons = int(self._first[place + 1] - self._first[place])
            counts = num_persons or self._boxes(place)
            if not counts and not (self._dataset.ground_truth and isinstance(picture.source, Frame)):
                continue  # for the ground truth: only their clip can tell whether frames without persons exist
            if picture.source is None:
                problem = f"image {picture.image_id}: {picture.file_name} is not in {self._dataset.images}"
                intake.bad.add(problem, max(num_persons, 1))
                self.lost.add(picture.image_id)
                continue
            if counts:
                peopled.append(len(self._places))
            self._places.append(place)
        self.num_samples = len(self._places)
        count = -(-len(peopled) // self._sharding.images_per_shard)
        # of equal size, within one
        self._bounds = [0, *(peopled[len(peopled) * i // count] for i in range(1, count)), self.num_samples]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return ShardJob(
            path=self._stem.with_name(f"{self._stem.name}-{number:05d}.tar"),
            samples=tuple(map(self._sample, self._places[self._bounds[number] : self._bounds[number + 1]])),
            persons_file=self._intake.persons_file,
            jpeg_quality=self._sharding.jpeg_quality,
            verify_images=self._sharding.verify_images,
            shuffle=self._sharding.shuffle,
        )

    def _boxes(self, place: int) -> tuple[bytes, ...] | None:
        return tuple(self._intake.detections.get(place, ())) if self._dataset.detections is not None else None

    def _sample(self, place: int) -> Sample:
        rows = slice(self._first[place], self._first[place + 1])
        persons = tuple(zip(self._offsets[rows].tolist(), self._lengths[rows].tolist(), strict=True))
        return Sample(picture=self._intake.pictures[place], persons=persons, detections=self._boxes(place))


def _source_paths(dataset: DatasetConfig, raw: Path) -> dict[str, Path]:
    specs = (dataset.images, dataset.annotations, dataset.detections, dataset.split_file)
    names = sorted({split_spec(spec)[0] for spec in specs if spec is not None})
    for name in names:
        if not (raw / name).exists():
            raise FileNotFoundError(
                f"{raw / name}: not found. Download it (`dvc repro`), or correct it in params.yaml."
            )
    return {name: raw / name for name in names}


def _digests(raw: Path, sources: dict[str, Path]) -> dict[str, str]:
    """Sha256 of each source: as recorded by the download for a file not touched since, else computed."""
    try:
        known = read_manifest(raw)
    except ValueError:
        known = {}  # somebody else's file of that name
    recorded_at = (raw / MANIFEST).stat().st_mtime_ns if known else 0
    digests = {}
    for name, path in sorted(sources.items()):
        entry, facts = known.get(name), path.stat()
        untouched = entry is not None and facts.st_size == entry.bytes and facts.st_mtime_ns <= recorded_at
        digests[name] = entry.sha256 if entry is not None and untouched else sha256_of(path)
    return digests


def _fingerprint(config: Config, key: str, sources: dict[str, Path]) -> str:
    """What must be equal for shards of an earlier, interrupted run to be kept."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "dataset": asdict(config.data.datasets[key]),
        "sharding": {k: v for k, v in asdict(config.data.sharding).items() if k not in ("processes", "max_bad_share")},
        "keypoints": dict(config.keypoint_set.annotation_fields),
    }
    for name, path in sources.items():
        files = [extent.path for extent in list_members(path).values()] if path.is_dir() else [str(path)]
        facts[f"source {name}"] = [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _prepare(partial: Path, fingerprint: str) -> None:
    """An empty partial folder, or that of an interrupted run over the same input."""
    plan = partial / "plan.json"
    if not (plan.is_file() and plan.read_text() == json.dumps(fingerprint)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(plan, json.dumps(fingerprint))


def _clear(partial: Path, shards: list[ShardStats]) -> None:
    """Remove everything from the partial folder that is not part of the dataset."""
    keep = {shard.name for shard in shards if shard.images} | {GROUND_TRUTH}
    for file in partial.iterdir():
        if file.name not in keep:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
