"""A whole experiment, from params.yaml or a preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cigpose.config.data import DataConfig
from cigpose.config.document import read_yaml
from cigpose.config.model import ModelConfig
from cigpose.config.outcome import (
    GUARDED_PARTS,
    EvaluateConfig,
    NotifyConfig,
    PublishedConfig,
    RegistryConfig,
    RobustnessConfig,
    refuse_unknown_metric,
)
from cigpose.config.schema import (
    HOW,
    LARGEST,
    ConfigError,
    affects,
    field_marks,
    from_mapping,
    leaves,
    nearest_mark,
    public_values,
    require_between,
    require_name,
    to_mapping,
)
from cigpose.config.training import AugmentationConfig, TrainConfig
from cigpose.keypoints import KeypointSet, keypoint_set, parts_with_whole

PRESETS = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    What a result depends on is said at the fields (`affects`, `HOW`), and nowhere else.
    """

    name: str = field(metadata=affects("train"))
    """`<model>_<data>_<H>x<W>`."""
    seed: int = field(metadata=affects("train"))
    keypoints: str | dict[str, Any] = field(metadata=affects("shard", "train", "robustness", "evaluate"))
    """A known set, or a table of one's own (`KeypointSet.from_mapping`)."""
    data: DataConfig
    model: ModelConfig = field(metadata=affects("train"))
    augmentation: AugmentationConfig = field(metadata=affects("train"))
    train: TrainConfig = field(metadata=affects("train"))
    evaluate: EvaluateConfig = field(metadata=affects("robustness", "evaluate", "register"))
    registry: RegistryConfig = field(metadata=affects("register"))
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig, metadata=affects("robustness"))
    notify: NotifyConfig = field(default_factory=NotifyConfig, metadata=HOW)
    published: PublishedConfig | None = field(default=None, metadata=HOW)

    def __post_init__(self) -> None:
        """Refuse what no single section can see."""
        require_name(self.name, "name", "name")
        require_between(self, 0, LARGEST, "seed")
        try:
            keypoints = self.keypoint_set
        except ValueError as err:
            raise ConfigError(str(err)) from err
        except (TypeError, AttributeError) as err:
            raise ConfigError(f"keypoints: not a table of keypoints ({err}). See `KeypointSet.from_mapping`.") from err
        known = {*GUARDED_PARTS, *parts_with_whole(keypoints)}
        if unknown := sorted(self.registry.max_loss.keys() - known):
            raise ConfigError(f"registry.max_loss: {unknown[0]!r} is no part. Known: {', '.join(sorted(known))}.")
        if (paired := self.robustness.reversed_context) is not None and paired not in {
            **self.data.datasets,
            **self.data.locations,
        }:
            raise ConfigError(f"robustness.reversed_context: {paired!r} is not among data.datasets and data.locations.")
        self.refuse_unknown_metrics(crowding=True)  # whether the labels tell crowds is known later
        for name in ("train_top_k", "eval_top_k"):
            value = getattr(self.model.causal, name)
            if value > len(keypoints):
                raise ConfigError(f"model.causal.{name}: {value} of only {len(keypoints)} keypoints.")

    def refuse_unknown_metrics(self, *, crowding: bool) -> None:
        """See that the figures by which epochs and models are compared are measured (see `metric_names`).

        Raises:
            ConfigError: one is not.
        """
        for where, protocol in (("evaluate", self.evaluate), ("train.validation", self.train.validation)):
            refuse_unknown_metric(protocol.metric, self.keypoint_set, crowding=crowding, where=f"{where}.metric")

    @cached_property
    def keypoint_set(self) -> KeypointSet:
        """The keypoints this experiment predicts, with the sigmas it is measured by."""
        keypoints, sigmas = keypoint_set(self.keypoints), self.evaluate.sigmas
        if sigmas is None:
            return keypoints
        if unknown := sorted(sigmas.values.keys() - set(keypoints.names)):
            raise ValueError(
                f"evaluate.sigmas.values: {unknown[0]!r} is no keypoint of {keypoints.name!r}: "
                f"{', '.join(keypoints.names[:20])}."
            )
        values = zip(keypoints.names, keypoints.sigmas, strict=True)
        return dataclasses.replace(
            keypoints,
            sigmas=tuple(sigmas.values.get(name, own) for name, own in values),
            sigmas_origin=sigmas.origin,
        )

    def for_validation(self) -> Config:
        """The same experiment, whose `evaluate` is how epochs are measured while it trains."""
        # without gradients as many persons fit as in training, and a GPU wants many
        batch = max(self.evaluate.batch, self.train.batch_per_worker)
        protocol = EvaluateConfig(**to_mapping(self.train.validation), batch=batch)
        return dataclasses.replace(self, evaluate=protocol)

    def params_of(self, stage: str) -> dict[str, Any]:
        """Path -> plain value of every param that the result of a stage of dvc.yaml depends on."""
        marks = field_marks(Config, "stages")
        return {path: value for path, value in leaves(self.to_mapping()).items() if stage in nearest_mark(path, marks)}

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as params.yaml holds them: for this machine alone. See `to_public_mapping`."""
        return to_mapping(self)

    def to_public_mapping(self) -> dict[str, Any]:
        """Plain values that may be shown and leave the machine: without private ones, addresses without credentials.

        They are a whole experiment again (`config_from_mapping`).
        """
        return public_params(self.to_mapping())


def public_params(values: Any, path: str = "") -> Any:
    """Values of params.yaml, or those at `path` in it, as they may leave the machine."""
    return public_values(values, field_marks(Config, "public"), path)


def config_from_mapping(values: Mapping[str, Any]) -> Config:
    """A `Config` from plain values.

    Those without `train.validation`, as models of before it keep them, had their epochs measured by `evaluate`.

    Raises:
        ConfigError: with the path of the key that is wrong.
    """
    train, evaluate = (values.get(key) if isinstance(values, Mapping) else None for key in ("train", "evaluate"))
    if isinstance(train, Mapping) and "validation" not in train and evaluate is not None:
        protocol = to_mapping(from_mapping(EvaluateConfig, evaluate, "evaluate"))
        for of_the_finished_model in ("batch", "sigmas"):
            del protocol[of_the_finished_model]
        values = {**values, "train": {**train, "validation": protocol}}
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
        return config_from_mapping(read_yaml(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: is not UTF-8 text ({err.reason} at byte {err.start}).") from err
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


def fast_variant(config: Config) -> Config:
    """The same experiment as GPUs do it fastest, under a name of its own: what comes of it differs a little."""
    train = dataclasses.replace(config.train, precision="bf16", compile=True, cudnn_benchmark=True)
    augmentation = dataclasses.replace(config.augmentation, device="auto")
    return dataclasses.replace(config, name=f"{config.name}-fast", train=train, augmentation=augmentation)


def load_preset(name: str) -> Config:
    """The experiment a preset describes.

    Raises:
        ConfigError: there is no such preset.
    """
    return config_from_mapping(read_yaml(preset_text(name)))
