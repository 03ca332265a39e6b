"""The stage `train` as a command: results, resuming, kills at every level, bad luck in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from project import TINY

from cigpose.config import load_preset
from cigpose.data.rendered import render_dataset
from cigpose.data.shards import write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

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

    def params(self, **changes: object) -> None:
        """Write params.yaml: the tiny quickstart with changes, dots written as double underscores."""
        values = load_preset("quickstart").to_mapping()
        for path, value in {**TINY, "train__log_every_steps": 1, **changes}.items():
            *parents, last = path.split("__")
            section = values
            for key in parents:
                section = section[key]
            section[last] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
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
        """Steps of the records in the newest history.jsonl."""
        histories = sorted(self.folder.glob(".runs/*/history.jsonl"), key=lambda file: file.stat().st_mtime)
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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    stage.params()
    from cigpose.config import load_params

    config = load_params(stage.folder / "params.yaml")
    for name in ("rendered-train", "rendered-val"):
        render_dataset(config.data.render[name], stage.folder / "data/raw" / name)
        write_dataset(config, name, stage.folder / "data/raw", stage.folder / "data/shards")
    return stage


LONG = {"train__epochs": 3, "train__checkpoint": {"every_steps": 2, "every_minutes": None, "keep": 2}}


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The Ray workers that train."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def test_killed_at_every_level_the_weights_equal_those_of_a_run_never_killed(stage: Stage) -> None:
    stage.params(**LONG)
    code, output = stage.run()
    assert code == 0, output[-3000:]
    expected, history = stage.weights(), (stage.folder / "data/plots/loss.csv").read_text()
    shutil.rmtree(stage.folder / ".runs")
    shutil.rmtree(stage.folder / "data/model")

    process = stage.start()
    stage.wait_for_step(process, 3)
    for worker in workers_of(process):  # Ray starts it again
        worker.kill()
    stage.wait_for_step(process, 7)
    os.killpg(process.pid, signal.SIGKILL)  # the driver, and what is in its group
    process.wait()
    time.sleep(1)

    process = stage.start()  # and now politely
    stage.wait_for_step(process, 9)
    started = workers_of(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert "resumed at step" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive

    code, output = stage.run()
    assert code == 0, output[-3000:]
    weights = stage.weights()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert (stage.folder / "data/plots/loss.csv").read_text() == history


def test_a_finished_run_is_copied_out_again_and_other_params_are_another_run(stage: Stage) -> None:
    stage.params(**LONG)
    before = (stage.folder / "data/model/model.safetensors").read_bytes()
    shutil.rmtree(stage.folder / "data/model")
    code, output = stage.run()
    assert code == 0 and "finished before" in output
    assert (stage.folder / "data/model/model.safetensors").read_bytes() == before
    run = json.loads((stage.folder / "data/model/run.json").read_text())
    assert run["epochs"] == 3 and 1 <= run["best_epoch"] <= 3 and run["run_id"]
    stage.params(**LONG, train__optimizer={"learning_rate": 1e30, "learning_rate_batch": 8, "clip_grad_norm": None})
    code, output = stage.run()  # a rate at which nothing can stay a number
    assert code == 1
    assert "train: " in output and ("the optimiser was not moved" in output or "no checkpoint was written" in output)
    assert "rendered-train/" in output or "no checkpoint" in output
    assert len(list((stage.folder / ".runs").iterdir())) == 2


@pytest.mark.parametrize(
    "changes, environment, message",
    [
        ({"train__cluster": {"num_workers": 1, "use_gpu": True}}, {"CUDA_VISIBLE_DEVICES": ""}, "a GPU each"),
        ({"evaluate__metric": "whole/PCK", "train__epochs": 1}, {}, "evaluate.metric: 'whole/PCK' is not among"),
        ({}, {"RAY_ADDRESS": "127.0.0.1:1"}, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"),
    ],
    ids=["no GPU", "no such metric", "no such cluster"],
)
def test_bad_luck_is_one_sentence(stage: Stage, changes: dict, environment: dict, message: str) -> None:
    stage.params(**changes)
    code, output = stage.run(**environment)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_changed_shards_are_named_before_anything_starts(stage: Stage) -> None:
    stage.params()
    tar = sorted((stage.folder / "data/shards/rendered-train").glob("*.tar"))[0]
    content = tar.read_bytes()
    try:
        tar.write_bytes(content + b"0" * 512)
        code, output = stage.run()
    finally:
        tar.write_bytes(content)
    assert code == 1
    assert tar.name in output and "index.json says" in output


def test_checkpoints_of_other_params_at_an_address_are_refused_until_restart(stage: Stage, tmp_path: Path) -> None:
    address = {"every_steps": 2, "every_minutes": None, "keep": 1, "address": str(tmp_path / "kept")}
    short = {"train__epochs": 1, "train__checkpoint": address}
    stage.params(**short)
    assert stage.run()[0] == 0
    stage.params(**short, seed=8)
    code, output = stage.run()
    assert code == 1
    assert "seed: 0 there, 8 now" in output and "--restart" in output
    code, output = stage.run("--restart")
    assert code == 0, output[-2000:]
