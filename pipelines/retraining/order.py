"""Which stages there are, and which of them a retraining looks at."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import yaml

from pipelines.processes import environment
from pipelines.retraining.policies import StageError


def stages(root: Path) -> list[str]:
    """Names of the stages of dvc.yaml so that each follows what it needs; a `foreach` is one.

    Raises:
        StageError: dvc.yaml or params.yaml cannot be read; in DVC's words.
    """
    command = [sys.executable, "-m", "dvc", "dag", "--dot"]
    run = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    if run.returncode:
        raise StageError(f"dvc.yaml: {(run.stderr.strip().splitlines() or ['dvc dag failed'])[-1]}")
    needs: dict[str, set[str]] = {}
    for line in run.stdout.splitlines():
        names = [name.partition("@")[0] for name in re.findall(r'"([^"]+)"', line)]
        for name in names:
            needs.setdefault(name, set())
        if len(names) == 2 and names[0] != names[1]:
            needs[names[1]].add(names[0])
    written = list(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    sorter, order = TopologicalSorter(needs), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda name: written.index(name) if name in written else len(written))
        order += ready
        sorter.done(*ready)
    return order


def stages_from(order: Sequence[str], first: str | None) -> list[str]:
    """The stages from `first` on; all of them for None.

    Raises:
        StageError: there is no such stage.
    """
    if first is None:
        return list(order)
    if first not in order:
        raise StageError(f"start_from: there is no stage {first!r} in dvc.yaml. Stages: {', '.join(order)}.")
    return list(order[order.index(first) :])
