"""A real git and DVC project whose stages do next to nothing, and can be told to fail or to wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config
from cigpose.config.params_file import write_params
from pipelines import processes

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "docs/predictions.jpg")
STAGE = """
import atexit, json, os, pathlib, subprocess, sys, time
name, out, control = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(CONTROL)
if name in (control / "fail").read_text().split():
    print("WARNING: some advice", flush=True)
    atexit.register(print, "UserWarning: 1 leaked semaphore", flush=True)
    sys.exit(f"{name}: annotation 7: foot_kpts has 15 numbers, expected 18." + 60 * " Look at the file.")
def is_slow():
    here = f"{name}:here" if pathlib.Path.cwd() == control.parent else name
    return {name, here} & set((control / "slow").read_text().split())
print(f"{name} at work" + " anew" * ("CIGPOSE_RESTART" in os.environ), flush=True)
if is_slow():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (control / "pids").write_text(f"{child.pid}")
    print("waiting", flush=True)
    while is_slow():
        time.sleep(0.1)
    child.kill()
    child.wait()
out.parent.mkdir(parents=True, exist_ok=True)
if name == "download":
    out.mkdir(exist_ok=True)
    (out / "archive.zip.new").write_text("as published")
    (out / "archive.zip.new").replace(out / "archive.zip")
    sys.exit()
if name == "evaluate":
    pictures = pathlib.Path("data/report/pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    (pictures / "page-00.jpg").write_bytes(pathlib.Path(PICTURE).read_bytes())
answers = {"evaluate": {"whole": {"AP": 0.61, "AR": 0.7}, "body": {"AP": 0.8, "AR": 0.9}},
           "register": {"model": "toy", "version": 3, "decision": "first",
                        "decision_text": "toy: version 3 is the new champion.",
                        "url": "http://127.0.0.1:5000/#/runs/1", "experiment": os.environ.get("DVC_EXP_NAME")}}
out.write_text(json.dumps(answers.get(name, f"{name} of {time.time_ns()}")))
"""
# Not in the order of work, as nothing asks dvc.yaml to be.
DVC = {
    "register": {"cmd": "python stage.py register data/registered.json", "deps": ["data/metrics/evaluate.json"],
                 "outs": ["data/registered.json"]},
    "render": {"foreach": "${data.render}",
               "do": {"cmd": "python stage.py render data/raw/${key}",
                      "outs": [{"data/raw/${key}": {"persist": True}}]}},
    "download": {"cmd": "python stage.py download data/raw/coco", "params": ["data.download.sources"],
                 "outs": [{"data/raw/coco": {"persist": True, "cache": False}}]},
    "train": {"cmd": "python stage.py train data/model", "deps": ["data/raw"], "params": ["train.epochs"],
              "outs": ["data/model"]},
    "evaluate": {"cmd": "python stage.py evaluate data/metrics/evaluate.json", "deps": ["data/model"],
                 "metrics": [{"data/metrics/evaluate.json": {"cache": False}}]},
}  # fmt: skip
ORDER = ["render", "download", "train", "evaluate", "register"]
IGNORED = (".runs/", ".prefect/", "mlflow.db*", "pipelines", "/control/", "/*.log")


def make_toy(folder: Path, config: Config) -> Path:
    """The project, with the deployments of this checkout; its stages look into `control/`.

    `control/fail` and `control/slow` name stages; `train:here` waits only in the project itself, not in a copy of it.
    """
    for name in ("fail", "slow"):
        (folder / "control").mkdir(exist_ok=True)
        (folder / "control" / name).write_text("")
    (folder / "stage.py").write_text(
        STAGE.replace("CONTROL", repr(str(folder / "control"))).replace("PICTURE", repr(PICTURE))
    )
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": DVC}, sort_keys=False))
    (folder / ".gitignore").write_text("\n".join(IGNORED) + "\n")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/.gitignore", folder / "data")
    write_params(config, folder / "params.yaml")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    deployments = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    (folder / "prefect.yaml").write_text(deployments.replace("*/15 * * * *", "0 0 29 2 *"))  # not while a test looks
    git(folder, "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "toy")
    return folder


def git(folder: Path, *command: str) -> str:
    """Output of a git command that must succeed."""
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m command` to its end."""
    full = [sys.executable, "-m", *command]
    env = processes.environment(env)
    return subprocess.run(full, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def dvc(folder: Path, *command: str) -> str:
    """Output of a DVC command that must succeed."""
    done = run(folder, "dvc", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of what a user has in a project, data as well; not what tools keep for themselves."""
    own = (".git/", ".dvc/tmp", ".dvc/cache", ".prefect", ".runs", "control", "pipelines", "mlflow.db")
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(own)}


def stage_group(toy: Path) -> int:
    """Process group of the stage that has begun to wait (`control/slow`)."""
    pids = toy / "control/pids"
    wait_for(lambda: pids.exists() and pids.read_text())
    group = os.getpgid(int(pids.read_text()))
    assert len(processes.group_members(group)) >= 3
    pids.unlink()
    return group


def wait_for(what: Callable[[], Any], timeout_s: float = 240.0) -> Any:
    """What `what` gives, once it is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found
