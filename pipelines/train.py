"""Stage `train`: `python -m pipelines.train [--restart]` trains what params.yaml describes.

data/model/                 model.safetensors (best epoch, averaged weights), params.yaml, run.json
data/metrics/train.json     where it ended, figures of the best epoch
data/plots/                 loss.csv, validation.csv, curves.svg

A run works in .runs/<name>-<hash of what its result depends on>/, which DVC does not touch: the same params go on from
the last checkpoint, a finished run is only copied out again, other params are another run. `--restart` begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config, load_params
from cigpose.evaluate.checkpoint import open_shards
from cigpose.files.addresses import without_credentials
from cigpose.train.build import pretrained_path
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.state import influential_params
from pipelines import cluster, curves, tracking
from pipelines.lineage import project_root, shards_digest
from pipelines.watch import Watch

DATA = Path("data")
SHARDS = DATA / "shards"
OUTPUTS = ("model", "metrics/train.json", "plots/loss.csv", "plots/validation.csv", "plots/curves.svg")


def main() -> None:
    """Train, or go on, or copy out; errors are one sentence and exit code 1."""
    try:
        config = load_params()
        params = influential_params(config, digests(config))
        folder = run_folder(config, params)
        store = CheckpointStore(config.train.checkpoint.address or folder / "checkpoints")
        if "--restart" in sys.argv[1:]:
            shutil.rmtree(folder, ignore_errors=True)
            store.clear()
        if (folder / "DONE").is_file():
            print(f"{folder}: finished before with these params; its results are taken. --restart trains anew.")
        else:
            train(config, params, folder, store)
        for name in OUTPUTS:
            put(folder / "results" / name, DATA / name)
    except (cluster.TrainingError, CheckpointError, ValueError, OSError) as err:
        sys.exit(without_credentials(f"train: {err}"))
    except KeyboardInterrupt:
        print("train: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    metrics = json.loads((DATA / "metrics/train.json").read_text())
    print(f"{config.name}: best epoch {metrics['best_epoch']} of {metrics['epochs']}")


def train(config: Config, params: dict[str, Any], folder: Path, store: CheckpointStore) -> None:
    """Train to the end and leave the outputs in `folder`/results."""
    if config.model.backbone.pretrained and not (path := pretrained_path(config, Path.cwd())).is_file():
        raise FileNotFoundError(f"{path}: not found. `dvc repro download` fetches the backbone's first weights.")
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
            result = cluster.train(config, settings, watch.on_event)
        finally:
            watch.close()
        write_results(config, result, store, folder / "results", run)
    (folder / "DONE").write_text(run.run_id + "\n")
    if config.train.checkpoint.address is None:
        store.clear()  # nothing will go on from them


def write_results(config: Config, result: dict[str, Any], store: CheckpointStore, folder: Path, run: Any) -> None:
    """The stage's outputs, laid out in `folder` as below data/."""
    best, history = result["best"], result["history"]
    store.fetch(result["weights"], folder / "model" / "model.safetensors")
    (folder / "model" / "params.yaml").write_text(yaml.safe_dump(config.to_public_mapping(), sort_keys=False))
    facts = {
        "run_id": run.run_id,
        "name": config.name,
        "epochs": config.train.epochs,
        "steps": result["step"],
        "best_epoch": best["epoch"],
        "metric": best["metric"],
        "best_metric": best["value"],
        "learning_rate": config.train.resolved_learning_rate,
    }
    (folder / "model" / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    curves.write_metrics(config, result, folder / "metrics" / "train.json")
    curves.write_loss(history, folder / "plots" / "loss.csv")
    curves.write_validation(history, best["metric"], folder / "plots" / "validation.csv")
    curves.write_curves(config, history, folder / "plots" / "curves.svg")
    run.log_metrics({"best/epoch": best["epoch"], f"best/{best['metric']}": best["value"]}, step=result["step"])
    run.log_artifact(folder / "plots" / "curves.svg")


def run_folder(config: Config, params: dict[str, Any]) -> Path:
    """Where the run of these params works."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return project_root() / ".runs" / f"{config.name}-{digest[:8]}"


def opened(config: Config, datasets: tuple[str, ...]) -> list[Any]:
    """The shards of some datasets."""
    return [open_shards(config, dataset, SHARDS) for dataset in datasets]


def digests(config: Config) -> dict[str, str]:
    """Dataset -> digest of its shards, for training and validation."""
    names = dict.fromkeys((*config.data.train, config.data.val))
    return {
        shards.dataset: shards_digest({"shards": [{"sha256": entry.sha256} for entry in shards.index.shards]})
        for shards in opened(config, tuple(names))
    }


def put(source: Path, target: Path) -> None:
    """Copy a file or folder to `target`, whole or not at all; what is there may be a link into DVC's cache."""
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
    else:
        shutil.copyfile(source, partial)
    os.replace(partial, target)


if __name__ == "__main__":
    main()
