"""`augmentation` and `train` in params.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cigpose.config.outcome import ProtocolConfig
from cigpose.config.schema import ADDRESS, HOW, LARGEST, affects, require, require_between, require_name
from cigpose.files.addresses import file_name_of, is_remote
from cigpose.files.errors import shown

LONGEST = 100_000
"""Most epochs: the rate of every step is computed before the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationStage:
    """Random changes of one training stage; probabilities are per person."""

    flip_prob: float = 0.5
    half_body_prob: float = 0.3
    shift_factor: float = 0.16
    """Largest shift of the box, in box sizes."""
    shift_prob: float = 0.3
    scale_range: tuple[float, float] = (0.6, 1.4)
    scale_prob: float = 1.0
    rotate_degrees: float = 80.0
    rotate_prob: float = 0.6
    hsv_delta: tuple[int, int, int] = (5, 30, 30)
    """Largest change of hue (of 180), saturation and value (of 255)."""
    blur_prob: float = 0.1
    median_blur_prob: float = 0.1
    dropout_prob: float = 1.0
    dropout_size: tuple[float, float] = (0.2, 0.4)
    """Smallest and largest side of the dropped rectangle, as a share of the crop's side."""
    extra: tuple[dict[str, Any], ...] = ()
    """Transforms of albumentations by name, each {Name: {argument: value}}, done in turn after all the others."""

    def __post_init__(self) -> None:
        chances = ("flip", "half_body", "shift", "scale", "rotate", "blur", "median_blur", "dropout")
        require_between(self, 0, 1, *(f"{chance}_prob" for chance in chances))
        require_between(self, 0, 10, "shift_factor")
        require_between(self, 0.01, 100, "scale_range")
        require_between(self, 0, 360, "rotate_degrees")
        require_between(self, 0, 255, "hsv_delta")
        require_between(self, 0, 1, "dropout_size", positive=True)
        for name in ("scale_range", "dropout_size"):
            low, high = getattr(self, name)
            require(low <= high, f"{name} must be [smallest, largest], got [{low}, {high}].")
        for i, entry in enumerate(self.extra):
            require(
                len(entry) == 1 and all(isinstance(arguments, dict | None) for arguments in entry.values()),
                f"extra[{i}] must be one transform of albumentations, such as {{RandomBrightnessContrast: {{p: 0.2}}}},"
                f" got {shown(entry)}.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """The two augmentation stages."""

    stage1: AugmentationStage
    stage2: AugmentationStage
    stage2_from_epoch: int
    """First epoch (from 0) of stage 2."""
    box_padding: float = 1.25
    """Crop size over box size, in training and evaluation."""
    # crops of the same draws, equal within one grey level
    device: Literal["auto", "cpu", "gpu"] = field(default="cpu", metadata=HOW)
    """Where colours, blurs and dropout of training crops are made. auto: on the GPU that trains, else on the CPU."""

    def __post_init__(self) -> None:
        require_between(self, 0, LARGEST, "stage2_from_epoch")
        require_between(self, 0.1, 10, "box_padding")
        for name in ("stage1", "stage2"):
            require(
                self.device != "gpu" or not getattr(self, name).extra,
                f"device is gpu, but {name}.extra has transforms, which see the finished crop and are made on the CPU. "
                "Write auto, which leaves that stage to the CPU, or take them out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig:
    """One cosine piece of the learning-rate schedule, by iteration."""

    begin_epoch: int
    end_epoch: int
    final_factor: float
    """Rate at its end, over the base rate."""

    def __post_init__(self) -> None:
        require(self.end_epoch > self.begin_epoch >= 0, f"end_epoch must follow begin_epoch, got {self}.")
        require_between(self, 0, LONGEST, "begin_epoch", "end_epoch")
        require_between(self, 0, 1_000_000, "final_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Linear warm-up by iteration, then cosines."""

    warmup_steps: int
    warmup_start_factor: float = 1e-5
    cosines: tuple[CosineConfig, ...] = ()

    def __post_init__(self) -> None:
        require_between(self, 0, LARGEST, "warmup_steps")
        require_between(self, 0, 1, "warmup_start_factor", positive=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float
    """Base rate for a total batch of `learning_rate_batch`."""
    learning_rate_batch: int
    learning_rate_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate follows `train.batch_total`. Upstream: none."""
    weight_decay: float = 0.05
    """Not applied to normalisation layers and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad_norm: float | None = 35.0
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    """Part of the network, as `backbone` or `head.gau` -> factor on its rate; 0 freezes it. The innermost counts."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1e38, "learning_rate", "clip_grad_norm", positive=True)
        require_between(self, 1, LARGEST, "learning_rate_batch")
        require_between(self, 0, 1_000_000, "weight_decay")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must be 0 or more and below 1, got {self.betas}.")
        for part, factor in self.learning_rate_factors.items():
            where = f"learning_rate_factors.{part}"
            require(0 <= factor <= 1_000_000, f"{where} must be between 0 and 1000000, got {shown(factor)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    """Exponential moving average of weights and buffers (upstream `ExpMomentumEMA`)."""

    enabled: bool = True
    momentum: float = 0.0002
    gamma: float = 2000.0
    """Updates over which the momentum decays from 1."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1, "momentum")
        require_between(self, 0, 1e12, "gamma", positive=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Full training states, for resuming."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    """Whichever of the two comes first; a checkpoint is always written at the end of a validated epoch."""
    keep: int = 2
    address: str | None = field(default=None, metadata=ADDRESS)
    """Folder or s3:// address; null: .runs/ beside params.yaml."""

    def __post_init__(self) -> None:
        require_between(self, 1, LARGEST, "every_steps")
        require_between(self, 0, 1_000_000, "every_minutes")
        require_between(self, 1, 1_000_000, "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How crops reach the device."""

    processes: int = field(default=0, metadata=HOW)
    """Loader processes per training worker; 0 decodes in the worker itself."""
    shuffle_buffer: int = 2000
    """Persons held for shuffling."""
    prefetch_batches: int = field(default=4, metadata=HOW)
    open_shards: int = 16
    """Shards read side by side, a person of each in turn."""
    verify: bool = field(default=True, metadata=HOW)
    """Compare every shard's sha256 when a process reads it first."""
    cache: str | None = field(default=None, metadata=HOW)
    """Folder for remote shards; null: the user's cache directory."""
    cache_gb: float | None = field(default=200.0, metadata=HOW)
    """Beyond this size remote shards that nobody reads are removed, the oldest first; null: no limit; 0: no copies."""
    scaled_decode: bool = False
    """Decode large pictures at 1/2, 1/4 or 1/8 where the crop is smaller still. Changes pixels."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "processes")
        require_between(self, 0, 10_000_000, "shuffle_buffer")
        require_between(self, 1, 10_000, "prefetch_batches", "open_shards")
        require_between(self, 0, 1_000_000_000, "cache_gb")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where training runs. RAY_ADDRESS joins an existing cluster."""

    num_workers: int = 1  # decides who gets which persons, and the batch of each normalisation
    # another processor rounds otherwise; what it decides besides, is left to it by `auto` elsewhere
    use_gpu: bool | Literal["auto"] = field(default="auto", metadata=HOW)
    threads_per_worker: int = field(default=1, metadata=HOW)
    """CPU threads of torch in each worker; on a GPU the cores reserved for its loader."""
    max_failures: int = field(default=3, metadata=HOW)
    """Times Ray restarts dead workers from the last checkpoint."""
    min_workers: int | None = field(default=None, metadata=HOW)
    """Go on with fewer workers, down to this, when a node is lost; null: wait for it to return."""
    wait_minutes: int = field(default=60, metadata=HOW)
    """How long a joined cluster has to come up with nodes: those of autoscaling, and lost ones."""

    def __post_init__(self) -> None:
        require_between(self, 1, 100_000, "num_workers")
        require_between(self, 1, 100_000, "wait_minutes")
        require_between(self, 1, self.num_workers, "min_workers")
        require_between(self, 1, 1024, "threads_per_worker")
        require_between(self, 0, 1_000_000, "max_failures")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training run."""

    start_from: str | None = field(default=None, metadata=ADDRESS | affects("pretrained"))
    """Model that gives the first weights where they fit: a file, a folder, models:/NAME@ALIAS, or an address."""
    epochs: int
    batch_total: int
    """Persons per optimiser step, over all workers and accumulation steps."""
    loss_batch: int
    """Batch for which the summed keypoint loss is stated: upstream's batch per GPU."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    accumulate_steps: int = 1
    ema: EMAConfig = field(default_factory=EMAConfig)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Of autocast; weights and losses are fp32. auto: bf16 where the processor has it, else fp32."""
    # as channels_last, `compile` only orders the same sums in another way, as another GPU or library does
    channels_last: bool = field(default=True, metadata=HOW)
    sync_batch_norm: bool | Literal["auto"] = "auto"
    """Batch statistics of the backbone over all workers, as upstream. auto: on GPUs only."""
    compile: bool = field(default=False, metadata=HOW)
    cudnn_benchmark: bool = field(default=False, metadata=HOW)
    """Let cuDNN try its kernels on the first batch of each size, and keep the fastest."""
    validate_every_epochs: int = 10
    validation: ProtocolConfig = field(default_factory=ProtocolConfig)
    """How epochs are measured and compared while training. `evaluate` measures the finished model: no part of this."""
    log_every_steps: int = field(default=50, metadata=HOW)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=HOW)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.start_from is not None:
            require(self.start_from != "", "start_from must name a model, or be null.")
            if is_remote(self.start_from):
                require_name(file_name_of(self.start_from), "start_from", "name")
        require_between(self, 1, LONGEST, "epochs")
        require_between(self, 1, 1_000_000, "batch_total", "loss_batch", "accumulate_steps")
        require_between(self, 1, LARGEST, "validate_every_epochs", "log_every_steps")
        shares = self.cluster.num_workers * self.accumulate_steps
        require(
            self.batch_total > 0 and self.batch_total % shares == 0,
            f"batch_total must be a multiple of {shares} (workers x accumulate_steps), got {self.batch_total}.",
        )

    @property
    def batch_per_worker(self) -> int:
        """Persons per forward pass of one worker."""
        return self.batch_total // (self.cluster.num_workers * self.accumulate_steps)

    @property
    def resolved_learning_rate(self) -> float:
        """Base rate after the scaling rule."""
        ratio = self.batch_total / self.optimizer.learning_rate_batch
        scale = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.optimizer.learning_rate_scaling]
        return self.optimizer.learning_rate * scale
