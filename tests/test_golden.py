"""The reference numbers of the checkout are those of the large set, and few."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MADE_BY_HAND = {"README.md", "make.py"}


def files_of(folder: Path) -> dict[str, Path]:
    found = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(folder).as_posix(): file for file in found}


def test_the_reference_numbers_are_small(golden: Path) -> None:
    sizes = [file.stat().st_size for file in files_of(golden).values()]
    assert len(sizes) > 50
    assert max(sizes) <= 1 << 20
    assert sum(sizes) <= 3 << 20


@pytest.mark.slow
def test_making_the_reference_numbers_again_gives_the_same_bytes(
    golden: Path, large_golden: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, str(golden / "make.py"), str(large_golden), str(tmp_path)], check=True)
    made, kept = files_of(tmp_path), files_of(golden)
    assert set(made) == set(kept) - MADE_BY_HAND
    assert [name for name, file in made.items() if file.read_bytes() != kept[name].read_bytes()] == []
