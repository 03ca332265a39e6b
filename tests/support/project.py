"""A small project of its own for a test: the code of this checkout, a tiny experiment, its own DVC and git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from nested import change

ROOT = Path(__file__).resolve().parents[2]
CODE = ("cigpose", "pipelines", "dvc.yaml", "params.yaml", "pyproject.toml", ".dvc/config", ".dvcignore", ".gitignore")


@dataclass(frozen=True)
class Project:
    """A folder in which `dvc repro` runs."""

    folder: Path

    def run(
        self, *command: str, check: bool = True, timeout_s: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there and give back its whole output; a failure shows it."""
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert result.returncode == 0 or not check, f"{' '.join(command)}\n{result.stdout[-6000:]}"
        return result

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of its commands: this interpreter's tools, nothing of the user's servers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        return {**kept, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(self.folder), **changes}

    def change(self, **changes: object) -> None:
        """Set keys of params.yaml, dots written as double underscores."""
        file = self.folder / "params.yaml"
        values = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(change(values, **changes), sort_keys=False))

    def commit(self, message: str) -> None:
        """Commit what git tracks or may track."""
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", message)


def make_project(folder: Path) -> Project:
    """Copy the code, begin a git and a DVC repository."""
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/.gitignore", folder / "data/.gitignore")
    project = Project(folder)
    project.run("git", "init", "-q")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    return project


TINY = {
    "data__render": {
        "rendered-train": {"seed": 1, "num_images": 24, "image_size": [200, 160], "max_persons": 2},
        "rendered-val": {"seed": 2, "num_images": 8, "image_size": [200, 160], "max_persons": 2},
    },
    "data__sharding__images_per_shard": 8,
    "model__input_size": [64, 96],
    "model__backbone__widen_factor": 0.125,
    "model__head__hidden": 32,
    "model__head__gau_s": 16,
    "train__epochs": 2,
    "train__validate_every_epochs": 1,
    "train__batch_total": 8,
    "train__loss_batch": 8,
    "train__schedule": {"warmup_steps": 2, "cosines": [{"begin_epoch": 0, "end_epoch": 2, "final_factor": 0.1}]},
    "train__cluster__num_workers": 1,
    "registry__pictures": 2,
}
"""Changes that make the quickstart a matter of seconds."""
