"""A whole experiment, from params.yaml or a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cigpose.config.data import DataConfig
from cigpose.config.document import read_yaml
from cigpose.config.model import ModelConfig
from cigpose.config.outcome import EvaluateConfig, PublishedConfig, RegistryConfig, refuse_unknown_metric
from cigpose.config.schema import (
    LARGEST,
    ConfigError,
    from_mapping,
    public_marks,
    public_values,
    require_between,
    require_name,
    to_mapping,
)
from cigpose.config.training import AugmentationConfig, TrainConfig
from cigpose.keypoints import KeypointSet, keypoint_set

PRESETS = Path(__file__).parents[1] / "presets"


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
        require_name(self.name, "name", "name")
        require_between(self, 0, LARGEST, "seed")
        try:
            keypoints = self.keypoint_set
        except ValueError as err:
            raise ConfigError(str(err)) from err
        except (TypeError, AttributeError) as err:
            raise ConfigError(f"keypoints: not a table of keypoints ({err}). See `KeypointSet.from_mapping`.") from err
        # whether the labels tell crowds is known later
        refuse_unknown_metric(self.evaluate.metric, keypoints, crowding=True)
        for name in ("train_top_k", "eval_top_k"):
            value = getattr(self.model.causal, name)
            if value > len(keypoints):
                raise ConfigError(f"model.causal.{name}: {value} of only {len(keypoints)} keypoints.")

    @cached_property
    def keypoint_set(self) -> KeypointSet:
        """The keypoints this experiment predicts."""
        return keypoint_set(self.keypoints)

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
    return public_values(values, public_marks(Config), path)


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


def load_preset(name: str) -> Config:
    """The experiment a preset describes.

    Raises:
        ConfigError: there is no such preset.
    """
    return config_from_mapping(read_yaml(preset_text(name)))
