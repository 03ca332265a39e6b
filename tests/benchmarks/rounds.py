"""Timing of several steps in turns, so that what else the machine does disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def timed(steps: Mapping[str, Callable[[], object]], rounds: int, *, threads: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a round of warm-up.

    Of the wall, or with one thread of the processor, which a busy machine disturbs less.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if number:
                times[name].append(clock() - start)
    return times
