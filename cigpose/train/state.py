"""Everything a resume needs, in one object.

A training is a function of (params, data, seed): what is saved here, and the loader's order, which is a function of
(seed, epoch, batch), are enough for a killed run to end where it would have ended.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.config.schema import field_marks, nearest_mark
from cigpose.model.weights import refuse_non_finite
from cigpose.train.checkpoints import CheckpointError
from cigpose.train.divergence import FiniteCheck
from cigpose.train.optim import EMA


@dataclass
class TrainState:
    """One worker's training.

    Attributes:
        model: the trained network.
        losses: `model` as the training step calls it: wrapped for autocast, compiling, gradient averaging.
        optimizer, scaler: AdamW, and the loss scaler that fp16 needs.
        ema: averaged model, None if switched off.
        epoch, step_in_epoch: the optimiser step that comes next.
        step: optimiser steps done.
        best: {"metric", "value", "epoch", "step", "metrics"} of the best validation so far.
        weights: file of the best weights in the checkpoint store.
        unscored: {"epoch", "step", "weights"} of a validation whose score has not come yet.
        history: everything logged and validated so far, oldest first.
        unread: the check of the last step, on a GPU, where it is read a step later.
    """

    model: nn.Module
    losses: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: dict[str, Any] | None = None
    weights: str | None = None
    unscored: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    unread: FiniteCheck | None = None

    def settle(self) -> None:
        """Wait for the check of the last step, before anything is kept of it.

        Raises:
            NonFiniteLossError: the loss or the gradient was NaN or infinite.
        """
        unread, self.unread = self.unread, None
        if unread is not None:
            unread.raise_unless_finite()

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and exported: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values; the random generators of the workers are kept apart (`random_state`)."""
        tensors = {f"model.{key}": tensor for key, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{key}": tensor for key, tensor in self.ema.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in moments.items()}
        values = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "best": self.best,
            "weights": self.weights,
            "unscored": self.unscored,
            "history": list(self.history),
            "scaler": self.scaler.state_dict(),
            "ema_updates": None if self.ema is None else self.ema.updates,
        }
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is not finite.
        """
        try:
            refuse_non_finite({key: t for key, t in tensors.items() if key.startswith(("model.", "ema."))}, "weights")
            self.model.load_state_dict(under("model.", tensors))
            if self.ema is not None:
                self.ema.module.load_state_dict(under("ema.", tensors))
                self.ema.updates = values["ema_updates"]
            self._load_optimizer(under("optimizer.", tensors))
            self.scaler.load_state_dict(values["scaler"])
        except (RuntimeError, KeyError) as err:
            raise CheckpointError(f"the checkpoint does not fit this model: {err}. --restart begins anew.") from err
        except ValueError as err:
            raise CheckpointError(f"the checkpoint cannot be gone on from: {err} --restart begins anew.") from err
        for key in ("epoch", "step_in_epoch", "step", "best", "weights", "history"):
            setattr(self, key, values[key])
        self.unscored = values.get("unscored")  # which checkpoints of earlier versions do not know

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in tensors:  # a parameter without gradient has none
                    moment = torch.empty_like(parameter, requires_grad=False)  # keeps the memory layout
                    self.optimizer.state[parameter][key] = moment.copy_(tensors[f"{key}.{name}"])
            if f"step.{name}" in tensors:
                self.optimizer.state[parameter]["step"] = tensors[f"step.{name}"].to(parameter.device)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def random_state() -> dict[str, Any]:
    """This process's random generators (Python, numpy, torch, the current CUDA device), as plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the random generators where `random_state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def seed_everything(seed: int, rank: int) -> None:
    """Seed the random generators of worker `rank`."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def influential_params(
    config: Config, shards: Mapping[str, str], pretrained: str | None = None, start: str | None = None
) -> dict[str, Any]:
    """What the result of a training depends on, and what must not change while it is under way: `{path: value}`.

    An address, which may hold a password, is not kept: digests stand for what lies there.

    Args:
        config: the experiment.
        shards: dataset -> digest of its shards, for the datasets trained and validated on.
        pretrained: digest of the backbone's first weights; None if it starts from random ones.
        start: digest of the network that it starts from; None if there is none.
    """
    addresses = field_marks(Config, "public")
    params = {path: value for path, value in config.params_of("train").items() if not nearest_mark(path, addresses)}
    if not config.train.optimizer.learning_rate_factors:  # which runs of before do not know
        del params["train.optimizer.learning_rate_factors"]
    params |= {f"shards.{name}": digest for name, digest in shards.items()}
    first = {"pretrained.sha256": pretrained, "start_from.sha256": start}
    return params | {name: digest for name, digest in first.items() if digest is not None}


def refuse_changed_params(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with params other than those a checkpoint was made with.

    Raises:
        CheckpointError: naming every key that differs, with both values.
    """
    differing = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if differing:
        rows = "; ".join(f"{key}: {saved.get(key)!r} there, {current.get(key)!r} now" for key in differing)
        raise CheckpointError(
            f"{where}: the params have changed since this checkpoint ({rows}). "
            "Set them back to go on, or begin anew with `python -m pipelines.train --restart`."
        )
