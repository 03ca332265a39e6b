"""`make faults`: every cell of the matrix, a table, and docs/reliability.md. What held is kept in .faults/results.json.

python tests/faults/run.py [WORD ...]        cells whose group, job or words have one of these; all without any
python tests/faults/run.py --again [WORD ...]   those that were tried before too
python tests/faults/run.py --page            the page from what is kept, nothing is tried
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

from cells import CELLS
from faults import Cell
from lab import CellError, ImpossibleError, make_lab, try_cell
from page import write_page

from cigpose.files.atomic import claimed, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".faults/results.json"


def read_results() -> dict[str, Any]:
    """Cell -> how it went when it was tried last."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def is_asked(cell: Cell, words: list[str]) -> bool:
    """Whether one of the words is in the cell's own."""
    return not words or any(word in f"{cell.group}: {cell.id}" for word in words)


def try_and_note(lab: Any, cell: Cell, commit: str) -> dict[str, Any]:
    """Try a cell: how it went, for the results."""
    began = time.monotonic()
    facts: dict[str, Any] = {"definition": repr(cell), "when": date.today().isoformat(), "commit": commit}
    try:
        facts |= {"state": "holds", "passed": try_cell(lab, cell)}
    except ImpossibleError as err:
        facts |= {"state": "not tried", "why": str(err)}
    except (CellError, subprocess.SubprocessError, OSError) as err:
        facts |= {"state": "FAILS", "why": f"{type(err).__name__}: {err}"}
    return facts | {"seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Try what was not tried, or did not hold; 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--again", action="store_true", help="what held before too")
    parser.add_argument("--lab", default="lab", help="another place, so that two can be at work (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page, try nothing")
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    asked = [] if given.page else [cell for cell in CELLS if is_asked(cell, given.words)]
    with claimed(ROOT / f".faults/{given.lab}.lock", "`make faults`"):
        lab = make_lab(given.lab)
        for number, cell in enumerate(asked, 1):
            known = read_results().get(cell.id, {})
            if known.get("state") == "holds" and known["definition"] == repr(cell) and not given.again:
                continue
            facts = try_and_note(lab, cell, commit)
            with claimed(RESULTS.with_suffix(".lock"), "a note of a result", wait=True):
                write_json(RESULTS, read_results() | {cell.id: facts})
            why = "" if facts["state"] == "holds" else f"\n    {facts['why']}"
            print(f"{number}/{len(asked)} {facts['state']:<9} {facts['seconds']:>6.1f} s  {cell.id}{why}", flush=True)
    results = read_results()
    write_page(ROOT / "docs/reliability.md", CELLS, results)
    bad = [cell.id for cell in CELLS if results.get(cell.id, {}).get("state") == "FAILS"]
    held = sum(results.get(cell.id, {}).get("state") == "holds" for cell in CELLS)
    print(f"{held} of {len(CELLS)} cells hold; {len(bad)} do not. docs/reliability.md has the table.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
