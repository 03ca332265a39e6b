"""From a configuration to a training state: weights, wrappers, optimiser."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.files.addresses import file_name_of, is_remote, without_credentials
from cigpose.files.errors import DataError
from cigpose.files.objects import fetch_object
from cigpose.model.estimator import build_model
from cigpose.model.hgnn import EdgeConv
from cigpose.model.transfer import start_from
from cigpose.model.weights import load_backbone, state_dict_of
from cigpose.train import workers
from cigpose.train.batch_norm import synchronize_batch_norm
from cigpose.train.optim import EMA, build_optimizer, freeze_parts
from cigpose.train.place import StartingModel
from cigpose.train.state import TrainState, seed_everything
from cigpose.train.step import Losses, resolved_precision

LARGEST_WEIGHTS = 16 << 30
"""Bytes."""


def build_state(
    config: Config,
    *,
    rank: int,
    device: torch.device,
    root: Path,
    pretrained: str | None = None,
    start: StartingModel | None = None,
) -> TrainState:
    """The state before the first step; equal on all workers but for their random generators.

    Args:
        config: the experiment.
        rank: this worker.
        device: where to train.
        root: folder of params.yaml; `model.backbone.pretrained` lies in data/raw/pretrained below it. Where it does
            not, as on another node, and is an address, rank 0 fetches it.
        pretrained: sha256 of these weights, if known.
        start: the network whose weights are taken where they fit, in place of the backbone's first ones too.

    Raises:
        FileNotFoundError: the pretrained weights are not there.
        DataError: those at the address, or of the network to start from, are others by now.
        WeightsError: weights that do not fit.
    """
    seed_everything(config.seed, rank=0)  # the same first weights on every worker
    model = build_model(config)
    if config.model.backbone.pretrained and rank == 0:
        with _pretrained_file(config, root, pretrained) as path:
            load_backbone(model, path)
    if start is not None and rank == 0:
        start_from(model, _starting_weights(start), config, start.config, start.where)
    model = model.to(device)
    workers.copy_rank_0([model])
    state = state_around(model, config, device)
    seed_everything(config.seed, rank)
    return state


def state_around(model: nn.Module, config: Config, device: torch.device) -> TrainState:
    """The state of a training that starts from `model`, which is on `device`."""
    train = config.train
    freeze_parts(model, train.optimizer.learning_rate_factors)
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    if train.channels_last:
        to_channels_last(model)
    ema = EMA(model, train.ema) if train.ema.enabled else None
    if workers.world_size() > 1 and is_synchronized(config, device):
        model.backbone = synchronize_batch_norm(model.get_submodule("backbone"))
    losses: nn.Module = Losses(model, config)
    if train.compile:
        losses.compile(fullgraph=True, dynamic=False)
    if workers.world_size() > 1:
        losses = nn.parallel.DistributedDataParallel(losses, broadcast_buffers=False, gradient_as_bucket_view=True)
    return TrainState(
        model=model,
        losses=losses,
        optimizer=build_optimizer(model, train.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=resolved_precision(config, device) == "fp16"),
        ema=ema,
    )


def to_channels_last(module: nn.Module) -> None:
    """Lay out the weights of convolutions as their outputs are.

    Not those of the graph, which are used as matrices: their gradients come as matrices, and data-parallel training
    would copy each of them into another layout, in every step.
    """
    if isinstance(module, nn.Conv2d):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not isinstance(module, EdgeConv):
        for child in module.children():
            to_channels_last(child)


def is_synchronized(config: Config, device: torch.device) -> bool:
    """Whether the backbone's batch norms work over all workers."""
    chosen = config.train.sync_batch_norm
    return device.type == "cuda" if chosen == "auto" else chosen


def pretrained_path(config: Config, root: Path) -> Path:
    """The file of the backbone's first weights; from an address, the one that `dvc repro pretrained` fetched."""
    name = str(config.model.backbone.pretrained)
    return root / "data" / "raw" / "pretrained" / (file_name_of(name) if is_remote(name) else name)


@contextlib.contextmanager
def _pretrained_file(config: Config, root: Path, sha256: str | None) -> Iterator[Path]:
    path, address = pretrained_path(config, root), str(config.model.backbone.pretrained)
    if path.is_file() or not is_remote(address):
        yield path
        return

    def check(found: str) -> None:
        if found != (sha256 or found):
            raise DataError(
                f"{without_credentials(address)}: sha256 is {found[:12]}..., the weights that `dvc repro pretrained` "
                f"fetched have {sha256}. Run it again; other first weights are another run."
            )

    with tempfile.TemporaryDirectory(prefix="cigpose-") as scratch:
        target = Path(scratch) / path.name
        fetch_object(address, target, LARGEST_WEIGHTS, check)
        yield target


def _starting_weights(start: StartingModel) -> dict[str, Tensor]:
    content = start.read()
    if (found := hashlib.sha256(content).hexdigest()) != start.sha256:
        raise DataError(
            f"{start.where}: sha256 is {found[:12]}..., the weights that the run began with have {start.sha256}. "
            "`dvc repro --force pretrained` fetches them anew; other first weights are another run."
        )
    return state_dict_of(content, start.where)


def for_world(config: Config, world: int) -> Config:
    """The same experiment on another number of workers, as after the loss of a node.

    The total batch stays, rounded up to what the workers can share out evenly; where a worker's part would exceed the
    former one, accumulation steps are added.
    """
    train = config.train
    if world == train.cluster.num_workers:
        return config
    accumulate = math.ceil(train.batch_total / (world * train.batch_per_worker))
    share = math.ceil(train.batch_total / (world * accumulate))
    cluster = dataclasses.replace(train.cluster, num_workers=world)
    changed = dataclasses.replace(
        train, cluster=cluster, accumulate_steps=accumulate, batch_total=share * world * accumulate
    )
    return dataclasses.replace(config, train=changed)
