"""Nothing that a user writes into params.yaml reaches the shell in which DVC runs a stage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cigpose.config import load_preset
from pipelines import processes

HOSTILE = {
    "substitution": "a$(touch ran-1)",
    "backticks": "b`touch ran-2`",
    "quotes": "c'; touch ran-3; echo '",
    "double quotes": 'd"; touch ran-4; echo "',
    "newline": "e\ntouch ran-5\n",
    "semicolon": "f;touch ran-6",
    "pipe": "g|touch ran-7",
    "redirection": "h > ran-8",
    "variable of DVC": "i \\${seed} && touch ran-9",
}


def test_no_command_of_dvc_yaml_has_a_value_of_params_in_it(root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    commands = {name: (stage.get("do") or stage)["cmd"] for name, stage in stages.items()}
    assert {name: command for name, command in commands.items() if "$" in command} == {}


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = processes.environment({"DVC_NO_ANALYTICS": "1"})
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def pipeline(tmp_path: Path, root: Path) -> Path:
    """The dvc.yaml of this checkout in a folder of its own, without git."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(root / "dvc.yaml", folder)
    for name in ("cigpose", "pipelines"):
        (folder / name).symlink_to(root / name)
    assert dvc(folder, "init", "--no-scm", "--quiet").returncode == 0
    return folder


@pytest.mark.slow
def test_a_key_with_shell_text_in_it_runs_nothing_and_is_refused_in_one_sentence(pipeline: Path) -> None:
    values = load_preset("quickstart").to_mapping()
    drawing, people = values["data"]["render"]["rendered-val"], values["data"]["datasets"]["rendered-val"]
    values["data"]["render"] = {key: drawing for key in HOSTILE.values()}
    values["data"]["download"]["sources"] = {"j$(touch ran-10)": []}
    values["data"]["datasets"] |= {"k$(touch ran-11)": people}
    (pipeline / "params.yaml").write_text(yaml.safe_dump(values))
    (pipeline / "data/raw/rendered-val").mkdir(parents=True)
    run = dvc(pipeline, "repro", "--keep-going", "render", "download", "shard@k$(touch ran-11)")
    assert sorted(pipeline.glob("**/ran-*")) == []
    assert run.returncode != 0
    assert "params.yaml: data." in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.slow
def test_a_key_that_leads_elsewhere_costs_nobody_a_folder(pipeline: Path) -> None:
    """DVC takes an output away before it runs a stage, and so before any code of ours can look at its name."""
    inside, outside = pipeline / "precious", pipeline.parent / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("the only copy")
    values = load_preset("quickstart").to_mapping()
    values["data"]["render"] |= {"../../precious": values["data"]["render"]["rendered-val"]}
    values["data"]["datasets"] |= {"../../../outside": values["data"]["datasets"]["rendered-val"]}
    (pipeline / "params.yaml").write_text(yaml.safe_dump(values))
    (pipeline / "data/raw/rendered-val").mkdir(parents=True)
    keys = ("render@../../precious", "shard@../../../outside")
    run = dvc(pipeline, "repro", "--keep-going", "--single-item", *keys)
    assert all(f"'{key}'" in run.stderr.partition("failed to reproduce")[2] for key in keys), run.stderr
    assert [(folder / "file").read_text() for folder in (inside, outside)] == ["the only copy"] * 2
