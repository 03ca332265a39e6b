"""Augmented training crops per second and core, against the original's way of making them.

    python tests/benchmarks/bench_loader.py [--folder DIR] [--images 160] [--rounds 7]

Both sides make the same stage-1 crops, 256 x 192 with 133 keypoints, of the same rendered 640 x 480 pictures, and are
timed in CPU seconds, in turn. The plain way reads and decodes the file anew for each person, mirrors the whole picture,
cuts with `cv2.warpAffine`, changes HSV in int16, calls an albumentations Compose, makes float SimCC targets, and stacks
a batch. Equal pixels are checked with the rounded resampling of OpenCV up to 4.10 (see `crop_image`) and with blurs and
dropout that get the loader's drawn numbers. "Bare steps" is the loader without the Compose: the same transforms are
called only when a draw says so, and dropout is written into the crop, as it was before users could add transforms.
"Left to the device" is what the loader's cores have to do with `augmentation.device: gpu`.
"By offset" is the loader that read tars by tables of offsets and not through webdataset (`offset_loader`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CIGPOSE_NO_PROGRESS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
import numpy as np
import torch
from offset_loader import offset_batches

from cigpose.config import AugmentationStage, Config, DatasetConfig, RenderConfig, load_preset
from cigpose.crop import box_to_center_scale, crop_image
from cigpose.keypoints import KeypointSet
from cigpose.loader import batches as loader_module
from cigpose.loader import crops as crops_module
from cigpose.loader.augment import (
    MIN_VISIBLE_FOR_HALF_BODY,
    PREFER_UPPER_BODY,
    PersonBox,
    draw_box_change,
    half_body,
    person_matrix,
)
from cigpose.loader.batches import TrainLoader, train_loader
from cigpose.loader.crops import CropMaker
from cigpose.loader.device import change_pixels
from cigpose.loader.pixels import PixelAugmentation, change_hsv, draw_hsv_gains
from cigpose.loader.samples import read_record, read_shard
from cigpose.loader.shards import ShardSet
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset

GOAL = 3.0
GOAL_OF_BARE = 0.95
GOAL_OF_OFFSETS = 0.95
PERSONS_PER_IMAGE = 2.3
BATCH = 64
NAME = "bench"
Resample = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]


def prepare(folder: Path, num_images: int) -> Config:
    """Pictures as files, and shards of the same."""
    base = load_preset("cigpose-m_coco-wholebody_256x192")
    dataset = DatasetConfig(raw=NAME, reader="coco", images="images.zip", annotations="annotations.json")
    sharding = replace(base.data.sharding, processes=1, images_per_shard=50)
    data = replace(base.data, datasets={NAME: dataset}, train=(NAME,), val=NAME, sharding=sharding)
    loader = replace(base.train.loader, processes=0, shuffle_buffer=200, open_shards=4)
    cluster = replace(base.train.cluster, num_workers=1)
    train = replace(base.train, batch_total=BATCH, accumulate_steps=1, cluster=cluster, loader=loader)
    config = replace(base, data=data, train=train)
    raw = folder / "raw" / NAME
    if not (raw / "annotations.json").is_file():
        raw.mkdir(parents=True, exist_ok=True)
        render_dataset(RenderConfig(seed=1, num_images=num_images, image_size=(640, 480), max_persons=6), raw)
        _thin_out(raw / "annotations.json")
        zipfile.ZipFile(raw / "images.zip").extractall(raw)
        write_dataset(config, NAME, folder / "raw", folder / "shards")
    return config


def _thin_out(path: Path) -> None:
    """Leave out the fullest pictures until 2.3 persons are on each, as COCO has."""
    truth = json.loads(path.read_text())
    count = Counter(a["image_id"] for a in truth["annotations"])
    images = sorted(truth["images"], key=lambda image: count[image["id"]])
    while sum(count[image["id"]] for image in images) > PERSONS_PER_IMAGE * len(images):
        images.pop()
    kept = {image["id"] for image in images}
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
    path.write_text(json.dumps(truth))


def people_of(config: Config, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Key -> (file, record of the person), in the order of the shards: the original's annotations in memory."""
    shards = ShardSet.open(NAME, folder / "shards", {})
    people = {}
    for number in range(len(shards.index.shards)):
        for sample in read_shard(shards, number):
            record, key = read_record(sample), sample["__key__"]
            for person in record["persons"]:
                points = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
                parsed = {"box": np.array(person["bbox_xyxy"]), "points": points[:, :2], "visible": points[:, 2] > 0}
                path = folder / "raw" / NAME / "images" / Path(record["file_name"]).name
                people[f"{NAME}/{key}#{person['id']}"] = (path, parsed)
    return people


class PlainWay:
    """The original's steps, one person at a time, every array as large as it makes it."""

    def __init__(self, config: Config, *, resample: Resample, targets: bool) -> None:
        self.config, self.resample, self.targets = config, resample, targets
        self.stage = config.augmentation.stage1
        self.maker = CropMaker(config, epoch=0)
        self.steps = PixelAugmentation(self.stage, config.keypoint_set).original[1:]
        self.compose = None if resample is crop_image else albumentations.Compose(self._library())
        self.size = config.model.input_size

    def sample(self, key: str, path: Path, person: dict[str, Any]) -> dict[str, Any]:
        rng, stage, keypoints = self.maker.generator(key), self.stage, self.config.keypoint_set
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        center, scale = box_to_center_scale(person["box"], self.config.augmentation.box_padding)
        points, visible = person["points"].copy(), person["visible"].astype(np.float32)
        width = image.shape[1]
        if rng.random() < stage.flip_prob:
            image = cv2.flip(image, 1)
            points, visible = points[keypoints.flip_index], visible[keypoints.flip_index]
            points[:, 0], center[0] = width - 1 - points[:, 0], width - 1 - center[0]
        subject = PersonBox(points, visible, center, scale, (width, image.shape[0]))
        apply, upper = rng.random(2) < (stage.half_body_prob, PREFER_UPPER_BODY)
        if apply and np.sum(visible > 0) >= MIN_VISIBLE_FOR_HALF_BODY:
            subject = half_body(subject, bool(upper), keypoints)
        offset, factor, rotation = draw_box_change(rng, stage)
        center, scale = subject.center + offset * subject.scale, subject.scale * factor
        matrix = person_matrix(replace(subject, center=center, scale=scale, rotation=rotation), self.size)
        crop = self.resample(image, matrix, self.size)
        points = cv2.transform(points[None], matrix)[0]
        crop = self._pixels(crop, rng)
        sample = {"keypoints": points, "crop": torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))}
        if self.targets:
            sample["x"], sample["y"], sample["weight"] = self._targets(points, visible)
        return sample

    def _pixels(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn = random.Random(int(rng.integers(1 << 63)))
        drawn.random()  # Compose draws whether to do anything
        gains = draw_hsv_gains(rng, self.stage)
        hsv = cv2.cvtColor(crop, cv2.COLOR_BGR2HSV).astype(np.int16)
        hsv[..., 0] = (hsv[..., 0] + gains[0]) % 180
        hsv[..., 1] = np.clip(hsv[..., 1] + gains[1], 0, 255)
        hsv[..., 2] = np.clip(hsv[..., 2] + gains[2], 0, 255)
        crop = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)
        if self.compose is not None:
            return self.compose(image=crop)["image"]
        for transform in self.steps:
            transform.set_random_state(rng, drawn)
            crop = transform(image=crop)["image"]
        return crop

    def _library(self) -> list[Any]:
        stage, (low, high) = self.stage, self.stage.dropout_size
        hole = {"hole_height_range": (low, high), "hole_width_range": (low, high), "num_holes_range": (1, 1)}
        return [
            albumentations.Blur(p=stage.blur_prob),
            albumentations.MedianBlur(p=stage.median_blur_prob),
            albumentations.CoarseDropout(**hole, fill=0, p=stage.dropout_prob),
        ]

    def _targets(self, points: np.ndarray, visible: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        simcc = self.config.model.simcc
        bins = [int(side * simcc.split_ratio) for side in self.size]
        target = [np.zeros((len(points), num), dtype=np.float32) for num in bins]
        axes = [np.arange(num, dtype=np.float32) for num in bins]
        weight = visible.copy()
        for k in range(len(points)):
            if visible[k] < 0.5:
                continue
            middle = np.rint(points[k] * simcc.split_ratio)
            reach = 3 * np.asarray(simcc.sigma)
            if ((middle - reach >= bins) | (middle + reach + 1 < 0)).any():
                weight[k] = 0
                continue
            for axis in range(2):
                target[axis][k] = np.exp(-((axes[axis] - middle[axis]) ** 2) / (2 * simcc.sigma[axis] ** 2))
        return torch.from_numpy(target[0]), torch.from_numpy(target[1]), torch.from_numpy(weight)

    def batches(self, people: dict[str, tuple[Path, dict[str, Any]]]) -> Iterator[dict[str, torch.Tensor]]:
        keys = list(people)
        for start in range(0, len(keys), BATCH):
            samples = [self.sample(key, *people[key]) for key in keys[start : start + BATCH]]
            stacked = [name for name in samples[0] if name != "keypoints"]
            yield {name: torch.stack([sample[name] for sample in samples]) for name in stacked}


class BareSteps:
    """In the place of `PixelAugmentation`: the least that the original's steps can cost."""

    def __init__(self, stage: AugmentationStage, keypoint_set: KeypointSet) -> None:
        self._stage = stage
        self._steps = PixelAugmentation(stage, keypoint_set).original[1:]

    def __call__(self, crop: np.ndarray, keypoints: np.ndarray, visible: np.ndarray, rng: np.random.Generator) -> Any:
        drawn = random.Random(int(rng.integers(1 << 63)))
        drawn.random()  # as in a Compose, so that both blur the same crops
        crop = change_hsv(crop, draw_hsv_gains(rng, self._stage))
        for transform in self._steps:
            if transform.p < 1 and drawn.random() >= transform.p:
                continue
            transform.set_random_state(rng, drawn)
            if isinstance(transform, albumentations.CoarseDropout):
                holes = transform.get_params_dependent_on_data({"shape": crop.shape}, {})["holes"]
                for left, top, right, bottom in holes:
                    crop[top:bottom, left:right] = 0
            else:
                crop = transform(image=crop, force_apply=True)["image"]
        return crop, keypoints, visible


def bare(config: Config, folder: Path) -> Iterator[Any]:
    """The loader's batches with `BareSteps`."""
    crops_module.PixelAugmentation = BareSteps  # type: ignore[misc, assignment]
    try:
        yield from ours(config, folder)
    finally:
        crops_module.PixelAugmentation = PixelAugmentation  # type: ignore[misc]


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR)


def ours(config: Config, folder: Path) -> Any:
    return train_loader(config, epoch=0, rank=0, world=1, root=folder / "shards")


def left_to_device(config: Config, folder: Path) -> Iterator[Any]:
    """The loader's batches with the pixels as they were cut out, and what was drawn for them."""
    config = replace(config, train=replace(config.train, epochs=1))  # or the next one would be begun
    with closing(TrainLoader(config, rank=0, world=1, root=folder / "shards", on_device=True)) as loader:
        yield from loader.batches(0)


def crops_of(batches: Any) -> dict[str, np.ndarray]:
    return {k: crop.numpy() for batch in batches for k, crop in zip(batch["keys"], batch["crops"], strict=True)}


def check_equal(config: Config, folder: Path, people: dict[str, tuple[Path, dict[str, Any]]]) -> int:
    """Largest difference to the plain way, in grey levels."""
    crops, worst = crops_of(ours(config, folder)), 0
    assert crops.keys() == people.keys()
    plain = PlainWay(config, resample=crop_image, targets=False)
    for key, crop in crops.items():
        other = plain.sample(key, *people[key])["crop"].numpy()[::-1].transpose(1, 2, 0)
        worst = max(worst, int(np.abs(crop.astype(int) - other).max()))
    return worst


def compare_with_device(config: Config, folder: Path, whole: dict[str, np.ndarray]) -> str:
    """How far the pixels that `change_pixels` makes, here on the CPU, are from the loader's."""
    worst, num, num_values = 0, 0, 0
    for batch in left_to_device(config, folder):
        change_pixels(batch["crops"], batch["drawn"])
        for key, crop in zip(batch["keys"], batch["crops"].numpy(), strict=True):
            difference = np.abs(whole[key].astype(int) - crop)
            worst, num, num_values = (
                max(worst, int(difference.max())),
                num + np.count_nonzero(difference),
                num_values + crop.size,
            )
    return f"{worst} grey levels, {num / num_values:.1e} of the values differ"


def cpu_seconds(job: Any) -> float:
    start = time.process_time()
    for _ in job:
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the pictures here for another run")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        config = prepare(folder, options.images)
        people = people_of(config, folder)
        images = len({path for path, _ in people.values()})
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, OpenCV {cv2.__version__}")
        print(f"{images} pictures of 640 x 480, {len(people)} persons, {len(people) / images:.2f} on each")
        print(f"largest difference of a pixel: {check_equal(config, folder, people)} grey levels")
        shards = ShardSet.open(NAME, folder / "shards", {})
        whole, offsets = crops_of(ours(config, folder)), crops_of(offset_batches(config, shards, BATCH))
        print(f"the same by offset: {all(np.array_equal(whole[key], offsets[key]) for key in whole)}")
        print(f"largest difference on a device: {compare_with_device(config, folder, whole)}")
        steps = crops_of(bare(config, folder))
        print(f"the same with bare steps: {all(np.array_equal(whole[key], steps[key]) for key in whole)}")
        scaled = replace(config, train=replace(config.train, loader=replace(config.train.loader, scaled_decode=True)))
        sides = {
            "ours": lambda: ours(config, folder),
            "by offset": lambda: loader_module._prefetched(offset_batches(config, shards, BATCH), 4),
            "bare steps": lambda: bare(config, folder),
            "ours, scaled decoding": lambda: ours(scaled, folder),
            "left to the device": lambda: left_to_device(config, folder),
            "plain": lambda: PlainWay(config, resample=warp, targets=True).batches(people),
            "plain, no targets": lambda: PlainWay(config, resample=warp, targets=False).batches(people),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds):  # forth and back, so that nobody always comes after the same one
            for name in list(sides)[:: -1 if number % 2 else 1]:
                times[name].append(cpu_seconds(sides[name]()))
        for name, values in times.items():
            print(f"{name:<22} {len(people) / statistics.median(values):7.0f} crops per second and core")
        goals = {
            ("ours", "plain"): f", goal {GOAL}",
            ("ours", "by offset"): f", goal {GOAL_OF_OFFSETS}",
            ("ours", "bare steps"): f", goal {GOAL_OF_BARE}",
        }
        for name in ("ours", "ours, scaled decoding"):
            for other in ("plain", "plain, no targets", *(["by offset", "bare steps"] if name == "ours" else [])):
                ratios = sorted(b / a for a, b in zip(times[name], times[other], strict=True))
                goal = goals.get((name, other), "")
                middle = statistics.median(ratios)
                print(f"{name} / {other}: {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}){goal}")
        less = sorted(a / b for a, b in zip(times["ours"], times["left to the device"], strict=True))
        print(f"left to the device / ours: {statistics.median(less):.2f} ({less[0]:.2f} to {less[-1]:.2f})")
        full, small = crops_of(ours(config, folder)), crops_of(ours(scaled, folder))
        means = [np.abs(full[key].astype(int) - small[key]).mean() for key in full]
        changed = sum(mean > 0 for mean in means)
        size = sum(means) / max(changed, 1)
        print(f"scaled decoding changes {changed} of {len(means)} crops, those by {size:.2f} grey levels on average")


if __name__ == "__main__":
    main()
