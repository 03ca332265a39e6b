"""How large a model is and how much it computes, without computing it.

The network runs once on the meta device, where tensors have shapes and no values. Counted as MMEngine's
`get_model_complexity_info` does, so that the figures compare with published ones: a multiply-add is one, batch norm two
per value, pooling one per value read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cigpose.config import Config
from cigpose.model.estimator import build_model

_aten = torch.ops.aten
_NORMS = (_aten.native_batch_norm, _aten._native_batch_norm_legit_no_training, _aten.cudnn_batch_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """Size and cost of one model, for one crop."""

    parameters: int
    """All, as published; includes those that are never trained."""
    trained_parameters: int
    """Those that a loss reaches."""
    multiply_adds: int
    """Of one forward pass of this implementation."""
    multiply_adds_edgewise: int
    """With the graph network's maps applied to edges, as upstream does and publishes, not to nodes."""
    backbone_multiply_adds: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up multiply-adds of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = func._overloadpacket
        if operation in _NORMS:  # only its shape matters, and on the meta device it is slow
            self.total += 2 * args[0].numel()
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        out = func(*args, **kwargs)
        if operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=out) // 2
        elif operation is _aten.mean:
            self.total += args[0].numel()
        return out


def _saved_by_nodes(config: Config) -> int:
    """What upstream's graph network computes more than ours.

    It maps the 2 C values of each directed edge to C; ours maps each node twice. It averages over groups without
    matrix products; ours has two of them, keypoints x groups.
    """
    if config.model.head.kind != "cigpose":
        return 0
    keypoints, hidden = config.keypoint_set, config.model.head.hidden
    num_groups, reduced = len(keypoints.groups), hidden // 4

    def of_edge_conv(nodes: int, edges: int, channels: int) -> int:
        return (edges - nodes) * 2 * channels * channels if edges else 0

    skeleton = of_edge_conv(len(keypoints), 2 * len(keypoints.edges), hidden)
    complete = of_edge_conv(num_groups, num_groups * (num_groups - 1), reduced)
    averages = len(keypoints) * num_groups * (reduced + hidden)
    return config.model.hgnn.num_layers * (skeleton + complete - averages)


def complexity(config: Config) -> Complexity:
    """Parameters and multiply-adds of the model that a configuration describes."""
    width, height = config.model.input_size
    with torch.device("meta"), torch.no_grad():
        model = build_model(config).eval()
        with _Counter() as backbone:
            features: Tensor = model.backbone(torch.empty(1, 3, height, width))
        with _Counter() as head:
            model.head(features)
    total = backbone.total + head.total
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        multiply_adds=total,
        multiply_adds_edgewise=total + _saved_by_nodes(config),
        backbone_multiply_adds=backbone.total,
    )
