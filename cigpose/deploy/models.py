"""Where a model is: a file, a folder with one, or a version in a registry; and what lies beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cigpose.config import presets
from cigpose.evaluate.calibration import FILE, Calibration
from cigpose.files.digest import sha256_of

REGISTERED = "models:/"
_PLACES = ("model.safetensors", "artifacts/model.safetensors", "data/model/model.safetensors")
_FETCHER = "pipelines.registry.fetch"  # a process of its own: the library knows no registry, and MLflow is heavy


def find_model(model: str | Path) -> Path:
    """The file that a user means.

    Args:
        model: a file; a folder that holds model.safetensors (`data/model`, a registered model's, a project's); or
            `models:/NAME@ALIAS`, `models:/NAME/VERSION` of the registry that MLFLOW_TRACKING_URI names, else of the
            project in the working directory.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: the registry cannot be asked, or does not have it.
    """
    text = str(model)
    if text.startswith("models:"):
        return _fetched(text if text.startswith(REGISTERED) else text.replace("models:", REGISTERED, 1))
    path = Path(model)
    if path.is_dir():
        found = next((path / place for place in _PLACES if (path / place).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no model in this folder; looked for {', '.join(_PLACES)}.")
        return found
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such model. Give a file, a folder with model.safetensors, or models:/NAME."
        )
    return path


def preset_of(path: Path) -> str | None:
    """The preset that an official `.pth` is named by, as `cigpose`'s download names it; None for other files."""
    return path.stem if path.suffix == ".pth" and path.stem in presets() else None


def calibration_beside(path: Path) -> Calibration | None:
    """The calibration that was measured with a model file, from its own folder or the report of its project."""
    folder = path.absolute().parent
    for place in (folder / FILE, folder.parent / "report" / FILE):
        if place.is_file():
            found = Calibration.read(place)
            if sha256_of(path) in found.models:
                return found
    return None


def _fetched(address: str) -> Path:
    """The weights of a registered version, in the user's cache."""
    command = [sys.executable, "-P", "-m", _FETCHER, address]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    if done.returncode == 0:
        return Path(done.stdout.strip().splitlines()[-1])
    said = done.stderr.strip().splitlines()
    if any("No module named" in line for line in said[-1:]):
        raise ValueError(
            f"{address}: the registry needs the pipeline's packages. Run `pip install 'cigpose-pipelines[pipelines]'`, "
            "or give a file."
        )
    raise ValueError(said[-1] if said else f"{address}: the registry gave no answer.")
