"""Ray on this machine alone: what can do without a network does without one.

Ray's servers listen on every interface and cannot be told otherwise, but obey nobody without the token, which is this
training's own. Torch's store, by which workers find one another, would listen everywhere and obey everybody: here it is
a file. Gloo and NCCL meet on loopback.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


def settle_environment() -> None:
    """Set what Ray and torch read when they start, where the user has set nothing."""
    loopback = next((name for name in psutil.net_if_addrs() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray's own would be a file that others can read


def own_servers() -> list[psutil.Process]:
    """Ray's servers that this process has started: without either of them nothing goes on."""
    return [child for child in psutil.Process().children() if _name(child) in ("gcs_server", "raylet")]


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
        return process.name()
    return ""


def is_gone(server: psutil.Process) -> bool:
    """Whether a server has ended."""
    try:
        return server.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leave_ray(wait_s: float = 15.0) -> None:
    """Stop Ray, or leave it: with its servers dead it would wait for them for a minute, and end the process then."""
    stopping = threading.Thread(target=ray.shutdown, daemon=True)
    stopping.start()
    stopping.join(wait_s)
    if stopping.is_alive():
        atexit.unregister(ray.shutdown)


class LocalTorchTrainer(TorchTrainer):
    """A trainer without Ray's guard of placement groups.

    It outlives the driver to free them, but here the cluster ends with the driver; and it asks a dashboard, for which a
    training would wait twelve seconds at its end.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


@dataclass
class LocalTorchConfig(TorchConfig):
    """Torch's process group for workers of one machine, who meet in a folder."""

    folder: str = ""
    """A private one."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray calls to set the group up."""
        return _FileBackend


class _FileBackend(_TorchBackend):
    """As Ray's own, but for torch's TCPStore."""

    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]
        meeting = (Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex}").as_uri()
        worker_group.execute(_set_torch_distributed_env_vars)
        started = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=meeting,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(started)
