"""Checkpoints that training does not wait for: a copy of the state is taken at once, and written by a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Snapshot:
    """A copy of tensors on the host, in memory that the next copy takes again."""

    def __init__(self) -> None:
        self._kept: Tensors = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy them as they are now; from a GPU behind what is queued there, and without waiting for it."""
        self._kept = {key: self._room_for(key, tensor) for key, tensor in tensors.items()}
        on_gpu = False
        for key, tensor in tensors.items():
            self._kept[key].copy_(tensor.detach(), non_blocking=True)
            on_gpu |= tensor.is_cuda
        if on_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def _room_for(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)

    def read(self) -> Tensors:
        """The copy, once it is whole."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._kept


class Writer:
    """A thread that does one piece of work at a time. Leaving the block waits for the last piece."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cigpose-checkpoint")
        self._under_way: Future[str] | None = None

    def begin(self, write: Callable[[], str]) -> None:
        """Begin a piece of work; the one before must have been finished."""
        assert self._under_way is None
        self._under_way = self._thread.submit(write)

    @property
    def is_done(self) -> bool:
        """Whether a piece of work is done, or has failed, and nobody has asked."""
        return self._under_way is not None and self._under_way.done()

    def finish(self) -> str | None:
        """Wait for the piece under way: its answer, None if there is none. What it raised is raised here."""
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else under_way.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            # beside an error that is under way, another one would hide it
            with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
                self.finish()
        finally:
            self._thread.shutdown()
