"""The training step on fake CUDA tensors: shapes, devices and dtypes of a GPU on a CPU build of torch.

A process calls `load` with the compiled fake_cuda.cpp before it imports torch, then everything within `fake_cuda()`.
What it cannot see: values, kernels, NCCL, and DDP's reducer, which refuses fake tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def compile_command(compiler: str, torch_folder: Path, target: Path) -> list[str]:
    """How to compile the shim against a torch."""
    include, libraries = torch_folder / "include", torch_folder / "lib"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    return [compiler, *flags, str(SOURCE), "-o", str(target), "-lc10", "-ltorch_cpu"]


def load(shim: Path) -> None:
    """Give torch the shim, before it is imported."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)


class Event:
    """A CUDA event: waiting for it is a host wait."""

    waited: int = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it tensors are fake, and `cuda` is a device."""
    import batch_norm_kernels  # noqa: F401
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def replace_tensors(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        """`Module._apply` where parameters cannot change device in place."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    with torch.no_grad():
                        moved = function(parameter).detach()
                    child._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
            for name, buffer in child._buffers.items():
                child._buffers[name] = None if buffer is None else function(buffer)
        return module

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        if id(tensor) not in memo:
            clone = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
        return memo[id(tensor)]

    class WithoutReducer(nn.Module):
        def __init__(self, module: nn.Module, **_options: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any) -> Any:
            return self.module(*arguments)

        def no_sync(self) -> Any:
            return contextlib.nullcontext()

    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.Event = Event
    nn.Module._apply = replace_tensors
    nn.parallel.DistributedDataParallel = WithoutReducer
    FakeTensor.__deepcopy__ = copied
    with FakeTensorMode():
        yield


def watch() -> Any:
    """A context that counts what makes the host wait for the GPU, and refuses mixed devices: see `Watch`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    sized_by_values = {aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim, aten._unique2}

    class Watch(TorchDispatchMode):
        """`waits`: what was waited for, and where. `mixed`: operations whose tensors lie on two devices."""

        def __enter__(self) -> Any:
            self.waits: list[str] = []
            self.mixed: list[str] = []
            self.dtypes: set[tuple[str, Any]] = set()
            self.before = Event.waited
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            self.waits += ["event"] * (Event.waited - self.before)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            packet = func._overloadpacket
            self.dtypes |= {(packet.__name__, tensor.dtype) for tensor in given if tensor.is_floating_point()}
            self._look_for_waits(func, packet, args, kwargs, given)
            if packet is aten._local_scalar_dense:  # a fake tensor has no value: a finite one, or "yes"
                return args[0].dtype == torch.bool or 1.0
            if packet is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
                return args[0].clone()
            return func(*args, **kwargs)

        def _look_for_waits(self, func: Any, packet: Any, args: Any, kwargs: Any, given: Any) -> None:
            on_gpu = any(tensor.is_cuda for tensor in given)
            copies = packet in (aten._to_copy, aten.copy_)
            devices = {tensor.device.type for tensor in given if tensor.dim()}
            if len(devices) > 1 and not copies:
                self.mixed.append(f"{func} {_where()}")
            if packet is aten._local_scalar_dense and on_gpu:
                self.waits.append(f"item {_where()}")
            elif packet in sized_by_values and on_gpu:
                self.waits.append(f"{packet.__name__} {_where()}")
            elif packet is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.waits.append(f"index by mask {_where()}")
            elif copies and not kwargs.get("non_blocking") and not (packet is aten.copy_ and args[2:] == (True,)):
                target = (
                    args[0].device if packet is aten.copy_ else torch.device(kwargs.get("device") or args[0].device)
                )
                source = args[1].device if packet is aten.copy_ else args[0].device
                if target.type != source.type:
                    self.waits.append(f"copy from {source.type} to {target.type} {_where()}")

    return Watch()


def _where() -> str:
    ours = ("/cigpose/", "/torch/nn/")
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in ours)]
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else "somewhere"
