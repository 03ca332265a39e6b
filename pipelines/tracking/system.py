"""What a run takes of the machine: CPU, memory, disk, network, GPU, by MLflow's own monitors."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import psutil
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.tracking.run import Run, append_record, read_records

SAMPLE_S = "10"
"""Seconds between two samples, where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL does not say else."""


@contextlib.contextmanager
def sampled_system(run: Run) -> Iterator[None]:
    """Append to the run's system.jsonl while the block lasts; MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false forbids it."""
    every_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLE_S))
    stopping = threading.Event()
    thread = threading.Thread(target=_work, args=(run, every_s, stopping), name="system-metrics", daemon=True)
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "false":
        stopping.set()
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(5)


def _work(run: Run, every_s: float, stopping: threading.Event) -> None:
    monitors = list(_monitors())
    step = next((record["step"] + 1 for record in read_records(run.system)), 0)
    while not stopping.wait(every_s):
        values: dict[str, float] = {}
        for monitor in monitors:
            with contextlib.suppress(Exception):  # a counter the system does not offer
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        values["process_memory_megabytes"] = process_tree_memory() / 1e6
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        with contextlib.suppress(OSError):  # a full disk; the training says it
            append_record(run.system, {"kind": "system", "step": step, **finite})
        run.on_change()
        step += 1


def _monitors() -> Iterator[Any]:
    for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no NVML, no GPU
            yield monitor()


def process_tree_memory() -> int:
    """Resident bytes of this process and its descendants; pages they share count once for each."""
    total, process = 0, psutil.Process()
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += member.memory_info().rss
    return total
