"""Every number of an experiment: one dataclass field per key of params.yaml.

`load_params` reads params.yaml, `load_preset` one of `cigpose/presets/*.yaml`; both give a `Config`. A preset is a
complete experiment: nothing is inherited and nothing changes after it is built.
"""

from cigpose.config.data import DataConfig, DatasetConfig, DownloadConfig, RenderConfig, ShardingConfig
from cigpose.config.experiment import (
    PRESETS,
    Config,
    config_from_mapping,
    fast_variant,
    load_params,
    load_preset,
    preset_text,
    presets,
    public_params,
)
from cigpose.config.model import BackboneConfig, CausalConfig, HeadConfig, HGNNConfig, ModelConfig, SimCCConfig
from cigpose.config.outcome import (
    EvaluateConfig,
    NotifyConfig,
    ProtocolConfig,
    PublishedConfig,
    RegistryConfig,
    RobustnessConfig,
    ServingConfig,
)
from cigpose.config.schema import ConfigError
from cigpose.config.training import (
    AugmentationConfig,
    AugmentationStage,
    CheckpointConfig,
    ClusterConfig,
    CosineConfig,
    EMAConfig,
    LoaderConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "AugmentationConfig",
    "AugmentationStage",
    "BackboneConfig",
    "CausalConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CosineConfig",
    "DataConfig",
    "DatasetConfig",
    "DownloadConfig",
    "EMAConfig",
    "EvaluateConfig",
    "HGNNConfig",
    "HeadConfig",
    "LoaderConfig",
    "ModelConfig",
    "NotifyConfig",
    "OptimizerConfig",
    "ProtocolConfig",
    "PublishedConfig",
    "RegistryConfig",
    "RenderConfig",
    "RobustnessConfig",
    "ScheduleConfig",
    "ServingConfig",
    "ShardingConfig",
    "SimCCConfig",
    "TrainConfig",
    "config_from_mapping",
    "fast_variant",
    "load_params",
    "load_preset",
    "preset_text",
    "presets",
    "public_params",
]
