"""Sharding against `cp` of the same zip, against a hand-made tar writer, and its memory with a very large file.

    python tests/benchmarks/bench_shard.py [--folder DIR] [--images 4000] [--annotations-gb 2.0] [--repeats 5]
    python tests/benchmarks/bench_shard.py --images 0 --annotations-gb 0 --people 10000000 [--people-per-picture 100]

Speed: a stored zip of COCO-like JPEGs with 2.2 persons on each, as COCO has: of 17 keypoints and of 133. Every figure
is a ratio to `cp` in the same round, medians over the rounds: both end in fsync, with the zip in the page cache and
read from the disk. Writer: the whole stage with webdataset's TarWriter, and with the header writer that it replaced
(kept here for this), in turn, and both alone. Memory: the largest resident set of the whole stage (a process of its
own) with a synthetic COCO-WholeBody file, and, if asked for, with so many people of 17 keypoints, ground truth and all
(10 million: 30 GB of disk, half an hour).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("CIGPOSE_NO_PROGRESS", "1")

from cigpose.config import Config, DatasetConfig, ShardingConfig, load_preset
from cigpose.files.jpeg import check_jpeg
from cigpose.files.jsonstream import parse_element, split_arrays
from cigpose.keypoints import keypoint_set
from cigpose.shard import tars
from cigpose.shard.index import read_index
from cigpose.shard.write import write_dataset

MB = 1e6


def experiment(keypoints: str, ground_truth: bool, **sharding: Any) -> Config:
    """An experiment with one dataset, `people`."""
    base = load_preset("quickstart")
    names = {"images": "images.zip", "annotations": f"{keypoints}.json"}
    people = DatasetConfig(raw=".", reader="coco", ground_truth=ground_truth, **names)
    data = replace(base.data, datasets={**base.data.datasets, "people": people}, sharding=ShardingConfig(**sharding))
    train = replace(base.train, validation=replace(base.train.validation, metric="body/AP"))
    evaluate = replace(base.evaluate, metric="body/AP")
    return replace(base, data=data, keypoints=keypoints, train=train, evaluate=evaluate)


def make_zip(path: Path, images: int) -> int:
    """A stored zip of one 640x480 picture of about 160 kB, COCO's mean, many times over; its size in bytes."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 255, (60, 80, 3), np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(images):
            archive.writestr(f"train2017/{i:012d}.jpg", jpeg)
    return path.stat().st_size


def write_annotations(path: Path, images: int, annotations: int, outlines: bool = True) -> int:
    """COCO-like JSON of the keypoint set the file is named after, written piece by piece; its size in bytes."""
    rng = random.Random(0)
    bodies = []
    for _ in range(50):
        fields: dict[str, Any] = {"num_keypoints": 17, "iscrowd": 0, "category_id": 1, "area": 4321.5}
        for name, count in keypoint_set(path.stem).annotation_fields.items():
            whole = name == "keypoints"
            fields[name] = [
                value
                for _ in range(count)
                for value in (
                    rng.randrange(640) if whole else round(rng.uniform(0, 640), 5),
                    rng.randrange(480) if whole else round(rng.uniform(0, 480), 5),
                    2 if whole else rng.choice([1, round(rng.random(), 6)]),
                )
            ]
        if outlines:
            fields["segmentation"] = [[round(rng.uniform(0, 640), 2) for _ in range(80)]]
        bodies.append(json.dumps(fields)[1:-1])
    with path.open("w", buffering=1 << 20) as file:
        file.write('{"info": {"description": "made up"}, "licenses": [], "images": [')
        for i in range(images):
            urls = f'"coco_url": "http://nowhere/{i:012d}.jpg", "flickr_url": "http://nowhere/else/{i:012d}_z.jpg"'
            file.write(
                f'{", " * (i > 0)}{{"id": {i}, "file_name": "{i:012d}.jpg", "width": 640, "height": 480, {urls}}}'
            )
        file.write('], "annotations": [')
        for i in range(annotations):
            box = f'"bbox": [{rng.randrange(300)}.5, {rng.randrange(200)}, 120.25, 200]'
            body = bodies[i % len(bodies)]
            file.write(f'{", " * (i > 0)}{{"id": {i}, "image_id": {rng.randrange(images)}, {box}, {body}}}')
        file.write('], "categories": [{"id": 1, "name": "person"}]}')
    return path.stat().st_size


def forget(path: Path) -> None:
    """Let the page cache drop a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    """`cp`, until the bytes are on the disk."""
    subprocess.run(["cp", str(source), str(target)], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def shard(raw: Path, out: Path, keypoints: str = "coco_wholebody", ground_truth: bool = False, **sharding: Any) -> None:
    """The whole stage but for the digest of the zip, which the download has recorded."""
    write_dataset(experiment(keypoints, ground_truth, **sharding), "people", raw, out)


def record_digests(raw: Path) -> None:
    """What the download leaves beside its files."""
    files = [
        {
            "file": name,
            "bytes": (raw / name).stat().st_size,
            "sha256": "0" * 64,
            "published": None,
            "url": "",
            "licence": "",
        }
        for name in ("images.zip", "coco.json", "coco_wholebody.json")
        if (raw / name).is_file()
    ]
    (raw / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def measure_speed(folder: Path, images: int, repeats: int) -> None:
    """Print the ratios to `cp`."""
    raw, out = folder / "raw", folder / "out"
    raw.mkdir()
    size = make_zip(raw / "images.zip", images) / MB
    for keypoints in ("coco", "coco_wholebody"):
        write_annotations(raw / f"{keypoints}.json", images, images * 22 // 10)
    record_digests(raw)
    cores = sorted(os.sched_getaffinity(0))
    variants: dict[str, tuple[set[int], dict[str, Any]]] = {
        "one core, 17 keypoints": ({cores[0]}, {"processes": 1, "keypoints": "coco"}),
        "one core, 133 keypoints": ({cores[0]}, {"processes": 1}),
        "one core, 133 keypoints, every picture decoded": ({cores[0]}, {"processes": 1, "verify_images": True}),
        f"{len(cores)} cores, 133 keypoints": (set(cores), {"processes": len(cores), "images_per_shard": images // 8}),
    }
    print(f"zip of {size:.0f} MB, {images} pictures, {images * 22 // 10} persons")
    for cold in (False, True):
        ratios: dict[str, list[float]] = {name: [] for name in variants}
        rates: list[float] = []
        for _ in range(repeats):
            copied = _round(raw, cold, lambda: copy(raw / "images.zip", folder / "copy.zip"))
            (folder / "copy.zip").unlink()
            rates.append(size / copied)
            for name, (where, options) in variants.items():
                os.sched_setaffinity(0, where)
                taken = _round(raw, cold, lambda options=options: shard(raw, out, **options))
                os.sched_setaffinity(0, set(cores))
                shutil.rmtree(out)
                ratios[name].append(copied / taken)
        print(f"{'read from disk' if cold else 'in page cache'}: cp {statistics.median(rates):.0f} MB/s")
        for name, values in ratios.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            print(f"  shard, {name}: {statistics.median(values):.2f} of cp ({spread})")
    _print_parts(raw)


class HeaderWriter:
    """The least a tar needs: one template of a header, name, size and checksum filled in, one call a sample."""

    _TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, sample: dict[str, Any]) -> None:
        pieces: list[bytes | memoryview] = []
        for suffix in ("jpg", "json"):
            data = sample[suffix]
            pieces += (self._header(f"{sample['__key__']}.{suffix}", len(data)), data, bytes(-len(data) % 512))
        self._put(pieces)

    def close(self) -> None:
        self._put([bytes(1024 + -(self._file.size + 1024) % tarfile.RECORDSIZE)])

    def _put(self, pieces: list[bytes | memoryview]) -> None:
        assert os.writev(self._file._descriptor, pieces) == sum(map(len, pieces))
        for piece in pieces:
            self._file._digest.update(piece)
        self._file.size += sum(map(len, pieces))

    def _header(self, name: str, size: int) -> bytes:
        header = bytearray(self._TEMPLATE)
        header[: len(name)] = name.encode()
        header[124:135] = b"%011o" % size
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header)


@contextmanager
def by_headers(file: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """In the place of `tars._tar_writer`."""
    writer = HeaderWriter(file)
    yield writer.write
    writer.close()
    file.close()


def measure_writers(folder: Path, images: int, repeats: int) -> None:
    """Print what webdataset's writer costs the stage, and alone."""
    raw, out = folder / "raw", folder / "out"
    raw.mkdir()
    make_zip(raw / "images.zip", images)
    write_annotations(raw / "coco_wholebody.json", images, images * 22 // 10)
    record_digests(raw)
    with zipfile.ZipFile(raw / "images.zip") as archive:
        jpeg = archive.read(archive.namelist()[0])
    writers = {"webdataset": tars._tar_writer, "headers": by_headers}

    def stage(writer: Any) -> None:
        tars._tar_writer = writer  # type: ignore[assignment]
        shard(raw, out, processes=1, images_per_shard=-(-images // 4))

    def alone(writer: Any) -> None:
        file = tars._DigestedFile(folder / "alone.tar")
        with writer(file) as write:
            for i in range(images // 4):
                write({"__key__": f"{i:012d}", "jpg": jpeg, "json": b" " * 5000})

    digests = set()
    for what, action in (("the stage, one core", stage), ("the writer alone, one shard", alone)):
        times: dict[str, list[float]] = {name: [] for name in writers}
        for name in list(writers) * (repeats + 1):
            start = time.process_time()
            action(writers[name])
            times[name].append(time.process_time() - start)
            if action is stage:
                digests.add(tuple(entry.sha256 for entry in read_index(out / "people").shards))
                shutil.rmtree(out)
        ratios = [a / b for a, b in zip(*(times[name][1:] for name in writers), strict=True)]  # the first imports
        seconds_each = ", ".join(f"{name} {statistics.median(values[1:]):.2f} s" for name, values in times.items())
        print(
            f"{what}: {seconds_each} of CPU; {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"  shards of equal bytes: {'yes' if len(digests) == 1 else 'NO'}")
    code = "import time; a = time.process_time(); import webdataset; print(time.process_time() - a)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    print(f"  importing webdataset, once a process: {float(imported):.2f} s")


def _round(raw: Path, cold: bool, action: Callable[[], Any]) -> float:
    if cold:
        for path in raw.iterdir():
            forget(path)
    return seconds(action)


def _print_parts(raw: Path) -> None:
    """Where the time of one core goes."""
    with zipfile.ZipFile(raw / "images.zip") as archive:
        jpeg = archive.read(archive.namelist()[0])
    many = range(200)
    pixels = np.frombuffer(jpeg, np.uint8)
    cv2.setNumThreads(0)
    path = raw / "coco_wholebody.json"
    with path.open("rb") as file:
        parse = seconds(lambda: _count(parse_element(raw, "") for _, raw in split_arrays(file, "", ("annotations",))))
    print("parts, one core:")
    print(
        f"  look at header and end of a picture: {seconds(lambda: [check_jpeg(jpeg) for _ in many]) / 200 * 1e6:.0f} us"
    )
    decode = seconds(lambda: [cv2.imdecode(pixels, cv2.IMREAD_COLOR) for _ in many]) / 200
    print(f"  decode it: {decode * 1e6:.0f} us")
    print(f"  split and parse annotations: {path.stat().st_size / MB / parse:.0f} MB/s")
    try:
        import ijson
    except ImportError:
        return
    with path.open("rb") as file:
        events = seconds(lambda: _count(ijson.items(file, "annotations.item", use_float=True)))
    print(f"  the same with ijson ({ijson.backend}): {path.stat().st_size / MB / events:.0f} MB/s")


def _count(items: Iterable[Any]) -> int:
    return sum(1 for _ in items)


CHILD = """
import resource, sys
sys.path.insert(0, {here!r})
import bench_shard
from pathlib import Path
bench_shard.shard(Path({raw!r}), Path({out!r}), processes=1, **{options!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of(raw: Path, out: Path, **options: Any) -> tuple[float, float]:
    """MiB of the largest resident set of the stage in a process of its own, and its seconds."""
    code = CHILD.format(here=str(Path(__file__).parent), raw=str(raw), out=str(out), options=options)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / 1024, time.perf_counter() - started


def measure_memory(folder: Path, gigabytes: float) -> None:
    """Print the largest resident set of the stage with a synthetic annotation file."""
    raw, out = folder / "raw", folder / "out"
    raw.mkdir()
    path = raw / "coco_wholebody.json"
    probe = write_annotations(path, 100, 1000)
    annotations = max(int(gigabytes * 1e9 / probe * 1000), 1)
    images = max(annotations * 118287 // 262465, 1)
    size = write_annotations(path, images, annotations)
    make_tiny_zip(raw / "images.zip", images)
    record_digests(raw)
    peak, taken = peak_of(raw, out, images_per_shard=10000)
    print(
        f"annotations of {size / 1e9:.2f} GB, {annotations} persons, {images} pictures: {peak:.0f} MiB, {taken:.0f} s"
    )
    print(f"  largest resident set; goal: under 1536 MiB: {'met' if peak < 1536 else 'MISSED'}")


def make_tiny_zip(path: Path, images: int) -> None:
    """A stored zip of a small file of a black picture, many times over."""
    tiny = cv2.imencode(".jpg", np.zeros((480, 640, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(images):
            archive.writestr(f"{i:012d}.jpg", tiny)


def measure_people(folder: Path, people: int, per_picture: float) -> None:
    """Print the largest resident set of the stage with so many people, with ground truth."""
    raw, out = folder / "raw", folder / "out"
    raw.mkdir()
    images = max(int(people / per_picture), 1)
    size = write_annotations(raw / "coco.json", images, people, outlines=False)
    make_tiny_zip(raw / "images.zip", images)
    record_digests(raw)
    peak, taken = peak_of(raw, out, keypoints="coco", ground_truth=True)
    sharded = read_index(out / "people").persons
    print(
        f"{sharded} of {people} persons on {images} pictures (annotations of {size / 1e9:.2f} GB), with ground truth: "
        f"largest resident set {peak:.0f} MiB, {taken:.0f} s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work, on the disk in question; default: a temporary one")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--annotations-gb", type=float, default=2.0, help="0: leave the memory measurement out")
    parser.add_argument("--people", type=int, default=0, help="of the measurement of memory with many; 0: leave it out")
    parser.add_argument("--people-per-picture", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")
    for measure, wanted in (
        (lambda folder: measure_speed(folder, options.images, options.repeats), options.images > 0),
        (lambda folder: measure_writers(folder, options.images, options.repeats), options.images > 0),
        (lambda folder: measure_memory(folder, options.annotations_gb), options.annotations_gb > 0),
        (lambda folder: measure_people(folder, options.people, options.people_per_picture), options.people > 0),
    ):
        if wanted:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                measure(Path(folder))


if __name__ == "__main__":
    main()
