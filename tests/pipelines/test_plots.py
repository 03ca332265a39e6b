from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cigpose.evaluate.report import write_parts_csv
from cigpose.evaluate.robustness import Retained, write_retained_csv


@pytest.mark.slow
def test_the_plot_of_the_parts_has_a_bar_as_long_as_the_ap_of_each(root: Path, tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(root / name, tmp_path / name)
    figures = {f"{part}/{name}": value for part, value in (("body", 0.5), ("foot", 0.25))
               for name in ("AP", "AP50", "AP75", "AR")}  # fmt: skip
    write_parts_csv(figures, tmp_path / "data/plots/parts.csv")
    environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}

    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    dvc("init", "--no-scm", "--quiet")
    spec = json.loads(dvc("plots", "show", "--show-vega", "data/plots/parts.csv"))
    length, name = spec["encoding"]["x"], spec["encoding"]["y"]
    assert (length["type"], name["type"]) == ("quantitative", "nominal")
    bars = {row[name["field"]]: float(row[length["field"]]) for row in spec["data"]["values"]}
    assert bars == {"body": 0.5, "foot": 0.25}
    retained = [("all", 0.75), ("blur", 0.5)]
    rows = [
        Retained(corruption=name, part="whole", clean=0.4, ap=0.4 * share, share=share, low=0.0, high=1.0)
        for name, share in retained
    ]
    write_retained_csv(rows, "whole", tmp_path / "data/plots/robustness.csv")
    spec = json.loads(dvc("plots", "show", "--show-vega", "data/plots/robustness.csv"))
    length, name = spec["encoding"]["x"], spec["encoding"]["y"]
    assert [(row[name["field"]], float(row[length["field"]])) for row in spec["data"]["values"]] == retained
