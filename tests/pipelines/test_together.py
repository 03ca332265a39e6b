"""Two at once of what has no stage of its own: `dvc repro`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_stages import dvc, make_toy, wait_for

from pipelines import processes


@pytest.mark.slow
def test_of_two_dvc_repro_the_second_says_who_is_there_and_nothing_is_done_twice(project: Path, config: Any) -> None:
    toy = make_toy(project, config)
    (toy / "control/slow").write_text("train")
    first = processes.start([sys.executable, "-m", "dvc", "repro"], cwd=toy)
    try:
        wait_for((toy / "control/pids").is_file)
        second = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=toy, capture_output=True, text=True)
        (toy / "control/slow").write_text("")
        output, _ = first.communicate(timeout=120)
    finally:
        processes.stop_group(first)
    assert first.returncode == 0, output
    assert second.returncode != 0 and "busy" in second.stderr and "Traceback" not in second.stderr, second.stderr
    assert "up to date" in dvc(toy, "status")
