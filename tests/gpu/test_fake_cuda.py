"""The real training step on fake CUDA tensors: every machine can tell where a GPU's host would wait."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"train__precision": "fp32"},
    "bf16, 8 ranks": {"train__precision": "bf16", "train__sync_batch_norm": True, "world": 8},
    "fp16, 8 ranks, accumulated": {
        "train__precision": "fp16",
        "train__sync_batch_norm": True,
        "train__accumulate_steps": 2,
        "world": 8,
    },
}
DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lets a CPU build of torch compute with fake CUDA tensors."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++): the shim for fake CUDA tensors cannot be made")
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: a shim for builds without would clash with it")
    target = tmp_path_factory.mktemp("shim") / "fake_cuda.so"
    command = fake_cuda.compile_command(compiler, Path(torch.__file__).parent, target)
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    return target


@pytest.fixture(scope="session")
def seen(shim: Path, root: Path) -> dict[str, dict[str, Any]]:
    """What each case did, all in one process: torch is loaded once."""
    support = root / "tests" / "support"
    paths = os.pathsep.join([str(root), str(support), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(support / "fake_training.py"), str(shim), *map(json.dumps, CASES.values())]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert answer.returncode == 0, answer.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, answer.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_gpu_once_and_an_evaluation_and_a_snapshot_never(seen: dict[str, Any], case: str) -> None:
    step, after_resume, evaluation = seen[case]["waits"]
    assert step == ["event"], "of the step before"
    assert len(after_resume) <= 1, after_resume
    assert not evaluation
    assert not seen[case]["snapshot"], "of a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_gpu_and_in_its_dtype(seen: dict[str, Any], case: str) -> None:
    found = seen[case]
    assert not found["mixed"]
    assert found["moments"] == ["cuda"], "of the optimiser, after a checkpoint from the host was loaded"
    assert found["convolutions"] == [DTYPES[CASES[case]["train__precision"]]]
    assert found["log_softmax"] == ["torch.float32"]
    assert found["ema_updates"] == 3
