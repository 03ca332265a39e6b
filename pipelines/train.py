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

import json
import os
import sys
from pathlib import Path
from typing import Any

from cigpose.config import Config
from cigpose.evaluate.labels import open_shards
from cigpose.files.atomic import claimed
from cigpose.loader.pixels import check_extra
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from pipelines.paths import DATA, RUNS, SHARDS
from pipelines.stage import stage
from pipelines.tracking.courier import tracked
from pipelines.training import driver
from pipelines.training.cluster import TrainingError
from pipelines.training.identity import alone, run_folder, run_params
from pipelines.training.results import OUTPUTS, RESULTS, copy_out, forget, is_finished, seal, write_outputs
from pipelines.training.start import plan_start, report_start
from pipelines.training.watch import Watch


@stage(
    "train",
    flags={"--restart": "forget the run of these params, and train anew"},
    errors=(TrainingError, CheckpointError),
    when_stopped="The same command goes on from the last checkpoint.",
)
def main(config: Config, restart: bool) -> None:
    """Train, or go on, or copy out."""
    check_extra(config)
    params = run_params(config)
    folder = run_folder(config, params)
    restart |= "CIGPOSE_RESTART" in os.environ  # asked by the flow: `dvc repro` hands no arguments on
    with alone(config, folder):
        store = CheckpointStore(config.train.checkpoint.address or folder / "checkpoints")
        if restart:
            forget(folder, store)
        if not is_finished(folder, store):
            train_run(config, params, folder, store)
        with claimed(
            RUNS / "outputs.lock", "the copying of a training's results", wait=True
        ):  # other params: another run
            for name in OUTPUTS:
                copy_out(folder / RESULTS / name, DATA / name)
        metrics = json.loads((folder / RESULTS / "metrics/train.json").read_text(encoding="utf-8"))
    print(f"{config.name}: best epoch {metrics['best_epoch']} of {metrics['epochs']}")


def train_run(config: Config, params: dict[str, Any], folder: Path, store: CheckpointStore) -> None:
    """Train to the end and leave the outputs in `folder`/results."""
    start, transfer = plan_start(config)
    folder.mkdir(parents=True, exist_ok=True)
    with tracked(config, folder) as run:
        for context, datasets in (("training", config.data.train), ("validation", (config.data.val,))):
            run.note_inputs([open_shards(config, name, SHARDS).address for name in datasets], context=context)
        if start is not None and transfer is not None:
            report_start(run, start, transfer)
        watch = Watch(config, run, SHARDS)
        settings = {
            "root": str(Path.cwd()),
            "run_folder": str(folder),
            "checkpoints": store.address,
            "params": params,
            "start": start,
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


if __name__ == "__main__":
    sys.exit(main())
