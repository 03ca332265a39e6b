"""Virtual environments of their own, for tests that need the package registry and minutes: they are asked for by name.

`CIGPOSE_FRESH_ENVIRONMENTS=1 python -m pytest -m fresh_environment` runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASKED = os.environ.get("CIGPOSE_FRESH_ENVIRONMENTS") == "1"


def needs_registry(test):
    """Mark a test that makes virtual environments."""
    reason = "makes virtual environments from the package registry; CIGPOSE_FRESH_ENVIRONMENTS=1 asks for it"
    return pytest.mark.fresh_environment(pytest.mark.timeout(1800)(pytest.mark.skipif(not ASKED, reason=reason)(test)))


def make_environment(folder: Path, *arguments: str) -> Path:
    """The interpreter of a new environment with these arguments of `pip install` done."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(install, check=True, timeout=1500)
    return python


def run_alone(python: Path, script: str, *arguments: str | Path, folder: Path) -> str:
    """What a script prints in another environment, where nothing of this project can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-c", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
