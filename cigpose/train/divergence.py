"""A loss, a gradient or a weight that is no number stops a training, before anything is kept of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite; nothing was updated by it."""


class FiniteCheck:
    """Whether the losses of a step and the norm of its gradient are finite, asked while the device computes on.

    On a GPU the numbers are copied out behind the backward pass and waited for when they are wanted; `has_failed` says
    it on the device, where nobody waits.
    """

    def __init__(self, losses: Sequence[Tensor], grad_norm: Tensor, keys: Sequence[Sequence[str]]) -> None:
        """Ask.

        Args:
            losses: of each micro-batch; scalars.
            grad_norm: of their mean's gradient, over all workers; a scalar.
            keys: the samples of each micro-batch.
        """
        self._values = torch.stack([*losses, grad_norm]).detach()
        self._keys = keys
        self._ready: torch.cuda.Event | None = None
        self.has_failed = torch.logical_not(torch.isfinite(self._values).all())
        if self._values.is_cuda:
            on_host = torch.empty(self._values.shape, dtype=self._values.dtype, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> tuple[list[float], float]:
        """The losses and the norm. The only time in a step that the host waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        *losses, norm = self._values.tolist()
        return losses, norm

    def is_finite(self) -> bool:
        """Whether the gradient is finite.

        Raises:
            NonFiniteLossError: a loss is not, naming the samples of its batch.
        """
        losses, norm = self.read()
        for loss, keys in zip(losses, self._keys, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss is {loss} on the batch of {', '.join(keys)}; {_ADVICE}")
        return math.isfinite(norm)

    def raise_unless_finite(self) -> None:
        """Raise NonFiniteLossError, naming the samples that were looked at."""
        if not self.is_finite():
            names = ", ".join(key for keys in self._keys for key in keys)
            raise NonFiniteLossError(f"the gradient is not finite on the batch of {names}; {_ADVICE}")


_ADVICE = (
    "the optimiser was not moved. Look at these samples, or lower train.optimizer.learning_rate; fp16 overflows sooner "
    "than bf16."
)


@torch.no_grad()
def refuse_diverged(model: nn.Module) -> None:
    """Raise NonFiniteLossError if a weight is NaN or infinite, so that no checkpoint keeps it."""
    if not bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()):
        raise NonFiniteLossError(
            "a step was so large that the weights are no longer numbers; no checkpoint was written. "
            "Lower train.optimizer.learning_rate or set train.optimizer.clip_grad_norm; the run goes on from the last "
            "checkpoint."
        )
