"""The cells of the matrix that the ordinary suite tries, and the page about all of them."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cells import CELLS
from faults import Cell, Proof
from lab import ImpossibleError, Lab, try_cell, unsynced
from page import PROMISES, write_page

SAMPLE = [cell for cell in CELLS if cell.sample]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    yield Lab(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: cell.id)
def test_a_cell_of_the_matrix_holds(lab: Lab, cell: Cell) -> None:
    try:
        assert try_cell(lab, cell) >= 1
    except ImpossibleError as err:
        pytest.skip(str(err))


def test_every_promise_has_cells_and_every_test_that_is_named_is_there(root: Path, tmp_path: Path) -> None:
    assert {cell.promise for cell in CELLS} == PROMISES.keys()
    assert len({cell.id for cell in CELLS}) == len(CELLS)
    named = [test for _, tests in PROMISES.values() for test in tests]
    named += [cell.fault.test for cell in CELLS if isinstance(cell.fault, Proof)]
    for test in named:
        file, _, name = test.partition("::")
        assert (root / file).is_file(), test
        assert not name or f"def {name}(" in (root / file).read_text(), test
    for cell in CELLS:
        where = getattr(cell.fault, "kill", getattr(cell.fault, "hold", cell.fault))
        module, _, function = getattr(where, "at", "disk").partition(":")
        if module != "disk":
            code = (root / f"{module.replace('.', '/')}.py").read_text()
            assert re.search(rf"^ *def {function.rpartition('.')[2]}\(", code, re.MULTILINE), cell.id
    write_page(tmp_path / "page.md", CELLS, {CELLS[0].id: {"state": "holds", "passed": 7, "when": "2026-11-24"}})
    page = (tmp_path / "page.md").read_text()
    assert "| 7 of 7 | 2026-11-24 |" in page and f"1 of {len(CELLS)} cells hold (7 tries)" in page


def test_a_name_given_too_early_or_never_synced_is_seen() -> None:
    project, state = Path("/p"), [1, 7, 100]
    synced = {"call": "fsync", "path": "/p/.a.1.part", "state": state}
    renamed = {"call": "rename", "path": "/p/a", "from": "/p/.a.1.part", "states": {".": state}}
    folder = {"call": "fsync", "path": "/p", "state": [1, 2, 3]}
    assert unsynced([synced, renamed, folder], project) == []
    assert unsynced([renamed, synced, folder], project) == ["a has its name before its bytes are on the disk"]
    assert unsynced([synced, {**renamed, "states": {".": [1, 7, 101]}}, folder], project) != []
    assert unsynced([synced, renamed], project) == ["the name of a is never synced"]
    assert unsynced([{**renamed, "path": "/p/.b.2.part"}, {**renamed, "path": "/elsewhere/a"}], project) == []
