"""Time of `cigpose predict` on a video over the sum of its parts, each done alone: decode, detect, crop, model, draw.

    python tests/benchmarks/bench_video.py --picture people.jpg --detector yolox_nano.onnx [--model model.safetensors]

The video moves over the picture, 640 x 480. Encoding the drawn video counts to drawing. Without --model it is the
quickstart's network with fresh weights, whose work is the smallest, so that everything around it weighs most. Prints
the ratio in time of processors, which other work on the machine does not change much, and of the clock, where a ratio
below 1 is what the threads gain; each part, and frames a second.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from cigpose.config import load_preset
from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, fix_aspect_ratio
from cigpose.deploy.detector import Detector
from cigpose.deploy.predictor import Predictor
from cigpose.deploy.results import opened_folder
from cigpose.deploy.sources import find_media
from cigpose.deploy.video import predict_video
from cigpose.evaluate.predict import predict_crops
from cigpose.model.estimator import build_model


def film(path: Path, picture: np.ndarray, frames: int) -> None:
    """A video that moves over a picture."""
    large = cv2.resize(picture, (720, 540))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (640, 480))
    for number in range(frames):
        x, y = int(40 + 40 * np.sin(number / 20)), int(30 + 30 * np.cos(number / 25))
        writer.write(large[y : y + 480, x : x + 640])
    writer.release()


def timed(function: Callable[[], object]) -> np.ndarray:
    """Seconds of the clock, and of processors in all threads."""
    start = time.perf_counter(), time.process_time()
    function()
    return np.array([time.perf_counter() - start[0], time.process_time() - start[1]])


class Parts:
    """The parts, one after the other, in one thread."""

    def __init__(self, path: Path, predictor: Predictor, every: int) -> None:
        assert predictor.detector is not None
        self.path, self.predictor, self.detector, self.every = path, predictor, predictor.detector, every
        self.decode()
        self.boxes: list[np.ndarray] = []
        self.detect()
        self.crop()
        self.found = predictor.predict_many(self.frames, self.boxes)

    def decode(self) -> None:
        """All frames."""
        reader, self.frames = cv2.VideoCapture(str(self.path)), []
        while (item := reader.read())[0]:
            self.frames.append(item[1])

    def detect(self) -> None:
        """In every n-th frame; the others take its boxes."""
        found = [self.detector(frame) for frame in self.frames[:: self.every]]
        self.boxes = [found[number // self.every] for number in range(len(self.frames))]

    def crop(self) -> None:
        """Every person of every frame."""
        recipe, self.crops = self.predictor.recipe, []
        for frame, boxes in zip(self.frames, self.boxes, strict=True):
            center, scale = box_to_center_scale(boxes[:, :4].astype(np.float32), recipe.box_padding)
            for c, s in zip(center, fix_aspect_ratio(scale, recipe.input_size), strict=True):
                self.crops.append(crop_image(frame, crop_matrix(c, s, 0.0, recipe.input_size), recipe.input_size))

    def model(self) -> None:
        """The crops in batches."""
        batch = self.predictor.recipe.batch
        for start in range(0, len(self.crops), batch):
            predict_crops(self.predictor.model, torch.from_numpy(np.stack(self.crops[start : start + batch])))

    def draw(self) -> None:
        """And encode."""
        target = self.path.with_name("alone.mp4")
        writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (640, 480))
        for frame, poses in zip(self.frames, self.found, strict=True):
            writer.write(poses.plot(frame))
        writer.release()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--detect-every", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    detector = Detector(options.detector, threads=torch.get_num_threads())
    if options.model:
        predictor = Predictor.load(options.model, device="cpu", detector=detector)
    else:
        config = load_preset("quickstart")
        predictor = Predictor(build_model(config), config, device="cpu", detector=detector)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        film(path, cv2.imread(str(options.picture)), options.frames)
        parts, rows = Parts(path, predictor, options.detect_every), []
        (video,) = find_media([path]).videos
        for number in range(options.rounds):
            row = {name: timed(getattr(parts, name)) for name in ("decode", "detect", "crop", "model", "draw")}
            with opened_folder(Path(folder) / f"out-{number}", {}) as results:
                row["whole"] = timed(
                    lambda results=results: predict_video(  # type: ignore[misc]
                        predictor, video, results, detect_every=options.detect_every
                    )
                )
            rows.append(row)
    ratios = np.array([row["whole"] / sum(value for name, value in row.items() if name != "whole") for row in rows])
    for name, column in zip(("clock", "processors"), ratios.T, strict=True):
        low, high = column.min(), column.max()
        print(f"{name}: ratio {statistics.median(column):.2f} (from {low:.2f} to {high:.2f}, {len(rows)} rounds)")
    best = min(rows, key=lambda row: row["whole"][1])
    costs = "  ".join(f"{name} {value[1] / len(parts.frames) * 1000:.2f} ms" for name, value in best.items())
    print(f"{costs}  of processors a frame")
    persons = len(parts.crops) / len(parts.frames)
    print(f"{len(parts.frames) / best['whole'][0]:.1f} frames a second, {persons:.1f} persons in each")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads of torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
