"""How much of its precision a model keeps when the picture changes and the person does not.

The same people in the same boxes are predicted from their pictures and from changed ones (`corruptions`). What is kept
is the AP over the changed pictures, mean over corruptions and severities, as a share of that over the unchanged ones;
its interval resamples pictures, and all versions of a picture together.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cigpose.config import Config
from cigpose.config.outcome import CROP_SHIFT
from cigpose.evaluate.coco import run_parts, score_persons
from cigpose.evaluate.corruptions import SHIFT_SHARES, corrupted
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.matches import Matches, resampled_images
from cigpose.evaluate.paired import PairedDifference, compare_paired, paired_table
from cigpose.evaluate.predict import predict
from cigpose.evaluate.predictions import Predictions
from cigpose.files.atomic import written_file
from cigpose.loader.batches import eval_loader
from cigpose.loader.shards import ShardSet
from cigpose.progress import progress

ALL = "all"
"""What stands for the mean over all corruptions."""

Version = tuple[str, int]
"""Corruption and severity; of the unchanged pictures `("", 0)`."""
_CLEAN: Version = ("", 0)


@dataclass(frozen=True, kw_only=True)
class Retained:
    """What is left of the AP of one part under a corruption, mean over its severities."""

    corruption: str
    """Its name, or `ALL`."""
    part: str
    clean: float
    """AP on the unchanged pictures of the same people."""
    ap: float
    share: float
    """`ap` of `clean`."""
    low: float
    """2.5 percent quantile of the share over resampled pictures."""
    high: float
    """97.5 percent quantile."""


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Everything that was measured of one model."""

    people: int
    pictures: int
    severities: tuple[int, ...]
    retained: list[Retained]
    """By part, then by corruption; `ALL` first."""
    by_severity: dict[str, dict[str, list[float]]]
    """Corruption -> part -> AP by severity."""
    reversed_context: list[PairedDifference]
    """Part by part, on the paired data set; empty without one."""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Over all corruptions: `clean` and `AP` by part, and `retained`: part -> share, low, high."""
        rows = {row.part: row for row in self.retained if row.corruption == ALL}
        return {
            "clean": {part: row.clean for part, row in rows.items()},
            "AP": {part: row.ap for part, row in rows.items()},
            "retained": {part: [row.share, row.low, row.high] for part, row in rows.items()},
        }

    def to_mapping(self) -> dict[str, Any]:
        """Plain values; `from_mapping` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> Robustness | None:
        """What `to_mapping` gave; None of an empty mapping, which stands for nothing measured.

        Raises:
            ValueError: it is something else; `where` names it.
        """
        if not values:
            return None
        try:
            return cls(
                people=values["people"],
                pictures=values["pictures"],
                severities=tuple(values["severities"]),
                retained=[Retained(**row) for row in values["retained"]],
                by_severity=values["by_severity"],
                reversed_context=[PairedDifference(**row) for row in values["reversed_context"]],
            )
        except (KeyError, TypeError) as err:
            raise ValueError(f"{where}: not a measured robustness ({err}). `dvc repro robustness` writes it.") from err

    def to_markdown(self) -> str:
        """A row per part: what is retained under every corruption, in percent, and over all with its interval."""
        names = list(dict.fromkeys(row.corruption for row in self.retained))
        parts = list(dict.fromkeys(row.part for row in self.retained))
        share = {(row.part, row.corruption): f"{100 * row.share:.0f}" for row in self.retained}
        share |= {
            (row.part, ALL): f"{100 * row.share:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
            for row in self.retained
            if row.corruption == ALL
        }
        lines = ["| part | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        lines += [f"| {part} | " + " | ".join(share[part, name] for name in names) + " |" for part in parts]
        about = f"Percent of the AP that is retained; {self.people} people in {self.pictures} pictures, 95 % intervals."
        text = "\n".join(lines) + f"\n\n{about}\n"
        if self.reversed_context:
            text += "\n" + paired_table(self.reversed_context, ("as it is", "context reversed"))
        return text


def write_retained_csv(retained: Iterable[Retained], part: str, path: Path) -> Path:
    """`corruption,retained,AP`, a row per corruption of one part and one over all, for `dvc plots`."""
    with written_file(path) as temporary, temporary.open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("corruption", "retained", "AP"))
        writer.writerows((row.corruption, f"{row.share:.6f}", f"{row.ap:.6f}") for row in retained if row.part == part)
    return path


def measure_robustness(
    model: nn.Module, config: Config, *, shards_root: Path = Path("data/shards"), device: torch.device | str
) -> Robustness:
    """Measure a model on the data set `config.data.val` and on changed versions of it, as `config.robustness` says.

    Args:
        model: on `device`; gives (simcc_x, simcc_y).
        config: its own, with the protocol.
        shards_root: folder of the shard folders.
        device: where the model is.

    Raises:
        FileNotFoundError: shards or labels are missing.
        ValueError: nobody is measured, or the data set of reversed context has other pictures.
    """
    options = config.robustness
    shards = open_shards(config, config.data.val, shards_root)
    people, share = _drawn_people(shards, config)
    truth = dataset_truth(shards, config)
    truth = truth.restrict([image_id for image_id in truth.images if _is_drawn(image_id, share)])
    found = _predict_versions(model, config, shards_root, device, share, about=people)
    if not len(found[_CLEAN]):
        raise ValueError(f"{shards.address}: none of its people is drawn. Set a larger robustness.persons.")
    draws = resampled_images(len(truth.images), options.samples)
    table = {version: _part_matches(predictions, truth, config) for version, predictions in found.items()}
    return Robustness(
        people=len(found[_CLEAN]),
        pictures=len(truth.images),
        severities=options.severities,
        retained=_retained(table, draws),
        by_severity={
            name: {
                part: [table[name, severity][part].average_precision() for severity in options.severities]
                for part in table[_CLEAN]
            }
            for name in options.corruptions
        },
        reversed_context=_reversed_context(model, config, shards_root, device, found[_CLEAN], truth, share),
    )


def _drawn_people(shards: ShardSet, config: Config) -> tuple[int, float]:
    """About how many people are looked at, and the share of the pictures that are."""
    is_detected = config.evaluate.boxes == "detections"
    people = shards.index.detections if is_detected else shards.index.persons
    wanted = people if config.robustness.persons is None else min(config.robustness.persons, people)
    return wanted, wanted / max(people, 1)


def _is_drawn(image_id: int, share: float) -> bool:
    """Whether a picture is looked at: the same ones for every model."""
    return zlib.crc32(f"robustness/{image_id}".encode()) < share * 2**32


def _predict_versions(
    model: nn.Module, config: Config, root: Path, device: torch.device | str, share: float, about: int
) -> dict[Version, Predictions]:
    """Predictions of every version; pictures are decoded once for all corruptions of crops, and once per shift."""
    options, keypoints = config.robustness, config.keypoint_set
    of_crops = [name for name in options.corruptions if name != CROP_SHIFT]
    rows: dict[Version, list[Predictions]] = {
        version: [] for version in [_CLEAN, *itertools.product(options.corruptions, options.severities)]
    }

    def add(version: Version, batch: Mapping[str, Any]) -> None:
        flip_test = config.evaluate.flip_test
        rows[version].append(predict(model, [batch], keypoints, device=device, flip_test=flip_test))
        bar.update(len(batch["keys"]))

    with progress(total=about * len(rows), desc="robustness", unit="prediction") as bar:
        for batch in _drawn(eval_loader(config, config.data.val, rank=0, world=1, root=root), share):
            add(_CLEAN, batch)
            for version in itertools.product(of_crops, options.severities):
                add(version, corrupted(batch, *version))
        for severity in options.severities if CROP_SHIFT in options.corruptions else ():
            shift = SHIFT_SHARES[severity - 1]
            loader = eval_loader(config, config.data.val, rank=0, world=1, root=root, shift=shift)
            for batch in _drawn(loader, share):
                add((CROP_SHIFT, severity), batch)
    empty = Predictions.empty(len(keypoints))
    return {version: Predictions.concatenate([empty, *parts]) for version, parts in rows.items()}


def _drawn(batches: Any, share: float) -> Iterator[dict[str, Any]]:
    """The batches without the people who are not drawn."""
    for batch in batches:
        rows = [i for i, image_id in enumerate(batch["image_id"].tolist()) if _is_drawn(image_id, share)]
        if len(rows) == len(batch["keys"]):
            yield batch
        elif rows:
            some = {name: value[rows] for name, value in batch.items() if name != "keys"}
            yield {**some, "keys": [batch["keys"][i] for i in rows]}


def _part_matches(predictions: Predictions, truth: GroundTruth, config: Config) -> dict[str, Matches]:
    scored = score_persons(predictions, truth, config.keypoint_set, config.evaluate)
    runs = run_parts(scored, truth, config.keypoint_set)
    return {part: run.matches for part, run in runs.items() if run.matches.num_truths.any()}


def _retained(table: Mapping[Version, Mapping[str, Matches]], draws: np.ndarray) -> list[Retained]:
    """Every part under every corruption; the same draws for all versions."""
    found = []
    for part in table[_CLEAN]:
        once = {version: parts[part].average_precision() for version, parts in table.items()}
        drawn = {
            version: np.array([parts[part].average_precision(times) for times in draws])
            for version, parts in table.items()
        }
        names = list(dict.fromkeys(name for name, _ in table if name))
        for name in (ALL, *names):
            versions = [version for version in table if version != _CLEAN and name in (ALL, version[0])]
            ap = float(np.mean([once[version] for version in versions]))
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = np.mean([drawn[version] for version in versions], axis=0) / drawn[_CLEAN]
            shares = shares[np.isfinite(shares)]
            low, high = np.quantile(shares, [0.025, 0.975]) if len(shares) else (0.0, 0.0)
            found.append(
                Retained(
                    corruption=name,
                    part=part,
                    clean=once[_CLEAN],
                    ap=ap,
                    share=ap / once[_CLEAN] if once[_CLEAN] else 0.0,
                    low=float(low),
                    high=float(high),
                )
            )
    return found


def _reversed_context(
    model: nn.Module,
    config: Config,
    root: Path,
    device: torch.device | str,
    clean: Predictions,
    truth: GroundTruth,
    share: float,
) -> list[PairedDifference]:
    """The same scenes with the spurious context reversed, where there is a data set of them."""
    name = config.robustness.reversed_context
    if name is None:
        return []
    shards = open_shards(config, name, root)
    loader = list(_drawn(eval_loader(config, name, rank=0, world=1, root=root), share))
    flip_test = config.evaluate.flip_test
    predictions = predict(model, loader, config.keypoint_set, device=device, flip_test=flip_test)
    other = dataset_truth(shards, config)
    other = other.restrict([image_id for image_id in other.images if _is_drawn(image_id, share)])
    return compare_paired(
        (clean, truth),
        (predictions, other),
        config.keypoint_set,
        config.evaluate,
        samples=config.robustness.samples,
    )
