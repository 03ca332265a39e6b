"""What a retraining may be asked for, as types whose values Prefect's page offers as a list.

Presets are those of the library, stages those of the project's dvc.yaml as it is when the flow is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import yaml

from cigpose.config import presets
from pipelines.lineage import project_root
from pipelines.retraining.policies import POLICIES

OWN = "params.yaml"
"""In place of a preset: the project's own experiment."""
BEGINNING = "the beginning"
ALL = "all"


def written_stages(root: Path) -> list[str]:
    """Names of the stages of dvc.yaml, in the order they are written in.

    Those of this project where the file cannot be read: `retrain.stages` then says what is wrong with it.
    """
    try:
        return [str(name) for name in yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return list(POLICIES)


if TYPE_CHECKING:
    Preset: TypeAlias = str
    First: TypeAlias = str
    Anew: TypeAlias = str
else:
    _STAGES = tuple(written_stages(project_root())) or tuple(POLICIES)
    Preset = Literal[(OWN, *presets())]
    First = Literal[(BEGINNING, *_STAGES)]
    Anew = Literal[(ALL, *_STAGES)]
