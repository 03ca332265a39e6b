"""Time of the six whole-body evaluations: ours, from predictions to figures, over plain pycocotools run six times.

    python tests/benchmarks/bench_evaluate.py [--share 1.0] [--rounds 1]

Synthetic people at the size of COCO-WholeBody's validation: 5,000 pictures, 11,004 persons, 104,125 detected boxes
(--share takes less of each). Ours begins with the predictions: persons are scored and duplicates suppressed within the
time. pycocotools begins after that, with its rows already made. Prints both times, by the clock and by the processor,
their ratios, and whether all figures are equal to the last bit.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from whole_people import coco_rows, plain_pycocotools, whole_people

from cigpose.config import EvaluateConfig
from cigpose.config.outcome import FIGURES
from cigpose.evaluate.coco import evaluate_predictions, score_persons
from cigpose.keypoints import COCO_WHOLEBODY, parts_with_whole

Found = TypeVar("Found")


def timed(function: Callable[[], Found]) -> tuple[Found, float, float]:
    """What a function gives, its seconds, and those of the processor."""
    began, used = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - began, time.process_time() - used


def main() -> None:
    """Run both in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    sizes = [round(options.share * size) for size in (5_000, 104_125, 11_004)]
    predictions, truth = whole_people(*sizes)
    config, parts = EvaluateConfig(), parts_with_whole(COCO_WHOLEBODY)
    scored = score_persons(predictions, truth, COCO_WHOLEBODY, config)
    wall: list[tuple[float, float]] = []
    used: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        ours, *our_times = timed(lambda: evaluate_predictions(predictions, truth, COCO_WHOLEBODY, config))
        plain_times, equal = [0.0, 0.0], True
        for part, members in parts.items():
            rows = coco_rows(scored, truth, members)
            figures, *times = timed(lambda rows=rows, members=members: plain_pycocotools(rows, members))
            plain_times = [total + seconds for total, seconds in zip(plain_times, times, strict=True)]
            equal = equal and figures == [ours[f"{part}/{name}"] for name in FIGURES]
        wall.append((our_times[0], plain_times[0]))
        used.append((our_times[1], plain_times[1]))
        print(f"figures equal: {equal}", flush=True)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f}, {sizes[1]} detections")
    for name, times in (("by the clock", wall), ("by the processor", used)):
        ours_s, plain_s = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [plain / ours for ours, plain in times]
        print(f"{name}: ours {ours_s:.1f} s, plain {plain_s:.1f} s, ratio {statistics.median(ratios):.1f} "
              f"({min(ratios):.1f} to {max(ratios):.1f})")  # fmt: skip


if __name__ == "__main__":
    main()
