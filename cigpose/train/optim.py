"""The optimiser's side of the recipe: AdamW parameter groups, the learning rate of every step, the EMA.

Each follows the original training (MMEngine's AdamW with `norm_decay_mult=0, bias_decay_mult=0`, chained `LinearLR` and
`CosineAnnealingLR` by iteration, `ExpMomentumEMA` with buffers); agreement is tested against recorded values.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.config import EMAConfig, OptimizerConfig, ScheduleConfig

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameters of `model` with and without weight decay, for each factor on the learning rate.

    Normalisation layers of torch and everything whose name ends in `bias` do not decay; gains, scales and embeddings
    of the head's own blocks do. Parameters with `requires_grad` False are left out. A shared parameter counts once.

    Args:
        model: the network.
        weight_decay: of the first group.
        factors: part of the network -> factor on its rate (see `factor_of`).

    Returns: two groups a factor, `decay` and `no_decay`, each with `params`, `weight_decay`, `name`, `factor`.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMALISATIONS) or name.endswith("bias")
    }
    trained = [(factor_of(name, factors or {}), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for factor in dict.fromkeys(factor for factor, _ in trained):
        decay = [p for own, p in trained if own == factor and id(p) not in exempt]
        no_decay = [p for own, p in trained if own == factor and id(p) in exempt]
        groups += [
            {"params": decay, "weight_decay": weight_decay, "name": "decay", "factor": factor},
            {"params": no_decay, "weight_decay": 0.0, "name": "no_decay", "factor": factor},
        ]
    return groups


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Factor on the learning rate of a parameter or module: that of the innermost part it lies in, 1 outside of all."""
    parts = [part for part in factors if f"{name}.".startswith(f"{part}.")]
    return factors[max(parts, key=len)] if parts else 1.0


def refuse_unknown_parts(model: nn.Module, factors: Mapping[str, float]) -> None:
    """See that the parts which `train.optimizer.learning_rate_factors` names exist, and that something is trained.

    Raises:
        ValueError: a part is none of the network's modules, or every parameter is frozen.
    """
    where = "train.optimizer.learning_rate_factors"
    known = [name for name, _ in model.named_modules() if name]
    for part in factors:
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else "Parts are modules, such as backbone, backbone.stem, head."
            raise ValueError(f"{where}: the network has no part {part!r}. {hint}")
    if not any(p.requires_grad and factor_of(name, factors) > 0 for name, p in model.named_parameters()):
        raise ValueError(f"{where}: everything is frozen. Give a part that is to be trained a factor above 0.")


def freeze_parts(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Take the parts of factor 0 out of the training.

    They get no gradient, and their batch norms stay in evaluation mode: with statistics that go on moving, a part whose
    weights rest would not. Nothing else of them is put into evaluation mode, in which the intervention is another.
    """
    for name, parameter in model.named_parameters():
        if factor_of(name, factors) == 0:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, NORMALISATIONS) and factor_of(name, factors) == 0:
            module.eval()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `model`; its rate is set before every step from `learning_rates`."""
    groups = parameter_groups(model, config.weight_decay, config.learning_rate_factors)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rates(base: float, schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> np.ndarray:
    """The rate used by each optimiser step of the run.

    A linear warm-up over `warmup_steps` steps that reaches the base rate at its last one, then the cosines, their
    epochs converted to steps. Each piece changes the rate that it finds, so pieces that overlap multiply: the warm-up
    scales it, a cosine scales its distance to the final rate. Outside its steps a piece leaves the rate alone.

    Args:
        base: rate after the warm-up.
        schedule: warm-up and cosines.
        steps_per_epoch: optimiser steps in an epoch.
        epochs: length of the run.

    Returns: (steps_per_epoch * epochs,) float64.
    """
    total = steps_per_epoch * epochs
    rates = np.empty(total)
    cosines = [
        (piece.begin_epoch * steps_per_epoch, piece.end_epoch * steps_per_epoch, piece.final_factor * base)
        for piece in schedule.cosines
    ]
    start, ramp = schedule.warmup_start_factor, schedule.warmup_steps - 1
    rate = base
    for step in range(total):
        if ramp > 0 and step <= ramp:
            rate *= start if step == 0 else 1 + (1 - start) / (ramp * start + (step - 1) * (1 - start))
        for begin, end, final in cosines:
            if begin < step < end:
                rate = _cosine_step(rate, final, step - begin, end - begin)
        rates[step] = rate
    return rates


def _cosine_step(rate: float, final: float, step: int, length: int) -> float:
    """The rate at `step` of a cosine of `length` steps that ends at `final`, from the rate of the step before."""
    ratio = (1 + math.cos(math.pi * step / length)) / (1 + math.cos(math.pi * (step - 1) / length))
    return final + (rate - final) * ratio


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make `rate` the rate of every parameter group, times its factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


class EMA:
    """Exponential moving average of a model's parameters and floating-point buffers.

    Before update t (from 0) the weight of the new value is m_t = (1 - momentum) exp(-(1 + t) / gamma) + momentum;
    update 0 copies. Integer buffers are copied by update 0 and kept from then on.

    Attributes:
        module: the averaged model, in eval mode, for validation and export.
        updates: number of updates so far.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.config = config
        self.updates = 0
        self._averaged = _floating(self.module)
        self._source: tuple[int, list[Tensor]] | None = None

    def momentum(self) -> float:
        """Weight of the new values in the coming update."""
        momentum, gamma = self.config.momentum, self.config.gamma
        return (1 - momentum) * math.exp(-(1 + self.updates) / gamma) + momentum

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the values of `model`, which has the same structure."""
        if self.updates == 0:
            self.module.load_state_dict(model.state_dict())
        else:
            if self._source is None or self._source[0] != id(model):
                self._source = (id(model), _floating(model))
            torch._foreach_lerp_(self._averaged, self._source[1], self.momentum())
        self.updates += 1


def _floating(model: nn.Module) -> list[Tensor]:
    """The tensors of the state dict that are averaged, in its order."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
