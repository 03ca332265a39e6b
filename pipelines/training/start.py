"""What `train.start_from` names: fetched once, kept beside the backbone's first weights, and what is taken of it.

data/raw/pretrained/start_from.safetensors      the network, with its configuration where that is known
data/raw/pretrained/start_from.json             where it comes from (of models:/NAME@ALIAS, which version), its sha256

It stays the one that was fetched until another is named: an alias that moves, perhaps to what this very training gives,
trains nothing anew. `dvc repro --force pretrained` asks again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cigpose.config import Config, load_preset
from cigpose.deploy.models import preset_of
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed, write_bytes, write_json, written_file
from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError
from cigpose.model.estimator import build_model
from cigpose.model.transfer import WeightTransfer, start_from
from cigpose.model.weights import (
    CONFIG_KEY,
    WeightsError,
    read_config,
    read_metadata,
    read_state_dict,
    save_weights,
)
from cigpose.train.optim import refuse_unknown_parts
from cigpose.train.place import StartingModel
from pipelines.paths import DATA, RAW
from pipelines.tracking.run import Run, read_facts

FILE, FACTS = RAW / "pretrained" / "start_from.safetensors", RAW / "pretrained" / "start_from.json"
REPORT = "start_from.json"
"""In the folder of a run: where it started from, and what became of each tensor."""


def keep_start(asked: str, path: Path, origin: str) -> None:
    """Let the folder of first weights hold a model to start from, in place of what it held before.

    Args:
        asked: what `train.start_from` says.
        path: the file that it means.
        origin: where that comes from, as it may be shown.

    Raises:
        ValueError: it is no model, or a user's own file is in its place.
    """
    with _alone(), written_file(FILE) as part:
        try:
            _convert(path, part)
        except WeightsError as err:
            raise WeightsError(str(err).replace(str(path), origin)) from err
        facts = {"asked": without_credentials(asked), "from": origin, "sha256": sha256_of(part)}
        write_json(FACTS, facts)  # before the file, which without it is taken for the user's


def forget_start() -> None:
    """Remove the model to start from, if there is one: there is to be none any more."""
    with _alone():
        for path in (FILE, FACTS):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with claimed(DATA / ".start_from.lock", "keeping what train.start_from names", wait=True):
        if FILE.exists() and not FACTS.exists():
            raise ValueError(f"{FILE}: a file of yours has the name of one of ours. Rename it.")
        yield


def _convert(path: Path, target: Path) -> None:
    """Copy a file of weights as safetensors, in which nothing can run; with its configuration, where that is known."""
    if path.suffix == ".safetensors":
        read_metadata(path)  # or it is none
        shutil.copyfile(path, target)
        return
    tensors = {name: tensor.contiguous() for name, tensor in read_state_dict(path).items()}
    if preset := preset_of(path):
        save_weights(target, tensors, load_preset(preset))
    else:
        write_bytes(target, safetensors.torch.save(tensors))


def read_start(config: Config) -> StartingModel | None:
    """The network to start from, as it was fetched; None where there is to be none.

    Raises:
        FileNotFoundError: another one was fetched, or none.
        DataError: it has changed since.
        WeightsError: its configuration is not readable.
    """
    if config.train.start_from is None:
        return None
    asked, facts = without_credentials(config.train.start_from), read_facts(FACTS)
    if facts.get("asked") != asked or not FILE.is_file():
        there = f"is from {facts['asked']}" if "asked" in facts and FILE.is_file() else "is not there"
        raise FileNotFoundError(f"{FILE}: {there}, but train.start_from is {asked}. `dvc repro pretrained` fetches it.")
    if (found := sha256_of(FILE)) != facts["sha256"]:
        raise DataError(
            f"{FILE}: sha256 is {found[:12]}..., {FACTS.name} says {facts['sha256'][:12]}.... It has changed since it "
            "was fetched; `dvc repro --force pretrained` fetches it anew."
        )
    source = read_config(FILE) if CONFIG_KEY in read_metadata(FILE) else None
    return StartingModel(read=FILE.resolve().read_bytes, config=source, where=facts["from"], sha256=found)


def plan_start(config: Config) -> tuple[StartingModel | None, WeightTransfer | None]:
    """The network to start from, and what is taken of it; before anything is started.

    Raises:
        WeightsError: nothing of it fits.
        ValueError: `train.optimizer.learning_rate_factors` does not fit the network.
    """
    start, factors = read_start(config), config.train.optimizer.learning_rate_factors
    if start is None and not factors:
        return None, None
    with torch.device("meta"):
        model = build_model(config)
    refuse_unknown_parts(model, factors)
    if start is None:
        return None, None
    given = {name: tensor.to("meta") for name, tensor in read_state_dict(FILE).items()}
    return start, start_from(model, given, config, start.config, start.where)


def report_start(run: Run, start: StartingModel, transfer: WeightTransfer) -> None:
    """Tell what is taken: in a few lines, and whole in the run's folder."""
    print("\n  ".join([f"train: starts from {start.where}:", *transfer.lines()]), flush=True)
    facts = {"from": start.where, "sha256": start.sha256, "summary": transfer.summary()}
    write_json(run.folder / REPORT, facts | transfer.to_json())
    run.note_file(run.folder / REPORT)


def start_facts(run: Run) -> dict[str, Any]:
    """What run.json tells of it; empty where a run started from nothing."""
    facts = read_facts(run.folder / REPORT)
    return {"start_from": {name: facts[name] for name in ("from", "sha256", "summary")}} if facts else {}
