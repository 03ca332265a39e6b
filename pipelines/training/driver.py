"""Ray: how many workers, where, and what becomes of those that die.

A worker calls `cigpose.train.loop.train` and puts what it is told into a queue; the driver reads the queue. Checkpoints
are the library's own, so a worker that Ray restarts, and a driver that is started again, go on from the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cigpose.config import ClusterConfig, Config
from cigpose.train.place import StartingModel
from pipelines.training.cluster import (
    TrainingError,
    describe_breakdown,
    describe_resources,
    find_resources,
    is_joined,
    joined,
    marked,
)
from pipelines.training.local import LocalTorchConfig, LocalTorchTrainer, is_gone, own_servers
from pipelines.training.worker import work

Event = dict[str, Any]
TUNED = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # a minute, of which train.cluster.wait_minutes counts
}
"""Set where the user has not: a quicker start, no line printed twice."""
ANSWER_S = 300.0
"""Longest that a queue may take to answer: a driver that was stopped for a minute (Ctrl-Z) would wait for ever."""
COLLECTIVE_TIMEOUT_S = 1800
"""Longest that workers wait for one another: rank 0 reads a checkpoint meanwhile."""


def train_on_ray(config: Config, settings: dict[str, Any], on_event: Callable[[Event], None]) -> dict[str, Any]:
    """Train on Ray until the run is finished.

    Args:
        config: the experiment.
        settings: what workers need besides: `root` (folder of params.yaml), `run_folder`, `checkpoints` (address),
            `params` (see `influential_params`), `start` (the `StartingModel`, or None), `shown_images` (ids of
            validation images to be drawn); paths are absolute, and the same on every node.
        on_event: gets what the workers tell (`pipelines.training.worker.Messenger`), in this thread.

    Returns: what `cigpose.train.loop.train` returns on rank 0.

    Raises:
        TrainingError: it failed for good, in one sentence.
        SystemExit, KeyboardInterrupt: on SIGTERM, SIGINT; workers are stopped, the checkpoints remain.
    """
    for name, value in TUNED.items():
        os.environ.setdefault(name, value)
    with joined(config.train.cluster) as private, _signals(), marked(settings["checkpoints"]) as marker:
        use_gpu = find_resources(config.train.cluster)
        # here, beside the driver that reads it: a lost node must not take it along
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        for left in Path(settings["run_folder"]).glob("ray-*"):  # of killed drivers: this one has the run to itself
            shutil.rmtree(left, ignore_errors=True)
        storage = Path(settings["run_folder"]) / f"ray-{uuid.uuid4().hex[:8]}"
        settings = settings | {"config": config.to_mapping(), "mailbox": mailbox, "marker": marker}
        settings["start"] = _sent(settings["start"])
        try:
            trainer = _trainer(config.train.cluster, settings, storage, _torch_config(use_gpu, private), use_gpu)
            return _follow(trainer, mailbox, on_event)
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def _sent(start: StartingModel | None) -> dict[str, Any] | None:
    """The network to start from as workers get it: on other nodes, which have none of the driver's files, by Ray."""
    if start is None:
        return None
    config = start.config.to_mapping() if start.config else None
    content = ray.put(start.read()) if is_joined() else None
    return {"content": content, "config": config, "where": start.where, "sha256": start.sha256}


def _torch_config(use_gpu: bool, private: Path | None) -> TorchConfig:
    """How workers meet: in a folder of this machine if they are all here."""
    common: dict[str, Any] = {
        "backend": "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
        "timeout_s": COLLECTIVE_TIMEOUT_S,
    }
    return TorchConfig(**common) if private is None else LocalTorchConfig(**common, folder=str(private))


def _trainer(
    cluster: ClusterConfig, settings: dict[str, Any], storage: Path, torch_config: TorchConfig, use_gpu: bool
) -> TorchTrainer:
    elastic = cluster.min_workers is not None and cluster.min_workers < cluster.num_workers
    kind = LocalTorchTrainer if isinstance(torch_config, LocalTorchConfig) else TorchTrainer
    return kind(  # Ray's annotations are those of its former Train API
        work,  # type: ignore[arg-type]
        train_loop_config=settings,
        torch_config=torch_config,
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers) if elastic else cluster.num_workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.threads_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str(storage),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=cluster.max_failures,
                controller_failure_limit=cluster.wait_minutes if is_joined() else 1,
            ),
        ),
    )


def _follow(trainer: TorchTrainer, mailbox: Queue, on_event: Callable[[Event], None]) -> dict[str, Any]:
    """Run the trainer in a thread of its own, so that this one hears signals, and hand on what workers tell."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as err:
            outcome["error"] = err

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    servers = own_servers()
    while True:
        is_over = not thread.is_alive()
        if gone := [server.pid for server in servers if is_gone(server)]:
            raise TrainingError(describe_breakdown(f"process {gone[0]} has ended"))
        for event in _drain(mailbox):
            if event["event"] == "failed":  # another try would fail alike
                raise TrainingError(event["message"])
            on_event(event)
        if is_over:
            break
    if "error" in outcome:
        raise TrainingError(_explain(outcome["error"])) from outcome["error"]
    return outcome["result"]


def _drain(mailbox: Queue) -> Iterator[Event]:
    """What has arrived, after waiting up to half a second for the first."""
    actor: Any = mailbox.actor  # the queue's own calls wait for ever
    with contextlib.suppress(Empty, queue.Empty, asyncio.QueueEmpty):
        yield ray.get(actor.get.remote(0.5), timeout=ANSWER_S)
        while True:
            yield ray.get(actor.get_nowait.remote(), timeout=ANSWER_S)


def _explain(error: BaseException) -> str:
    text = str(error)
    if "startup timed out" in text or "InsufficientClusterResources" in type(error).__name__:
        return f"Ray could not start the workers: the cluster has {describe_resources()} now. {text.splitlines()[0]}"
    if isinstance(error, TrainingFailedError) and ("died" in text or "RayActorError" in text or "OOM" in text):
        return (
            "workers died again and again, more often than train.cluster.max_failures allows. Out of memory is the "
            "usual cause: lower train.batch_total or raise train.accumulate_steps. Ray says: "
            f"{text.strip().splitlines()[-1]}"
        )
    return f"Ray gave up: {text.strip()}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT end this process by an exception, in spite of Ray's handlers and of a shell's `&`."""

    def stop(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: leaving takes seconds
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
