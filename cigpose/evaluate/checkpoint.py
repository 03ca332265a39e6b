"""One trained model measured on one dataset, by one process or by several that each take a share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from cigpose.config import Config
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.predict import predict
from cigpose.evaluate.predictions import Predictions
from cigpose.loader.batches import eval_loader
from cigpose.loader.samples import read_record, read_shard
from cigpose.loader.shards import ShardSet
from cigpose.loader.stream import decode_sample
from cigpose.model.device import choose_device
from cigpose.model.weights import load_checkpoint
from cigpose.progress import progress

Gather = Callable[[Predictions], Sequence[Predictions] | None]
"""Brings the shares of all workers together: called by each, gives all shares on rank 0 and None elsewhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured, and what it was measured from."""

    metrics: dict[str, float]
    """`<part>/<figure>` -> value."""
    predictions: Predictions
    truth: GroundTruth
    config: Config
    """The model's own, with the dataset and the protocol of this evaluation."""
    seconds: float
    """It took to predict the people, reading them included."""


def evaluate_checkpoint(
    checkpoint: str | Path,
    config: Config,
    *,
    shards_root: Path = Path("data/shards"),
    dataset: str | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    results_path: str | Path | None = None,
) -> Evaluation | None:
    """Predict every person of a dataset once, and score them.

    Args:
        checkpoint: our model.safetensors, or an official .pth of `config`.
        config: dataset and protocol (`data`, `evaluate`); network and crop are the checkpoint's own.
        shards_root: folder of the shard folders.
        dataset: which one; None: `config.data.val`.
        device: None: the GPU if there is one.
        rank: this worker, from 0.
        world: number of workers; each predicts its share.
        gather: needed with several workers.
        results_path: where to write the COCO result file, if anywhere.

    Returns: the evaluation on rank 0, None elsewhere.

    Raises:
        FileNotFoundError: checkpoint, shards or ground truth are missing.
        ValueError: they do not fit each other, or a person was not predicted exactly once.
    """
    model = load_checkpoint(checkpoint, None if Path(checkpoint).suffix == ".safetensors" else config)
    return evaluate_model(
        model,
        merge_config(model.config, config, where=str(checkpoint)),
        shards_root=shards_root,
        dataset=dataset,
        device=device,
        rank=rank,
        world=world,
        gather=gather,
        results_path=results_path,
    )


def evaluate_model(
    model: nn.Module,
    config: Config,
    *,
    shards_root: Path = Path("data/shards"),
    dataset: str | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    results_path: str | Path | None = None,
) -> Evaluation | None:
    """As `evaluate_checkpoint`, of a model that gives (simcc_x, simcc_y) and its own config, see `merge_config`."""
    if world > 1 and gather is None:
        raise ValueError(f"evaluate_model: {world} workers need a `gather` to bring their shares together.")
    device = choose_device(device)
    dataset = dataset or config.data.val
    shards = open_shards(config, dataset, shards_root)
    start = time.perf_counter()
    shares = [predict_share(model.to(device), config, shards, shards_root, device, rank, world)]
    if gather is not None:
        gathered = gather(shares[0])
        if gathered is None:
            return None
        shares = list(gathered)
    seconds = time.perf_counter() - start
    predictions = Predictions.concatenate(shares)
    refuse_incomplete(predictions, shards, config)
    truth = dataset_truth(shards, config)
    metrics = evaluate_predictions(predictions, truth, config.keypoint_set, config.evaluate, results_path)
    return Evaluation(metrics=metrics, predictions=predictions, truth=truth, config=config, seconds=seconds)


def measure(model: nn.Module, config: Config, *, shards_root: Path = Path("data/shards")) -> dict[str, float]:
    """`<part>/<figure>` -> value of a network, exported ones too, on `config.data.val` by `config.evaluate`.

    Raises:
        FileNotFoundError: shards or ground truth are missing.
        ValueError: they do not fit, or a person was not predicted exactly once.
    """
    evaluation = evaluate_model(model, config, shards_root=shards_root, device="cpu")
    assert evaluation is not None  # one process: this is rank 0
    return evaluation.metrics


def merge_config(model: Config, evaluation: Config, *, where: str) -> Config:
    """The model's configuration with the dataset, the protocol, the robustness and the registry of another.

    Raises:
        ValueError: they mean different keypoints.
    """
    if model.keypoint_set.names != evaluation.keypoint_set.names:
        raise ValueError(
            f"{where}: predicts {len(model.keypoint_set)} keypoints ({model.keypoint_set.name}), but params.yaml asks "
            f"for {len(evaluation.keypoint_set)} ({evaluation.keypoint_set.name}). Train again, or correct `keypoints`."
        )
    return dataclasses.replace(
        model,
        keypoints=evaluation.keypoints,
        data=evaluation.data,
        evaluate=evaluation.evaluate,
        registry=evaluation.registry,
        robustness=evaluation.robustness,
    )


def predict_share(
    model: nn.Module, config: Config, shards: ShardSet, root: Path, device: torch.device, rank: int, world: int
) -> Predictions:
    """What the model says about this worker's share of the dataset."""
    loader = eval_loader(config, shards.dataset, rank=rank, world=world, root=root)
    share = _num_persons(shards, config) // world
    with progress(total=share, desc=f"evaluate {shards.dataset}", unit="person") as bar:
        return predict(
            model,
            loader,
            config.keypoint_set,
            device=device,
            flip_test=config.evaluate.flip_test,
            progress=bar.update,
        )


def refuse_incomplete(predictions: Predictions, shards: ShardSet, config: Config) -> None:
    """See that every person was predicted, and none twice.

    Raises:
        ValueError: persons are missing, or came more than once.
    """
    expected = _num_persons(shards, config)
    rows = np.stack([predictions.image_id, predictions.person_id], axis=1)
    distinct = len(np.unique(rows, axis=0))
    if len(predictions) != expected or distinct != expected:
        raise ValueError(
            f"{shards.address}: {len(predictions)} predictions of {distinct} different persons, the index lists "
            f"{expected}. Run `dvc repro shard`, then evaluate again."
        )


def _num_persons(shards: ShardSet, config: Config) -> int:
    return shards.index.detections if config.evaluate.boxes == "detections" else shards.index.persons


def sample_pictures(shards: ShardSet, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pictures spread evenly over a dataset: (image id, uint8 (H, W, 3) BGR), always the same ones.

    Raises:
        DataError: a shard is not the one the index lists, or a picture cannot be decoded.
    """
    total = shards.index.images
    wanted = set(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int).tolist())
    position = 0
    for number, entry in enumerate(shards.index.shards):
        if not wanted.isdisjoint(range(position, position + entry.images)):
            for place, sample in enumerate(read_shard(shards, number), start=position):
                if place in wanted:
                    yield _picture(sample)
        position += entry.images


def pictures_of(shards: ShardSet, image_ids: Container[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Pictures by their ids, in the order of the shards: (image id, uint8 (H, W, 3) BGR). Unknown ids are passed over.

    Raises:
        DataError: a shard is not the one the index lists, or a picture cannot be decoded.
    """
    for number in range(len(shards.index.shards)):
        for sample in read_shard(shards, number):
            if int(read_record(sample)["image_id"]) in image_ids:
                yield _picture(sample)


def _picture(sample: dict[str, Any]) -> tuple[int, np.ndarray]:
    picture, _ = decode_sample(sample)
    return int(read_record(sample)["image_id"]), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
