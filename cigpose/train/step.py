"""One optimiser step.

The keypoint loss of upstream is a sum over the batch of one GPU. It is stated here for `train.loss_batch` persons, so
that the gradient does not depend on how a total batch is shared out among workers and accumulation steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.model.estimator import Normalize
from cigpose.train.optim import set_learning_rate
from cigpose.train.state import TrainState

Batch = Mapping[str, Any]
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEANS = ("loss_cf",)
"""Loss parts that are means over the batch; the others are sums over it."""


def resolved_precision(config: Config, device: torch.device) -> str:
    """Precision of autocast on a device: fp32 (none), bf16 or fp16."""
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # emulated bf16 is ten times slower than fp32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was updated by it."""


class Losses(nn.Module):
    """A model as the training step calls it: from crops to losses, under autocast, in one forward.

    Distributed and compiled training wrap this module, not the model, so that normalisation and losses are inside.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize().to(next(model.parameters()).device)
        self.loss_of: Callable[..., dict[str, Tensor]] = model.loss  # type: ignore[assignment]
        self.loss_batch = config.train.loss_batch
        self.precision = resolved_precision(config, next(model.parameters()).device)
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.dtype = next(model.parameters()).dtype

    def forward(self, crops: Tensor, keypoints: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            crops: uint8 (B, H, W, 3) RGB.
            keypoints: (B, K, 2) x, y in crop pixels.
            visible: (B, K) 0/1.

        Returns: scalars `loss` (to be minimised), its parts `loss_*` as they enter it, and `acc_pose`.
        """
        images = self.normalize(crops).to(self.dtype).contiguous(memory_format=self.memory_format)
        enabled = self.precision != "fp32"
        with torch.autocast(crops.device.type, AUTOCAST[self.precision] if enabled else None, enabled=enabled):
            parts = self.loss_of(images, keypoints, visible)
        factor = self.loss_batch / crops.shape[0]
        losses = {
            key: value if key in MEANS else value * factor for key, value in parts.items() if key.startswith("loss_")
        }
        total = torch.stack(list(losses.values())).sum()
        return {"loss": total, **{key: value.detach() for key, value in losses.items()}, "acc_pose": parts["acc_pose"]}


def train_step(
    state: TrainState, batches: Sequence[Batch], *, rate: float, clip_grad_norm: float | None
) -> dict[str, Tensor]:
    """Update the model once.

    Args:
        state: is changed: model, optimiser, scaler, EMA.
        batches: micro-batches on the model's device (`crops`, `keypoints`, `visible`, `keys`); gradients are averaged.
        rate: learning rate of this step.
        clip_grad_norm: largest norm of the gradient, None for no limit.

    Returns: detached scalars on the device: losses of `Losses.forward` averaged over the micro-batches, and `grad_norm`
    before clipping.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite. Neither optimiser nor EMA has moved.
    """
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    checks = []
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with contextlib.nullcontext() if is_last else _without_averaging(state.losses):
            losses = state.losses(batch["crops"], batch["keypoints"], batch["visible"])
            checks.append(FiniteCheck(losses["loss"]))
            state.scaler.scale(losses["loss"] / len(batches)).backward()
        for key, value in losses.items():
            totals[key] = totals.get(key, 0) + value.detach() / len(batches)
    for check, batch in zip(checks, batches, strict=True):
        check.raise_unless_finite(batch)
    state.scaler.unscale_(state.optimizer)
    parameters = list(state.model.parameters())
    totals["grad_norm"] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, totals["grad_norm"])
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update(state.model)
    return totals


class FiniteCheck:
    """Whether a loss is finite, asked while the device computes on.

    On a GPU the answer is copied out behind the forward pass, and waited for after the backward pass has been queued:
    the device never idles for it.
    """

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss.detach()
        self._ready: torch.cuda.Event | None = None
        self._is_finite = torch.isfinite(self.loss)
        if loss.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._is_finite = on_host.copy_(self._is_finite, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def raise_unless_finite(self, batch: Batch) -> None:
        """Raise NonFiniteLossError, naming the samples of `batch`."""
        if self._ready is not None:
            self._ready.synchronize()
        if not bool(self._is_finite):
            raise NonFiniteLossError(
                f"the loss is {float(self.loss)} on the batch of {', '.join(batch['keys'])}; the optimiser was not "
                "moved. Look at these samples, or lower train.optimizer.learning_rate; fp16 overflows sooner than bf16."
            )


@torch.no_grad()
def refuse_diverged(model: nn.Module) -> None:
    """Raise NonFiniteLossError if a weight is NaN or infinite, so that no checkpoint keeps it."""
    if not bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()):
        raise NonFiniteLossError(
            "a gradient was NaN or infinite, so that the weights are no longer numbers; no checkpoint was written. "
            "Lower train.optimizer.learning_rate or set train.optimizer.clip_grad_norm; the run goes on from the last "
            "checkpoint."
        )


def _without_averaging(losses: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep gradients to this worker, where `losses` averages them over all."""
    if isinstance(losses, nn.parallel.DistributedDataParallel):
        return losses.no_sync()
    return contextlib.nullcontext()


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
