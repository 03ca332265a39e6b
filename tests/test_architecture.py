"""What may import what: the library below knows nothing of the orchestration above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from cigpose.config import load_preset, presets

ORCHESTRATORS = {"dvc", "prefect", "ray", "mlflow", "pipelines"}
GROUND = {"files", "keypoints", "schema", "config", "codec", "progress", "params_file", "draw"}
MAY_USE = {
    "files": {"files"},
    "model": GROUND | {"model"},
    "data": GROUND | {"data"},
    "train": GROUND | {"train", "model", "data", "evaluate"},
    "evaluate": GROUND | {"evaluate", "model", "data"},
    "deploy": GROUND | {"deploy", "model", "data", "evaluate"},
}

# Keys of params.yaml that change how, where or how visibly a result is made, but not the result.
WITHOUT_EFFECT = {
    "published",
    "data.download.mirror",
    "data.download.drive_ids",
    "data.download.parallel_files",
    "data.download.timeout_s",
    "data.download.max_attempts",
    "data.sharding.processes",
    "train.channels_last",
    "train.compile",
    "train.log_every_steps",
    "train.checkpoint",
    "train.loader",
    "train.cluster",
}


def imports(file: Path) -> set[str]:
    """Modules a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def library_files(root: Path) -> list[Path]:
    return sorted((root / "cigpose").rglob("*.py"))


def test_the_library_knows_no_orchestrator(root: Path) -> None:
    for file in library_files(root):
        assert not {name.split(".")[0] for name in imports(file)} & ORCHESTRATORS, file


@pytest.mark.parametrize("room", sorted(MAY_USE))
def test_a_room_imports_only_the_rooms_below_it(root: Path, room: str) -> None:
    for file in sorted((root / "cigpose" / room).rglob("*.py")):
        used = {name.split(".")[1] for name in imports(file) if name.startswith("cigpose.")}
        used &= {path.stem for path in (root / "cigpose").iterdir()}
        assert used <= MAY_USE[room], f"{file.relative_to(root)} imports {sorted(used - MAY_USE[room])}"


def test_the_ground_floor_stands_on_itself(root: Path) -> None:
    for name in sorted(GROUND):
        file = root / "cigpose" / f"{name}.py"
        files = [file] if file.exists() else sorted((root / "cigpose" / name).glob("*.py"))
        for file in files:
            used = {module.split(".")[1] for module in imports(file) if module.startswith("cigpose.")}
            assert used & {path.stem for path in (root / "cigpose").iterdir()} <= GROUND, file


def stage_params(root: Path) -> set[str]:
    """Every params key a stage of dvc.yaml depends on, foreach members merged."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"].values()
    keys = {key for stage in stages for key in stage.get("do", stage)["params"]}
    return {key.removesuffix(".${key}") for key in keys}


def leaves(values: dict, path: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        found |= leaves(value, here) if isinstance(value, dict) and value else {here}
    return found


@pytest.mark.parametrize("name", presets())
def test_every_parameter_either_makes_a_stage_stale_or_is_known_to_have_no_effect(root: Path, name: str) -> None:
    tracked = stage_params(root) | WITHOUT_EFFECT
    for leaf in leaves(load_preset(name).to_mapping()):
        covered = {leaf[:i] for i, letter in enumerate(leaf) if letter == "."} | {leaf}
        assert covered & tracked, f"{leaf} is in params.yaml, but no stage of dvc.yaml depends on it"


def test_every_key_a_stage_depends_on_exists(root: Path) -> None:
    values = load_preset("quickstart").to_mapping()
    known = leaves(values)
    sections = {leaf[:i] for leaf in known for i, letter in enumerate(leaf) if letter == "."} | known
    assert stage_params(root) <= sections
