"""The stage `train` as a command, in a folder with a tiny dataset of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import yaml
from nested import change
from project import TINY

from cigpose.config import load_params, load_preset
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))},
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
}


def _is_whole(line: str) -> bool:
    return line.endswith("}")


class Stage:
    """A project folder with shards, in which the stage runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started_ns = 0

    def params(self, **changes: object) -> None:
        """Write params.yaml: the tiny quickstart with changes, dots written as double underscores."""
        values = load_preset("quickstart").to_mapping()
        change(values, **{**TINY, "train__log_every_steps": 1, **changes})
        (self.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        self.started_ns = time.time_ns()
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.train", *arguments],
            cwd=self.folder,
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        try:
            output, _ = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def steps(self) -> list[int]:
        """Steps of the records in the newest history.jsonl that the last start has written to."""
        histories = sorted(self.folder.glob(".runs/*/history.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        histories = [file for file in histories if file.stat().st_mtime_ns > self.started_ns]
        lines = histories[-1].read_text().splitlines() if histories else []
        # the last line may be half written
        return [record["step"] for record in map(json.loads, filter(_is_whole, lines)) if record["kind"] == "log"]

    def wait_for_step(self, process: subprocess.Popen[str], step: int, timeout_s: float = 400) -> None:
        """Wait until a training has recorded a step; fails when the training has ended instead."""
        deadline = time.monotonic() + timeout_s
        while not any(done >= step for done in self.steps()):
            if process.poll() is not None:
                raise AssertionError(f"the training ended before step {step}: {process.communicate()[0][-3000:]}")
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.05)

    def weights(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.folder / "data/model/model.safetensors")


def make_stage(folder: Path) -> Stage:
    """Render the tiny quickstart's people and write their shards."""
    stage = Stage(folder)
    stage.params()
    config = load_params(folder / "params.yaml")
    for name in ("rendered-train", "rendered-val"):
        render_dataset(config.data.render[name], folder / "data/raw" / name)
        write_dataset(config, name, folder / "data/raw", folder / "data/shards")
    return stage
