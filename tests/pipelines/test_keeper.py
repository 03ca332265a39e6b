"""What a local Ray leaves is gone soon after the training, however that ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.training import keeper

TRAINING = """
import subprocess, sys, time
from pipelines.training import keeper
with keeper.kept() as folder:
    (folder / keeper.RAY).mkdir()
    log = (folder / keeper.RAY / "log").open("w")
    helper = subprocess.Popen(["sleep", "600"], start_new_session=True, env={}, stdout=log)
    print(folder, helper.pid, flush=True)
    if sys.argv[1] == "stays":
        time.sleep(600)
"""


def start(tmp_path: Path, root: Path, end: str) -> tuple[subprocess.Popen[str], Path, psutil.Process]:
    command = [sys.executable, "-c", TRAINING, end]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    folder, helper = process.stdout.readline().split()
    return process, Path(folder), psutil.Process(int(helper))


@pytest.mark.parametrize("end", ["ends", "stays"])
def test_helpers_and_folder_of_a_training_are_gone_soon_after_it(tmp_path: Path, root: Path, end: str) -> None:
    process, folder, helper = start(tmp_path, root, end)
    if end == "stays":
        assert folder.stat().st_mode & 0o077 == 0
        process.kill()
    process.wait(30)
    _, alive = psutil.wait_procs([helper], timeout=10)
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive and not list(tmp_path.iterdir())


def test_the_folder_of_a_training_that_died_with_its_keeper_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    process, living, helper = start(tmp_path, root, "stays")
    dead = tmp_path / f"{keeper.PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    with keeper.kept() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {living.name, folder.name}
    process.kill()
    process.wait()
    psutil.wait_procs([helper], timeout=10)
