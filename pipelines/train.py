"""Stage `train`: `python -m pipelines.train [--restart]` trains what params.yaml describes.

data/model/                 model.safetensors (best epoch, averaged weights), params.yaml, run.json
data/metrics/train.json     where it ended, figures of the best epoch
data/plots/                 loss.csv, validation.csv, curves.svg

A run works in .runs/<name>-<hash of what its result depends on>/, which DVC does not touch: the same params go on from
the last checkpoint, a finished run is only copied out again, other params are another run. `--restart` begins anew.

One process at a time trains a run, or writes to a checkpoint address: the locks lie beside the run's folder. They are
this project's own: two projects that share an address on S3 do not see one another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cigpose.config import Config, load_params
from cigpose.evaluate.checkpoint import open_shards
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed
from cigpose.loader.pixels import check_extra
from cigpose.train.build import pretrained_path
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.state import influential_params
from pipelines.lineage import digest_of, file_sha256, project_root, shards_digest
from pipelines.paths import DATA, RUNS, SHARDS
from pipelines.tracking import run as tracking
from pipelines.training import driver
from pipelines.training.results import OUTPUTS, RESULTS, copy_out, forget, is_finished, seal, write_outputs
from pipelines.training.watch import Watch


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on, or copy out; errors are one sentence and exit code 1."""
    restart = _parse(arguments).restart
    try:
        config = load_params()
        check_extra(config)
        params = influential_params(config, digests(config), pretrained_digest(config))
        folder = run_folder(config, params)
        with alone(config, folder):
            store = CheckpointStore(config.train.checkpoint.address or folder / "checkpoints")
            if restart:
                forget(folder, store)
            if not is_finished(folder, store):
                train_run(config, params, folder, store)
            for name in OUTPUTS:
                copy_out(folder / RESULTS / name, DATA / name)
            metrics = json.loads((folder / RESULTS / "metrics/train.json").read_text(encoding="utf-8"))
    except (driver.TrainingError, CheckpointError, ValueError, OSError) as err:
        sys.exit(without_credentials(f"train: {err}"))
    except KeyboardInterrupt:
        print("train: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    print(f"{config.name}: best epoch {metrics['best_epoch']} of {metrics['epochs']}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--restart", action="store_true", help="forget the run of these params, and train anew")
    return parser.parse_args(arguments)


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


def train_run(config: Config, params: dict[str, Any], folder: Path, store: CheckpointStore) -> None:
    """Train to the end and leave the outputs in `folder`/results."""
    folder.mkdir(parents=True, exist_ok=True)
    with tracking.start_run(config, kind="train", run_folder=folder) as run:
        run.log_inputs([shards.address for shards in opened(config, config.data.train)], context="training")
        run.log_inputs([shards.address for shards in opened(config, (config.data.val,))], context="validation")
        watch = Watch(config, folder, run, SHARDS)
        settings = {
            "root": str(Path.cwd()),
            "run_folder": str(folder),
            "checkpoints": store.address,
            "params": params,
            "shown_images": watch.shown_images,
        }
        try:
            result = driver.train_on_ray(config, settings, watch.on_event)
        finally:
            watch.close()
        write_outputs(config, result, store, folder / RESULTS, run)
    seal(folder, run.run_id)
    if config.train.checkpoint.address is None:
        store.clear()  # nothing will go on from them


def run_folder(config: Config, params: dict[str, Any]) -> Path:
    """Where the run of these params works."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return project_root() / RUNS / f"{config.name}-{digest[:8]}"


def opened(config: Config, datasets: tuple[str, ...]) -> list[Any]:
    """The shards of some datasets."""
    return [open_shards(config, dataset, SHARDS) for dataset in datasets]


def digests(config: Config) -> dict[str, str]:
    """Dataset -> digest of its shards, for training and validation."""
    return {
        shards.dataset: shards_digest({"shards": [{"sha256": entry.sha256} for entry in shards.index.shards]})
        for shards in opened(config, tuple(dict.fromkeys((*config.data.train, config.data.val))))
    }


def pretrained_digest(config: Config) -> str | None:
    """Sha256 of the backbone's first weights; None where it starts from random ones.

    Raises:
        FileNotFoundError: the file is not there.
    """
    if config.model.backbone.pretrained is None:
        return None
    path = pretrained_path(config, Path.cwd())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found. `dvc repro pretrained` fetches the backbone's first weights.")
    return file_sha256(path)


if __name__ == "__main__":
    main()
