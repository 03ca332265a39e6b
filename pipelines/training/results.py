"""What a finished run keeps: results/, laid out as below data/, and DONE, which vouches for every file of it.

results/model/record/ is the run as MLflow is to know it, so that it can be told where its folder is not
(`pipelines.tracking.run.Run.copy`).

DONE is written last, with the size and sha256 of each file. Results that differ from it are not taken.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config
from cigpose.files.atomic import clear_leftovers, write_json, write_text, written_file, written_folder
from cigpose.files.digest import sha256_of
from cigpose.model.weights import load_checkpoint
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from pipelines.lineage import dataset_facts, git_revision
from pipelines.paths import SHARDS
from pipelines.tracking.run import RECORD, Run
from pipelines.training import curves
from pipelines.training.start import start_facts

OUTPUTS = ("model", "metrics/train.json", "plots/loss.csv", "plots/validation.csv", "plots/curves.svg")
RESULTS, DONE, CURVES = "results", "DONE", "curves.svg"


def write_outputs(config: Config, result: dict[str, Any], store: CheckpointStore, folder: Path, run: Run) -> None:
    """The stage's outputs, laid out in `folder` as below data/; an earlier `folder` is replaced when they are whole."""
    best, history = result["best"], result["history"]
    facts = {
        "run_id": run.run_id,
        "name": config.name,
        "epochs": config.train.epochs,
        "steps": result["step"],
        "best_epoch": best["epoch"],
        "metric": best["metric"],
        "best_metric": best["value"],
        "learning_rate": config.train.resolved_learning_rate,
        "git_revision": git_revision(),
        "datasets": {name: dataset_facts(config, name, SHARDS) for name in (*config.data.train, config.data.val)},
        **start_facts(run),
    }
    for target in (folder, run.folder / CURVES):
        clear_leftovers(target)
    with written_folder(folder) as made:
        fetch_weights(store, result["weights"], made / "model" / "model.safetensors")
        write_text(made / "model" / "params.yaml", yaml.safe_dump(config.to_public_mapping(), sort_keys=False))
        write_json(made / "model" / "run.json", facts)
        curves.write_metrics(config, result, made / "metrics" / "train.json")
        curves.write_loss(history, made / "plots" / "loss.csv")
        curves.write_validation(history, best["metric"], made / "plots" / "validation.csv")
        curves.write_curves(config, history, made / "plots" / "curves.svg")
        write_text(run.folder / CURVES, (made / "plots" / "curves.svg").read_text(encoding="utf-8"))
        run.note_file(run.folder / CURVES)
        run.log_record({"kind": "best", "step": result["step"], "epoch": best["epoch"], best["metric"]: best["value"]})
        run.copy(made / "model" / RECORD)


def fetch_weights(store: CheckpointStore, name: str, target: Path) -> None:
    """Copy the run's best weights to `target`, and see that they are a model.

    Raises:
        CheckpointError: they are not there, or not whole, or not finite.
    """
    try:
        store.fetch(name, target)
        load_checkpoint(target)
    except (FileNotFoundError, ValueError) as err:
        raise CheckpointError(
            f"{store.address}/{name}: the best weights cannot be used ({err}). Copy them back; --restart begins anew."
        ) from err


def seal(folder: Path, run_id: str) -> None:
    """Write DONE beside the results of the run in `folder`, which are whole and on the disk."""
    clear_leftovers(folder / DONE)
    results = folder / RESULTS
    files = {str(path.relative_to(results)): _facts(path) for path in sorted(results.rglob("*")) if path.is_file()}
    write_json(folder / DONE, {"run_id": run_id, "files": files})


def is_finished(folder: Path, store: CheckpointStore) -> bool:
    """Whether the run's results can be taken as they are; of damaged ones DONE is removed."""
    if not (folder / DONE).is_file():
        return False
    if fault := damage(folder):
        what = "the results are made again from the last checkpoint" if store.names() else "the run is trained again"
        print(f"train: {fault} Therefore {what}.", file=sys.stderr)
        (folder / DONE).unlink()
        return False
    print(f"{folder}: finished before with these params; its results are taken. --restart trains anew.")
    return True


def forget(folder: Path, store: CheckpointStore) -> None:
    """Remove what a run has left, so that it begins anew."""
    (folder / DONE).unlink(missing_ok=True)
    store.clear()
    shutil.rmtree(folder, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What of the results is not as DONE says, for the user; None if all is."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / DONE).read_text(encoding="utf-8"))["files"]
        expected = {folder / RESULTS / name: facts for name, facts in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / DONE} names no digests of the results."
    for path, facts in expected.items():
        if not path.is_file():
            return f"{path} is missing."
        if (found := _facts(path)) != facts:
            return f"{path} is damaged: it is {found}, {DONE} says {facts}."
    return None if expected else f"{folder / DONE} names no results."


def copy_out(source: Path, target: Path) -> None:
    """Copy a file or folder to `target`, whole or not at all; what is there may be a link into DVC's cache.

    Only for the one who may write there now: halves of killed ones go.
    """
    clear_leftovers(target)
    if source.is_dir():
        with written_folder(target) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    else:
        with written_file(target) as part:
            shutil.copyfile(source, part)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
