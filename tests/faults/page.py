"""docs/reliability.md: the promises, the tests that prove each, and the table of what was tried."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults import Cell

from cigpose.files.atomic import write_text

SOAK = Path(__file__).resolve().parents[2] / ".faults/soak.json"
TRAIN_STAGE = "tests/pipelines/test_train_stage.py"
PROMISES: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "A killed run, started again, ends with the same bits (CPU, one worker), and never with fewer finished steps "
        "than the last checkpoint.",
        (
            f"{TRAIN_STAGE}::test_killed_at_every_level_the_weights_equal_those_of_a_run_never_killed",
            "tests/train/test_loop.py",
            "tests/faults/test_sample.py",
        ),
    ),
    2: (
        "What stands under its final name is whole and is what its manifest says.",
        (
            "tests/files/test_atomic.py",
            "tests/download/test_fetch_killed.py",
            "tests/pipelines/test_train_runs.py::test_damaged_results_are_named_and_made_again",
            "tests/faults/test_hostile.py",
        ),
    ),
    3: (
        "What dvc.lock and the registry say about a model is what it was made of.",
        (
            "tests/pipelines/test_registry.py::test_a_promotion_killed_anywhere_leaves_no_half_state",
            "tests/pipelines/test_train_runs.py::test_changed_first_weights_are_another_run",
            "tests/pipelines/test_register.py::test_a_registered_model_is_complete",
        ),
    ),
    4: (
        "Nothing from outside is executed, nothing is written outside the project and the named caches, no page or "
        "server acts on the machine, and no artifact carries a credential.",
        (
            "tests/model/test_weights.py::test_a_pickle_that_would_run_code_is_refused_by_name",
            "tests/loader/test_batches.py::test_a_hostile_index_touches_no_file_outside_the_cache",
            "tests/pipelines/test_secrets.py::test_no_secret_is_in_anything_that_is_kept_or_shown",
            "tests/pipelines/test_ui.py::"
            "test_make_ui_brings_both_up_for_their_own_pages_only_draws_them_and_leaves_nothing_behind",
        ),
    ),
    5: (
        "Two of anything never damage one another: one waits, or says who is there.",
        (
            "tests/shard/test_processes.py::test_a_second_sharding_of_a_dataset_is_told_who_is_there_and_harms_nothing",
            "tests/pipelines/test_train_runs.py::test_of_two_real_trainings_the_second_is_refused",
            "tests/pipelines/test_together.py",
            "tests/pipelines/test_registry.py::test_of_two_that_settle_at_once_the_better_is_champion",
        ),
    ),
}
HEAD = """# Reliability

What this project promises, the tests that prove it, and what was tried. `make faults` writes this page from
`tests/faults/` (`cells.py` is the table, `page.py` the words); do not edit it.

A cell runs a real command in a tiny real project, breaks it there, and asks that: the broken run ends as the table says
(`dies`: by the signal; `recovers`: well all the same; `sentence`: exit status 1 and one sentence; `either`: one of the
last two); nothing it started is alive 15 s later; the same command then ends well, from the last checkpoint at least;
the result has the bits of a run that nothing happened to; and project, temporary folder and /dev/shm hold no file that
such a run does not leave. Lines are named `module:function`: processes are broken there from outside
(`tests/faults/child/sitecustomize.py`), the product has no hook for it.
"""
NETWORK = """
## What listens, and who may read

| what | where | who may |
| --- | --- | --- |
| Ray's server, raylet, workers of a local training | every interface: Ray has no setting for it | who has the token, which is new for each training and in the environment of its processes only |
| Ray's monitor (metrics, no commands) | port 44217 of every interface | everybody; close it by a firewall where that matters |
| torch's store of a local training | nowhere: a file in a private folder | the user |
| Gloo, NCCL of a local training | loopback | processes of the machine |
| Ray and torch's store of a cluster (`RAY_ADDRESS`) | every interface | Ray asks for its token, torch's store for none: a cluster belongs in a network of its own |
| Prefect of `make ui` | loopback | who has `.prefect/token` (0600) |
| MLflow of `make ui` | loopback | processes and users of the machine |
| the temporary folder of a training's Ray | 0700 | the user; it and every process end with the training, within seconds even after SIGKILL |
| the project's folder | as the user's umask says | `.prefect/token` is 0600; addresses with credentials belong in the environment |
"""
LIMITS = """
## What could not be tried here

- **A power cut itself.** Processes are killed all at once, and the order of syncs and renames is recorded and compared
  (group Power); no disk was made to lose its cache. What MLflow and DVC write themselves they do not sync.
- **A GPU**, and so NCCL, its processes and its memory. **Several machines**: two Ray nodes on one machine are a test of
  their own (`CIGPOSE_TEST_CLUSTER=1`): one is lost, one joins 20 s late.
- **File systems** other than ext4 and tmpfs: no NFS, whose locks may differ, no FUSE.
- **macOS**: namespaces, small disks and /proc, which cells use, are Linux's.
"""


def write_page(path: Path, cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page from what was tried."""
    parts = [HEAD, *_promises(cells, results), *_table(cells, results), *_soak(), NETWORK, LIMITS]
    write_text(path, re.sub(r"\n{3,}", "\n\n", "\n".join(parts)))


def _promises(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Promises", ""]
    for number, (promise, tests) in PROMISES.items():
        own = [results.get(cell.id, {}).get("state") for cell in cells if cell.promise == number]
        lines += [f"{number}. **{promise}** {own.count('holds')} of {len(own)} cells below; and"]
        lines += [f"   - `{test}`" for test in tests]
    return [*lines, ""]


def _table(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    states = [results.get(cell.id, {}).get("state", "not tried") for cell in cells]
    tries = sum(results.get(cell.id, {}).get("passed", 0) for cell in cells)
    lines = [
        "## The matrix",
        "",
        f"{states.count('holds')} of {len(cells)} cells hold ({tries} tries), {states.count('FAILS')} do not, "
        f"{states.count('not tried')} were not tried. The last column says when, and at which commit: {_commits(cells, results)}.",
    ]
    for group in dict.fromkeys(cell.group for cell in cells):
        lines += ["", f"### {group}", "", "| command | what breaks | where | must hold | promise | held | tried |"]
        lines += ["| --- | --- | --- | --- | ---: | --- | --- |"]
        lines += [_row(cell, results.get(cell.id, {})) for cell in cells if cell.group == group]
    return [*lines, ""]


def _commits(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """How many cells were tried last at each commit: a page of several is no proof of the newest."""
    counts = Counter(results.get(cell.id, {}).get("commit", "none") for cell in cells)
    return ", ".join(f"{count} at {commit}" for commit, count in counts.most_common())


def _row(cell: Cell, facts: Mapping[str, Any]) -> str:
    state = facts.get("state", "not tried")
    held = f"{facts['passed']} of {facts['passed']}" if state == "holds" else state
    if state not in ("holds", "FAILS") and facts.get("why"):
        held += f": {facts['why'].splitlines()[0][:60]}"
    job = {"training": "training (no Ray)", "test": "test"}.get(cell.job, cell.job)
    tried = " at ".join(facts[name] for name in ("when", "commit") if facts.get(name))
    return f"| {job} | {cell.what} | {_place(cell)} | {cell.holds} | {cell.promise} | {held} | {tried} |"


def _place(cell: Cell) -> str:
    fault = getattr(cell.fault, "kill", getattr(cell.fault, "hold", cell.fault))
    if test := getattr(fault, "test", None):
        name = test.partition("::")[2]
        return f"`{name or test}`"
    at = getattr(fault, "at", None)
    return f"{fault.when} call {fault.nth} of `{at}`" if at else ""


def _soak() -> list[str]:
    if not SOAK.is_file():
        return []
    facts = json.loads(SOAK.read_text())
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    about = (
        "`make soak HOURS=1` trains, retrains with other params and registers, one after the other, in a tiny project, and "
        "kills what is at work at random moments (a seeded generator says when). At the end each model has the bits of an "
        "undisturbed run. The last one:"
    )
    return ["## Soak", "", about, "", "| | |", "| --- | --- |", *rows, ""]
