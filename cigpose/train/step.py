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
from cigpose.loader.device import change_pixels
from cigpose.model.estimator import Normalize
from cigpose.train.divergence import FiniteCheck
from cigpose.train.optim import set_learning_rate
from cigpose.train.state import TrainState

Batch = Mapping[str, Any]
Copying = tuple[dict[str, Any], torch.cuda.Event | None]
"""A batch on its way to the device, and when it is there."""
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
    before clipping. Empty if the loss scaler of fp16 has skipped the step.

    Raises:
        NonFiniteLossError: the loss or the gradient is NaN or infinite; the optimiser has not moved. On a GPU the step
            after says so, or `TrainState.settle`, so that nobody waits.
    """
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    found = []
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with contextlib.nullcontext() if is_last else _without_averaging(state.losses):
            losses = state.losses(batch["crops"], batch["keypoints"], batch["visible"])
            state.scaler.scale(losses["loss"] / len(batches)).backward()
        found.append(losses["loss"].detach())
        for key, value in losses.items():
            totals[key] = totals.get(key, 0) + value.detach() / len(batches)
    state.scaler.unscale_(state.optimizer)
    parameters = list(state.model.parameters())
    totals["grad_norm"] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    check = FiniteCheck(found, totals["grad_norm"], [batch["keys"] for batch in batches])
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, totals["grad_norm"])
    has_moved = _move(state, check)
    if has_moved and state.ema is not None:
        state.ema.update(state.model)
    return totals if has_moved else {}


def _move(state: TrainState, check: FiniteCheck) -> bool:
    """Move the optimiser if `check` finds numbers; whether it has moved.

    On a GPU the optimiser itself looks, and what it saw is read a step later. With a loss scaler the host must know
    whether the step was skipped, and waits.
    """
    if state.scaler.is_enabled():
        has_moved = check.is_finite()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return has_moved
    if not check.has_failed.is_cuda:
        check.raise_unless_finite()
        state.optimizer.step()
        return True
    state.optimizer.found_inf = check.has_failed.float()  # type: ignore[attr-defined]  # as GradScaler tells it
    state.optimizer.step()
    state.settle()
    state.unread = check
    return True


def _without_averaging(losses: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep gradients to this worker, where `losses` averages them over all."""
    if isinstance(losses, nn.parallel.DistributedDataParallel):
        return losses.no_sync()
    return contextlib.nullcontext()


class Copier:
    """Brings batches to a device, as `to_device` does; to a GPU on a stream of its own, beside the step before.

    Their memory must be pinned, as the loader's is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch with its tensors on the device, ready for the stream that computes."""
        return self.end(self.begin(batch))

    def begin(self, batch: Batch) -> Copying:
        """Begin to copy; nobody waits."""
        if self._stream is None:
            return to_device(batch, self.device), None
        with torch.cuda.stream(self._stream):
            return to_device(batch, self.device), self._stream.record_event()

    def end(self, copying: Copying) -> dict[str, Any]:
        """The copy, for which the stream that computes waits, and the host does not."""
        copied, is_there = copying
        if is_there is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(is_there)
            for value in copied.values():
                if isinstance(value, Tensor):
                    value.record_stream(computing)  # or its memory is given to the next batch too soon
        return copied


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, and there with those pixels changed that the loader has left to it."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key != "drawn"
    }
    if "drawn" in batch:
        change_pixels(moved["crops"], batch["drawn"])
    return moved
