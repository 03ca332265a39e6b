from __future__ import annotations

import os
from pathlib import Path

import pytest

import pipelines  # noqa: F401  (quiets every tool before it is imported)

os.environ.setdefault("CIGPOSE_NO_PROGRESS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference material that lies beside the checkout; tests that need it are skipped without."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("../shared is not there: reference numbers and the mirror of the download hosts live in it")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Reference numbers of the original code."""
    return shared / "golden"
