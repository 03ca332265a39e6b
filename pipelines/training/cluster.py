"""The cluster that a training runs on: joined or started, waited for, and told what its nodes need to know."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler import sdk as autoscaler
from ray.exceptions import RayError

from cigpose.config import ClusterConfig
from cigpose.files.addresses import is_remote
from cigpose.files.objects import local_path
from pipelines.training.keeper import RAY, kept
from pipelines.training.local import leave_ray, settle_environment

PASSED_ON = ("NCCL_", "GLOO_", "AWS_")
"""How the names of the variables begin that workers on other nodes get from the driver's environment."""
LOOKS_EVERY_S = 5.0
"""How often a joined cluster is asked whether its nodes have come up."""


class TrainingError(RuntimeError):
    """A training that ended without a result; the message is for the user."""


def is_joined() -> bool:
    """Whether the cluster is one that was there before, rather than this machine alone."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def joined(cluster: ClusterConfig) -> Iterator[Path | None]:
    """Join the cluster of RAY_ADDRESS, or start one here; leave or stop it at the end.

    Gives the private folder of one that was started here.

    Raises:
        TrainingError: it does not answer, cannot be started, or breaks down.
    """
    with contextlib.ExitStack() as ends:
        private = None if is_joined() else ends.enter_context(kept())
        ends.callback(leave_ray)
        _start_ray(cluster, private)
        try:
            yield private
        except RayError as err:
            raise TrainingError(
                describe_breakdown(f"{type(err).__name__}: {str(err).strip().splitlines()[0]}")
            ) from err


def _start_ray(cluster: ClusterConfig, private: Path | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        options["runtime_env"] = {"env_vars": passed_on(os.environ)}
    if private:
        needed = cluster.num_workers * cluster.threads_per_worker + 2
        options |= {"num_cpus": needed, "include_dashboard": False, "object_store_memory": 200 * 2**20}
        options |= {"address": "local", "_temp_dir": str(private / RAY)}  # not some other Ray that runs here
        settle_environment()
    try:
        ray.init(**options)
    except (RayError, ConnectionError, ValueError, RuntimeError) as err:
        where = f"joined at RAY_ADDRESS={address}" if address else "started"
        raise TrainingError(f"Ray could not be {where}: {err}") from err


def describe_breakdown(how: str) -> str:
    """What to tell when Ray itself has failed."""
    return (
        f"Ray broke down ({how}). Was one of its processes killed, or is the memory full? Run again to go on from the "
        "last checkpoint."
    )


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What workers on other nodes get of the driver's environment: network interfaces, and credentials of S3.

    Ray's token is not among it: each node was started with it.
    """
    return {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}


def _check_reachable(address: str) -> None:
    """Raise TrainingError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as err:
        raise TrainingError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({err}). Start it with `ray start --head`, or unset "
            "RAY_ADDRESS to train on this machine alone."
        ) from err


def find_resources(cluster: ClusterConfig, clock: Callable[[], float] = time.monotonic) -> bool:
    """Whether to train on GPUs. A joined cluster is waited for, and its autoscaler told, until it can hold the workers.

    Raises:
        TrainingError: the cluster cannot hold the workers, or not within `wait_minutes`.
    """
    if not is_joined():
        return _check_resources(cluster)
    ends, has_told = clock() + 60 * cluster.wait_minutes, False
    bundle = {"CPU": cluster.threads_per_worker} | ({"GPU": 1} if cluster.use_gpu is True else {})
    autoscaler.request_resources(bundles=[bundle] * cluster.num_workers)
    try:
        while True:
            try:
                return _check_resources(cluster)
            except TrainingError as err:
                if clock() > ends:
                    waited = f"{cluster.wait_minutes} min: train.cluster.wait_minutes"
                    raise TrainingError(f"{err} It was waited for ({waited}).") from err
                if not has_told:
                    needed = "a GPU" if cluster.use_gpu is True else f"{cluster.threads_per_worker} CPUs"
                    print(
                        f"train: waiting for nodes of the cluster, {cluster.wait_minutes} min at most: it has "
                        f"{describe_resources()}, and {_least(cluster)} workers need {needed} each",
                        flush=True,
                    )
                    has_told = True
            time.sleep(LOOKS_EVERY_S)
    finally:
        autoscaler.request_resources(bundles=[])  # the workers themselves keep their nodes


def _least(cluster: ClusterConfig) -> int:
    return cluster.num_workers if cluster.min_workers is None else cluster.min_workers


def _check_resources(cluster: ClusterConfig) -> bool:
    """Whether to train on GPUs; raises TrainingError where the cluster cannot hold the workers."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    use_gpu = gpus > 0 if cluster.use_gpu == "auto" else cluster.use_gpu
    least = _least(cluster)
    if use_gpu and gpus < least:
        raise TrainingError(
            f"train.cluster asks for {least} workers with a GPU each, but the cluster has {describe_resources()}. "
            "Lower train.cluster.num_workers, set use_gpu: false, or check the driver (`nvidia-smi`) and CUDA build of "
            "torch."
        )
    if there.get("CPU", 0) < least * cluster.threads_per_worker:
        raise TrainingError(
            f"train.cluster asks for {least} workers x {cluster.threads_per_worker} CPUs, but the cluster has "
            f"{describe_resources()}. Lower train.cluster.num_workers or threads_per_worker, or add nodes."
        )
    return use_gpu


def describe_resources() -> str:
    """What the cluster has."""
    there = ray.cluster_resources()
    return f"{there.get('CPU', 0):.0f} CPUs and {there.get('GPU', 0):.0f} GPUs"


@contextlib.contextmanager
def marked(checkpoints: str) -> Iterator[str | None]:
    """A file in the folder of the checkpoints, by which workers see that it is the driver's; None for an address."""
    if is_remote(checkpoints):
        yield None
        return
    folder = local_path(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".driver-*"):  # of killed drivers: this one has the run to itself
        left.unlink(missing_ok=True)
    marker = folder / f".driver-{uuid.uuid4().hex[:8]}"
    marker.touch()
    try:
        yield str(marker)
    finally:
        marker.unlink(missing_ok=True)


def refuse_other_folder(marker: str | None) -> None:
    """Refuse a node on which the folder of the checkpoints is another one than the driver's.

    Raises:
        TrainingError: it is; the run could not go on from there, nor the driver find the result.
    """
    if marker is not None and not Path(marker).is_file():
        raise TrainingError(
            f"{Path(marker).parent}: on {socket.gethostname()}, where a worker runs, this is not the folder that the "
            "driver sees. Set train.checkpoint.address to s3://bucket/path or to a folder that all nodes share."
        )
