"""Shards one dataset, as the stage does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cigpose.config import CausalConfig, Config, DatasetConfig, ShardingConfig, load_preset
from cigpose.shard.index import ShardIndex
from cigpose.shard.tars import members
from cigpose.shard.write import write_dataset


class Sharder:
    """Shards one dataset, `people`, into a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "people"

    def config(
        self,
        keypoints: str | Mapping[str, Any] = "coco_wholebody",
        sharding: Mapping[str, Any] | None = None,
        **dataset: Any,
    ) -> Config:
        base = load_preset("quickstart")
        data = replace(
            base.data,
            datasets={**base.data.datasets, "people": DatasetConfig(**{"raw": ".", "reader": "coco", **dataset})},
            sharding=ShardingConfig(**{"processes": 1, **(sharding or {})}),
        )
        model = replace(base.model, causal=CausalConfig(train_top_k=1))
        evaluate = replace(base.evaluate, metric="body/AP")  # which every set has
        train = replace(base.train, validation=replace(base.train.validation, metric="body/AP"))
        return replace(base, data=data, model=model, keypoints=keypoints, train=train, evaluate=evaluate)

    def __call__(self, raw: Path, **options: Any) -> ShardIndex:
        return write_dataset(self.config(**options), "people", raw, self.root)

    def files(self) -> dict[str, bytes]:
        """Every member of every shard, in order."""
        return {name: data for tar in sorted(self.folder.glob("*.tar")) for name, data in members(tar)}

    def samples(self) -> dict[str, dict[str, Any]]:
        """Key -> JSON of each sample."""
        return {
            name.removesuffix(".json"): json.loads(data) for name, data in self.files().items() if name[-5:] == ".json"
        }

    def persons(self) -> dict[int, dict[str, Any]]:
        """Id -> person."""
        return {person["id"]: person for sample in self.samples().values() for person in sample["persons"]}


@pytest.fixture
def sharder(tmp_path: Path) -> Sharder:
    """Writes shards below a temporary folder."""
    return Sharder(tmp_path / "shards")
