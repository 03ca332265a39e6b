"""A training without Ray, as a command: `python loop.py` in a project with shards. What it makes is as the stage's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cigpose.config import load_params
from cigpose.files.atomic import claimed, write_json
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.loop import Place, train
from cigpose.train.state import influential_params
from pipelines.training.results import fetch_weights

MODEL = Path("data/model")


class Quiet:
    """A `Listener` that says where a training begins."""

    def on_start(self, state: Any, total_steps: int) -> None:
        if state.step:
            print(f"resumed at step {state.step} of {total_steps}", flush=True)

    def on_crops(self, *_: Any) -> None: ...

    def on_log(self, *_: Any) -> None: ...

    def on_validation(self, *_: Any) -> None: ...

    def on_checkpoint(self, *_: Any) -> None: ...


def main() -> int:
    torch.set_num_threads(1)
    config, root = load_params(), Path.cwd()
    params = influential_params(config, {}, None)
    try:
        with claimed(root / ".runs/loop.lock", "a training of this run"):
            store = CheckpointStore(root / ".runs/loop/checkpoints", config.train.checkpoint.keep)
            place = Place(
                rank=0,
                world=1,
                device=torch.device("cpu"),
                shards=root / "data/shards",
                root=root,
                store=store,
                params=json.loads(json.dumps(params)),
            )
            result = train(config, place, Quiet())
            fetch_weights(store, result["weights"], MODEL / "model.safetensors")
            history = [
                {name: record[name] for name in ("step", "loss") if name in record} for record in result["history"]
            ]
            write_json(MODEL / "history.json", history)
    except (CheckpointError, ValueError, OSError) as err:
        print(f"loop: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
