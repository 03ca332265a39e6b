"""Which run params.yaml and the data describe: what its result depends on, its folder, and who may work there."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cigpose.config import Config
from cigpose.evaluate.labels import open_shards
from cigpose.files.atomic import claimed
from cigpose.files.digest import sha256_of
from cigpose.train.build import pretrained_path
from cigpose.train.state import influential_params
from pipelines.lineage import digest_of, project_root, shards_digest
from pipelines.paths import RUNS, SHARDS
from pipelines.training.start import read_start


def run_params(config: Config) -> dict[str, Any]:
    """All that the result of the run depends on (`influential_params`), with the digests of what lies on the disk.

    Raises:
        FileNotFoundError: shards, or first weights, are not there.
        DataError: the network to start from is not the one that was fetched.
    """
    start = read_start(config)
    return influential_params(config, _digests(config), _pretrained_digest(config), start.sha256 if start else None)


def run_folder(config: Config, params: dict[str, Any]) -> Path:
    """Where the run of these params works."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return project_root() / RUNS / f"{config.name}-{digest[:8]}"


@contextlib.contextmanager
def alone(config: Config, folder: Path) -> Iterator[None]:
    """Hold the run, and its checkpoint address if it has one, for this process.

    Raises:
        ClaimedError: another process trains it, or keeps its checkpoints there.
    """
    with contextlib.ExitStack() as claims:
        claims.enter_context(claimed(folder.with_name(f"{folder.name}.lock"), "a training of this run"))
        if address := config.train.checkpoint.address:
            lock = folder.with_name(f"checkpoints-{digest_of(address.rstrip('/'))}.lock")
            claims.enter_context(claimed(lock, f"a training with its checkpoints at {address}"))
        yield


def _digests(config: Config) -> dict[str, str]:
    """Dataset -> digest of its shards, for training and validation."""
    names = dict.fromkeys((*config.data.train, config.data.val))
    opened = [open_shards(config, dataset, SHARDS) for dataset in names]
    return {shards.dataset: shards_digest(shards.index) for shards in opened}


def _pretrained_digest(config: Config) -> str | None:
    """Sha256 of the backbone's first weights; None where it starts from random ones."""
    if config.model.backbone.pretrained is None:
        return None
    path = pretrained_path(config, Path.cwd())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found. `dvc repro pretrained` fetches the backbone's first weights.")
    return sha256_of(path)
