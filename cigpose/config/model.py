"""`model` in params.yaml: the network and its losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cigpose.config.schema import ADDRESS, affects, require, require_between, require_name
from cigpose.files.addresses import file_name_of, is_remote


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """CSPNeXt, P5 layout (RTMDet; upstream `mmdet.CSPNeXt`)."""

    widen_factor: float
    deepen_factor: float
    expand_ratio: float = 0.5
    out_stage: int = 4
    """Stage whose features the head gets: 4 is stride 32 and the paper's, 3 is stride 16."""
    pretrained: str | None = field(default=None, metadata=ADDRESS | affects("pretrained", "train"))
    """File in data/raw/pretrained with `backbone.*` weights to start from, or its s3:// or http(s):// address."""

    def __post_init__(self) -> None:
        if self.pretrained is not None and is_remote(self.pretrained):
            require_name(file_name_of(self.pretrained), "pretrained", "name")
        elif self.pretrained is not None:
            require_name(self.pretrained, "pretrained", "path")
        require_between(self, 0.0625, 8, "widen_factor")
        require_between(self, 0, 8, "deepen_factor", positive=True)
        require_between(self, 0.125, 4, "expand_ratio")
        require(self.out_stage in (2, 3, 4), f"out_stage must be 2, 3 or 4, got {self.out_stage}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCCConfig:
    """SimCC coordinate classification."""

    sigma: tuple[float, float]
    """Width of the label over the bins of x and y."""
    split_ratio: float = 2.0
    """Bins per crop pixel."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1000, "sigma", positive=True)
        require_between(self, 0.1, 16, "split_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """SimCC head with a gated attention unit."""

    kind: Literal["cigpose", "rtmpose"]
    """`rtmpose` is the baseline: no CIM, no HGNN."""
    hidden: int
    """Channels of a keypoint's embedding."""
    gau_s: int
    """Size of the GAU's shared query/key."""
    gau_expansion: int = 2
    final_kernel_size: int = 7

    def __post_init__(self) -> None:
        require_between(self, 1, 8192, "hidden", "gau_s")
        require_between(self, 1, 16, "gau_expansion")
        require_between(self, 1, 63, "final_kernel_size")
        require(self.final_kernel_size % 2 == 1, f"final_kernel_size must be odd, got {self.final_kernel_size}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalConfig:
    """Causal intervention module (paper section 3.2)."""

    train_top_k: int
    """Least certain keypoints replaced by their canonical embedding in each training sample."""
    eval_top_k: int = 1
    """The same at evaluation. The paper's models use 1; 0 turns the intervention off."""
    strategy: Literal["top_k", "threshold"] = "top_k"
    """`threshold` replaces every keypoint whose confounding score exceeds `threshold`."""
    threshold: float = 0.5
    supervise_uncertainty: bool = False
    """Train the layers that score uncertainty with the keypoint loss. Upstream never trains them."""
    counterfactual_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("train_top_k", "eval_top_k"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}.")
        require_between(self, 0, 1_000_000, "counterfactual_weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class HGNNConfig:
    """Hierarchical graph network (paper section 3.3)."""

    num_layers: int = 1

    def __post_init__(self) -> None:
        require_between(self, 0, 64, "num_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network and its losses."""

    input_size: tuple[int, int]
    """(width, height) of the crop in pixels."""
    backbone: BackboneConfig
    simcc: SimCCConfig
    head: HeadConfig
    causal: CausalConfig
    hgnn: HGNNConfig = field(default_factory=HGNNConfig)
    loss_beta: float = 10.0
    """Temperature of the keypoint loss: both target and prediction are multiplied by it."""

    def __post_init__(self) -> None:
        stride = 2 ** (self.backbone.out_stage + 1)
        require(
            all(0 < side <= 4096 and side % stride == 0 for side in self.input_size),
            f"input_size must be multiples of {stride}, the backbone's stride, and at most 4096, "
            f"got {list(self.input_size)}.",
        )
        require_between(self, 0, 1_000_000, "loss_beta", positive=True)
