"""Rendered people per second on one core.

    python tests/benchmarks/bench_render.py

Chunks of pictures are timed in CPU seconds, in turn with a reference job (blurring a picture of the same size), so that
the ratio can be compared between machines, and between hours of a busy one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np

from cigpose.config import RenderConfig
from cigpose.render.dataset import render_jpeg

CONFIG = RenderConfig(seed=1, num_images=10_000, image_size=(400, 320))
CHUNKS, IMAGES = 20, 20
TARGET = 100
"""Persons per second and core."""


def cpu_seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def main() -> None:
    cv2.setNumThreads(1)
    noise = np.random.default_rng(0).integers(0, 255, (320, 400, 3), dtype=np.uint8)
    render_jpeg(CONFIG, 0)
    persons, images, references = [], [], []
    for chunk in range(CHUNKS):
        counts: list[int] = []

        def job(counts: list[int] = counts, first: int = chunk * IMAGES) -> None:
            counts.extend(len(render_jpeg(CONFIG, first + i)[1]) for i in range(IMAGES))

        taken = cpu_seconds(job)
        references.append(cpu_seconds(lambda: [cv2.GaussianBlur(noise, (0, 0), 3) for _ in range(50)]) / 50)
        persons.append(sum(counts) / taken)
        images.append(IMAGES / taken)
    ratio = statistics.median(1 / (rate * blur) for rate, blur in zip(persons, references, strict=True))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; pictures of {CONFIG.image_size}")
    for name, rates in (("persons", persons), ("images", images)):
        middle = statistics.median(rates)
        print(f"{name}/s and core: median {middle:.0f}, best {max(rates):.0f}, worst {min(rates):.0f}")
    print(f"one person costs {ratio:.1f} blurs of a {CONFIG.image_size} picture (sigma 3)")
    print(f"target {TARGET} persons/s and core: {'met' if max(persons) >= TARGET else 'NOT met'} by the best chunk")


if __name__ == "__main__":
    main()
