"""A dataset as it is measured: its shards, and the labels beside them. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from cigpose.config import Config
from cigpose.evaluate.ground_truth import GroundTruth, parse_ground_truth
from cigpose.files.cache import ShardCache
from cigpose.loader.shards import ShardSet


def open_shards(config: Config, dataset: str, root: Path) -> ShardSet:
    """The shards of one dataset, wherever they lie."""
    options = config.train.loader
    cache = ShardCache(options.cache, options.cache_gb)
    return ShardSet.open(dataset, root, config.data.locations, cache=cache)


def dataset_truth(shards: ShardSet, config: Config) -> GroundTruth:
    """The labels beside the shards of a dataset.

    Raises:
        ValueError: the dataset was sharded without ground truth, or it is not the one that was written.
    """
    found = shards.ground_truth()
    if found is None:
        raise ValueError(
            f"{shards.address}: has no ground truth. Set data.datasets.{shards.dataset}.ground_truth: true in "
            "params.yaml and run `dvc repro shard`."
        )
    place, text = found
    return parse_ground_truth(text, config.keypoint_set, area=config.evaluate.area, where=place)
