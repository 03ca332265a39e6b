"""What the loop measures between two records: means of the losses, rates, waiting, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cigpose.train import workers


class Meter:
    """Sums on the device, and the clock. Reading it is the only time the device is waited for.

    Attributes:
        is_fresh: nothing has been added yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_fresh = True
        self._reset()

    def _reset(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._steps = 0
        self._skipped = 0
        self._persons = 0
        self._waited_s = 0.0
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in this block was spent on waiting for data."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take a mean of."""
        return self._steps == 0

    def add(self, metrics: Mapping[str, Tensor], persons: int) -> None:
        """Count one step of `persons` persons on this worker; no metrics: it was skipped and enters no mean."""
        for key, value in metrics.items():
            self._totals[key] = self._totals[key] + value if key in self._totals else value
        self._steps += bool(metrics)
        self._skipped += not metrics
        self._persons += persons
        self.is_fresh = False

    def read(self, remaining_steps: int) -> dict[str, float]:
        """The record since the last reading; a collective of all workers.

        Args:
            remaining_steps: steps to the end of the run.

        Returns: means of the metrics over steps and workers, `images_per_s` of all workers, `data_wait` (share of this
        worker's time), `eta_s`, `memory_mb` (peak of this worker's process), on a GPU `gpu_memory_mb`.
        """
        record = workers.mean_over_workers(self._totals, self._steps)
        elapsed = time.perf_counter() - self._began
        record["images_per_s"] = self._persons * workers.world_size() / elapsed
        record["data_wait"] = self._waited_s / elapsed
        record["eta_s"] = elapsed / (self._steps + self._skipped) * remaining_steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record["memory_mb"] = peak / (1e6 if sys.platform == "darwin" else 1024)
        if self.device.type == "cuda":
            record["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self._reset()
        return record
