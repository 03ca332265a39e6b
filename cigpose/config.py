"""Every number of an experiment: one dataclass field per key of params.yaml.

`load_params` reads params.yaml, `load_preset` one of `cigpose/presets/*.yaml`; both give a `Config`. A preset is a
complete params.yaml: nothing is inherited and nothing changes after it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from cigpose.keypoints import KeypointSet, keypoint_set
from cigpose.schema import ConfigError, from_mapping, to_mapping

PRESETS = Path(__file__).parent / "presets"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """What to fetch, and from where."""

    sources: dict[str, tuple[str, ...]]
    """Folder under data/raw -> names of files in the download table (`cigpose.data.download`). May be empty."""
    mirror: str | None = None
    """Address that replaces the hosts: <mirror>/<host>/<path>."""
    parallel_files: int = 3
    timeout_s: float = 30.0
    """Seconds without a byte before a transfer is tried again."""
    max_attempts: int = 8
    drive_ids: dict[str, str] = field(default_factory=dict)
    """File -> Google Drive id, for files handed out personally (UBody)."""

    def __post_init__(self) -> None:
        for name in ("parallel_files", "timeout_s", "max_attempts"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        for key in self.sources:
            plain = key not in ("", ".", "..") and not set(key) & set("/\\")
            _require(plain, f"sources: {key!r} is no name of a folder under data/raw.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderConfig:
    """A rendered dataset: articulated people drawn with OpenCV."""

    seed: int
    num_images: int
    image_size: tuple[int, int]
    """(width, height) in pixels."""
    max_persons: int = 3
    clutter: float = 0.5
    """0: plain backgrounds, 1: crowded ones."""
    occlusion: float = 0.3
    """Share of persons with an occluder before them."""
    spurious_context: float = 0.5
    """Probability that the context object agrees with the pose of the right arm; 0.5: no relation."""
    context: float = 0.5
    """Share of persons with a context object beside them."""
    hide_arm: float = 0.0
    """Share of persons whose right arm is covered, labels kept."""
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        _require(self.num_images > 0, f"num_images must be positive, got {self.num_images}.")
        _require(min(self.image_size) >= 64, f"image_size must be at least 64 x 64, got {self.image_size}.")
        _require(self.max_persons >= 1, f"max_persons must be 1 or more, got {self.max_persons}.")
        for name in ("clutter", "occlusion", "spurious_context", "context", "hide_arm"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One set of shards: which pictures, which people."""

    raw: str
    """Folder under data/raw."""
    reader: Literal["coco", "crowdpose", "ubody"]
    """`coco` reads any COCO-keypoints JSON: COCO, COCO-WholeBody, rendered people, a user's own."""
    images: str
    """Zip or folder of pictures (UBody: of videos), relative to the raw folder."""
    annotations: str
    """JSON file, or `archive.zip:member` / `archive.tar:member` (UBody: zip of scenes)."""
    detections: str | None = None
    """JSON list of person boxes, for evaluation on detected boxes."""
    frame_interval: int = 1
    """UBody: an image is used when its id is a multiple of this."""
    split: Literal["train", "val"] | None = None
    """UBody: which side of the split file."""
    split_file: str | None = None
    """UBody: `splits.zip:member` or .npy with the names of the test videos."""
    scenes: tuple[str, ...] = ()
    """UBody: scenes in order; empty for all."""
    ground_truth: bool = False
    """Write annotations.json (every person, crowds too) beside the shards: what pycocotools scores against."""
    first_person_only: bool = False
    """UBody: keep only the first person of a frame, as the original converter does by accident."""

    def __post_init__(self) -> None:
        _require(self.frame_interval >= 1, f"frame_interval must be 1 or more, got {self.frame_interval}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConfig:
    """How shards are written."""

    images_per_shard: int = 1000
    jpeg_quality: int = 95
    """Of frames taken from videos; photographs keep their bytes."""
    max_bad_share: float = 0.0
    """Share of persons that may be unreadable before the stage fails."""
    verify_images: bool = False
    """Decode every picture. Headers, ends and checksums are looked at in any case."""
    processes: int = 0
    """0: one per core, fewer where there is little to copy."""

    def __post_init__(self) -> None:
        _require(self.images_per_shard >= 1, f"images_per_shard must be 1 or more, got {self.images_per_shard}.")
        _require(1 <= self.jpeg_quality <= 100, f"jpeg_quality must be between 1 and 100, got {self.jpeg_quality}.")
        _require(0 <= self.max_bad_share <= 1, f"max_bad_share must be between 0 and 1, got {self.max_bad_share}.")
        _require(self.processes >= 0, f"processes must be 0 or more, got {self.processes}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where people come from."""

    download: DownloadConfig
    render: dict[str, RenderConfig]
    """Folder under data/raw -> a rendered dataset. May be empty."""
    datasets: dict[str, DatasetConfig]
    """Folder under data/shards -> a set of shards."""
    train: tuple[str, ...]
    """Datasets trained on; each person once per epoch."""
    val: str
    """Dataset evaluated on."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    locations: dict[str, str] = field(default_factory=dict)
    """Dataset -> address of its shards (s3://, http://, a folder) in place of data/shards/<dataset>."""

    def __post_init__(self) -> None:
        for name in (*self.train, self.val):
            _require(
                name in self.datasets or name in self.locations,
                f"train/val: dataset {name!r} is neither in datasets nor in locations: {sorted(self.datasets)}.",
            )
        _require(len(self.train) > 0, "train: name at least one dataset.")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """CSPNeXt, P5 layout (RTMDet; upstream `mmdet.CSPNeXt`)."""

    widen_factor: float
    deepen_factor: float
    expand_ratio: float = 0.5
    out_stage: int = 4
    """Stage whose features the head gets: 4 is stride 32 and the paper's, 3 is stride 16."""
    pretrained: str | None = None
    """File in data/raw/pretrained with `backbone.*` weights to start from."""

    def __post_init__(self) -> None:
        _require(self.out_stage in (2, 3, 4), f"out_stage must be 2, 3 or 4, got {self.out_stage}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCCConfig:
    """SimCC coordinate classification."""

    sigma: tuple[float, float]
    """Width of the label over the bins of x and y."""
    split_ratio: float = 2.0
    """Bins per crop pixel."""


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
            _require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class HGNNConfig:
    """Hierarchical graph network (paper section 3.3)."""

    num_layers: int = 1


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
        _require(
            all(side > 0 and side % stride == 0 for side in self.input_size),
            f"input_size must be multiples of {stride}, the backbone's stride, got {list(self.input_size)}.",
        )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """The two augmentation stages."""

    stage1: AugmentationStage
    stage2: AugmentationStage
    stage2_from_epoch: int
    """First epoch (from 0) of stage 2."""
    box_padding: float = 1.25
    """Crop size over box size, in training and evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig:
    """One cosine piece of the learning-rate schedule, by iteration."""

    begin_epoch: int
    end_epoch: int
    final_factor: float
    """Rate at its end, over the base rate."""

    def __post_init__(self) -> None:
        _require(self.end_epoch > self.begin_epoch >= 0, f"end_epoch must follow begin_epoch, got {self}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Linear warm-up by iteration, then cosines."""

    warmup_steps: int
    warmup_start_factor: float = 1e-5
    cosines: tuple[CosineConfig, ...] = ()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    """Exponential moving average of weights and buffers (upstream `ExpMomentumEMA`)."""

    enabled: bool = True
    momentum: float = 0.0002
    gamma: float = 2000.0
    """Updates over which the momentum decays from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Full training states, for resuming."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    """Whichever of the two comes first; a checkpoint is always written at the end of a validated epoch."""
    keep: int = 2
    address: str | None = None
    """Folder or fsspec address (s3://...); null: .runs/ beside params.yaml."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How crops reach the device."""

    processes: int = 0
    """Loader processes per training worker; 0 decodes in the worker itself."""
    shuffle_buffer: int = 2000
    """Persons held for shuffling."""
    prefetch_batches: int = 4
    open_shards: int = 8
    """Shards read side by side: pictures are drawn from all of them in random order."""
    verify: bool = True
    """Compare every shard's sha256 when a run opens it first."""
    cache: str | None = None
    """Folder for remote shards; null: the user's cache directory."""
    scaled_decode: bool = False
    """Decode large pictures at 1/2, 1/4 or 1/8 where the crop is smaller still. Changes pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where training runs. RAY_ADDRESS joins an existing cluster."""

    num_workers: int = 1
    use_gpu: bool | Literal["auto"] = "auto"
    threads_per_worker: int = 1
    """CPU threads of torch in each worker; on a GPU the cores reserved for its loader."""
    max_failures: int = 3
    """Times Ray restarts dead workers from the last checkpoint."""
    min_workers: int | None = None
    """Go on with fewer workers, down to this, when a node is lost; null: wait for it to return."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training run."""

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
    channels_last: bool = True
    sync_batch_norm: bool | Literal["auto"] = "auto"
    """Batch statistics of the backbone over all workers, as upstream. auto: on GPUs only."""
    compile: bool = False
    validate_every_epochs: int = 10
    log_every_steps: int = 50
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        shares = self.cluster.num_workers * self.accumulate_steps
        _require(
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


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The evaluation protocol (defaults are upstream's)."""

    boxes: Literal["ground_truth", "detections"] = "ground_truth"
    flip_test: bool = True
    batch: int = 32
    keypoint_score_threshold: float = 0.2
    """Keypoints below do not count in a person's score."""
    person_score: Literal["box_and_keypoints", "box", "keypoints"] = "box_and_keypoints"
    """Box score times the mean of its keypoints' scores, or one of the two alone."""
    oks_nms_threshold: float | None = 0.9
    """Of two persons more alike than this the worse one is dropped; null keeps all."""
    area: Literal["annotation", "box"] = "annotation"
    """`box` takes 0.53 x box area, as CrowdPose does."""
    metric: str = "whole/AP"
    """The one number by which checkpoints and models are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """The MLflow registry."""

    model: str
    """Registered model's name."""
    experiment: str
    margin: float = 0.0
    """A challenger becomes champion when its metric is better by more than this."""
    tracking_uri: str | None = None
    """MLflow address; null: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml."""
    pictures: int = 16
    """Sample predictions logged with the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """What others reported for this experiment; nothing here is used in a computation."""

    ap: float
    """Average precision, percent."""
    source: str
    """Where the figure stands."""
    gflops: float | None = None
    """Multiply-adds of one forward pass, in billions."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete."""

    name: str
    """`<model>_<data>_<H>x<W>`."""
    seed: int
    keypoints: str | dict[str, Any]
    """A known set, or a table of one's own (`KeypointSet.from_mapping`)."""
    data: DataConfig
    model: ModelConfig
    augmentation: AugmentationConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    registry: RegistryConfig
    published: PublishedConfig | None = None

    def __post_init__(self) -> None:
        """Refuse what no single section can see."""
        try:
            keypoints = self.keypoint_set
        except ValueError as err:
            raise ConfigError(str(err)) from err
        for name in ("train_top_k", "eval_top_k"):
            value = getattr(self.model.causal, name)
            if value > len(keypoints):
                raise ConfigError(f"model.causal.{name}: {value} of only {len(keypoints)} keypoints.")

    @cached_property
    def keypoint_set(self) -> KeypointSet:
        """The keypoints this experiment predicts."""
        return keypoint_set(self.keypoints)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as params.yaml holds them."""
        return to_mapping(self)


def config_from_mapping(values: Mapping[str, Any]) -> Config:
    """A `Config` from plain values.

    Raises:
        ConfigError: with the path of the key that is wrong.
    """
    return from_mapping(Config, values)


def load_params(path: str | Path = "params.yaml") -> Config:
    """The experiment that params.yaml describes.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not yaml, or a key is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found. `cigpose use quickstart` writes it.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid yaml: {err}") from err
    try:
        return config_from_mapping(values)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The yaml of a preset, comments and all.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in presets():
        raise ConfigError(f"preset {name!r} does not exist. Known: {', '.join(presets())}.")
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def load_preset(name: str) -> Config:
    """The experiment a preset describes.

    Raises:
        ConfigError: there is no such preset.
    """
    return config_from_mapping(yaml.safe_load(preset_text(name)))
