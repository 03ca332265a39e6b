"""The plan of the house (docs/architecture.md): who may use whom, how large a room is, one name for one thing."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from cigpose.config import Config, load_preset, presets
from cigpose.config.schema import field_marks, leaves, nearest_mark

ORCHESTRATORS = {"dvc", "prefect", "ray", "mlflow", "pipelines"}
GROUND = {"files", "config", "keypoints", "codec", "crop", "draw", "progress", "pool"}
MAY_USE = {
    "files": {"files"},
    "keypoints": set(),
    "progress": set(),
    "pool": set(),
    "codec": set(),
    "crop": set(),
    "draw": {"keypoints"},
    "config": {"config", "files", "keypoints"},
    "render": GROUND | {"render"},
    "download": GROUND | {"download"},
    "shard": GROUND | {"shard", "download.manifest"},
    "loader": GROUND | {"loader", "shard.index"},
    "model": GROUND | {"model"},
    "evaluate": GROUND | {"evaluate", "loader", "model"},
    "train": GROUND | {"train", "evaluate", "loader", "model"},
    "deploy": GROUND | {"deploy", "evaluate", "model"},
    "dataset": GROUND | {"dataset", "deploy", "evaluate", "loader", "model", "shard.index"},
}
"""Room, or module on the ground floor -> what it may import of ours; `cli` and `cigpose/__init__` may use all."""
ROOMS_OF_PIPELINES = {"training", "tracking", "registry", "retraining"}
LARGEST_ROOM = 0.2
LONGEST_MODULE, LONGEST_STAGE, LONGEST_FUNCTION = 400, 150, 60
STAGES = {"render", "download", "shard", "locate", "train", "robustness", "evaluate", "register"}
SAME_IN_SEVERAL = {"main", "add_parser"}
"""What a module has by its kind, under one name in all."""

NO_PART_OF_A_RESULT = {
    "cigpose.config",
    "cigpose.download",
    "cigpose.files.addresses",
    "cigpose.files.atomic",
    "cigpose.files.cache",
    "cigpose.files.digest",
    "cigpose.files.errors",
    "cigpose.files.objects",
    "cigpose.files.s3",
    "cigpose.pool",
    "cigpose.progress",
    "cigpose.shard.index",
}
"""Code that reads params and carries or checks bytes: a change of it makes no stage stale."""


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Modules (and names of modules) a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    files = sorted((root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@functools.cache
def uses(root: Path, package: str) -> dict[str, set[str]]:
    """Module of a package -> modules of the package it imports."""
    known = modules(root, package)
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        used = set()
        for imported in imports(file):
            while imported and imported not in known:
                imported = imported.rpartition(".")[0]
            used |= {imported} - {"", package, name}
        graph[name] = used
    return graph


def allowed(module: str, rules: set[str]) -> bool:
    parts = module.split(".")[1:]
    return any(".".join(parts[:i]) in rules for i in range(1, len(parts) + 1))


def test_the_library_knows_no_orchestrator(root: Path) -> None:
    for file in modules(root, "cigpose").values():
        assert not {name.split(".")[0] for name in imports(file)} & ORCHESTRATORS, file


@pytest.mark.parametrize("room", sorted(MAY_USE))
def test_a_room_uses_only_what_the_plan_allows(root: Path, room: str) -> None:
    graph = uses(root, "cigpose")
    inside = [name for name in graph if name.split(".")[1:2] == [room]]
    assert inside
    for name in inside:
        refused = {used for used in graph[name] if not allowed(used, MAY_USE[room])}
        assert not refused, f"{name} imports {sorted(refused)}"


def test_every_room_has_its_rule(root: Path) -> None:
    rooms = {name.split(".")[1] for name in modules(root, "cigpose") if "." in name}
    assert rooms == {*MAY_USE, "cli"}


@pytest.mark.parametrize("package", ["cigpose", "pipelines"])
def test_no_modules_import_each_other_in_a_circle(root: Path, package: str) -> None:
    TopologicalSorter(uses(root, package)).prepare()


def test_rooms_of_pipelines_never_import_stages(root: Path) -> None:
    stages = {
        name for name, file in modules(root, "pipelines").items() if "def main(" in file.read_text(encoding="utf-8")
    }
    for name, used in uses(root, "pipelines").items():
        if name.split(".")[1:2] and name.split(".")[1] in ROOMS_OF_PIPELINES:
            assert not used & stages, f"{name} imports {sorted(used & stages)}"


@pytest.mark.parametrize("package", ["cigpose", "pipelines"])
def test_no_module_is_named_by_a_string(root: Path, package: str) -> None:
    for name, file in modules(root, package).items():
        assert "importlib" not in {imported.split(".")[0] for imported in imports(file)} or name.endswith("package"), (
            name
        )


def test_no_room_holds_more_than_a_fifth_of_the_library(root: Path) -> None:
    lines: dict[str, int] = defaultdict(int)
    for name, file in modules(root, "cigpose").items():
        lines[name.split(".")[1] if "." in name else ""] += len(file.read_text(encoding="utf-8").splitlines())
    for room, count in lines.items():
        assert count <= LARGEST_ROOM * sum(lines.values()), f"{room}: {count} of {sum(lines.values())} lines"


@pytest.mark.parametrize("package", ["cigpose", "pipelines"])
def test_modules_and_functions_are_short_enough_to_have_one_subject(root: Path, package: str) -> None:
    for name, file in modules(root, package).items():
        text = file.read_text(encoding="utf-8")
        is_stage = name.count(".") == 1 and package == "pipelines" and name.split(".")[1] in STAGES
        assert len(text.splitlines()) <= (LONGEST_STAGE if is_stage else LONGEST_MODULE), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= LONGEST_FUNCTION, f"{name}.{node.name}: {length} lines"


def test_a_public_name_means_one_thing(root: Path) -> None:
    homes = defaultdict(list)
    for package in ("cigpose", "pipelines"):
        for name, file in modules(root, package).items():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    homes[node.name].append(name)
    twice = {name: where for name, where in homes.items() if len(where) > 1 and name not in SAME_IN_SEVERAL}
    assert not twice


STAGES_OF_DVC = yaml.safe_load((Path(__file__).parents[1] / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
EXPERIMENTS = [load_preset(name) for name in presets()]


@pytest.mark.parametrize("stage", STAGES_OF_DVC)
def test_a_stage_of_dvc_yaml_depends_on_exactly_the_params_that_are_marked_to_affect_it(stage: str) -> None:
    about = STAGES_OF_DVC[stage].get("do", STAGES_OF_DVC[stage])
    keys = {key.removesuffix(".${key}") for key in about["params"]}
    for config in EXPERIMENTS:
        all_leaves = leaves(config.to_mapping())
        assert {leaf for leaf in all_leaves if within(leaf, keys)} == set(config.params_of(stage))
        assert all(any(within(leaf, {key}) for leaf in all_leaves) for key in keys)


def test_every_param_is_marked_with_stages_that_exist() -> None:
    marks = field_marks(Config, "stages")
    assert {stage for mark in marks.values() for stage in mark} == set(STAGES_OF_DVC)
    for config in EXPERIMENTS:
        assert {leaf for leaf in leaves(config.to_mapping()) if nearest_mark(leaf, marks) is None} == set()


def within(name: str, places: set[str]) -> bool:
    """Whether a dotted name is one of these places or lies below one."""
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def code_of(root: Path, stage: str) -> set[str]:
    """Modules of the library that a stage's module imports, and what they import."""
    graph, found = uses(root, "cigpose"), set()
    names = imports(root / f"pipelines/{stage}.py")
    new = names | {name.rpartition(".")[0] for name in names}
    while new := (new & graph.keys()) - found - {"cigpose"}:
        found |= new
        new = {used for name in new for used in graph[name]}
    return found


@pytest.mark.parametrize("stage", ["render", "shard", "robustness", "evaluate"])
def test_the_code_a_stage_depends_on_is_what_it_imports(root: Path, stage: str) -> None:
    about = STAGES_OF_DVC[stage].get("do", STAGES_OF_DVC[stage])
    paths = {dep for dep in about["deps"] if dep.startswith("cigpose/")}
    assert all((root / path).exists() for path in paths)
    named, imported = {path.removesuffix(".py").replace("/", ".") for path in paths}, code_of(root, stage)
    assert {name for name in imported if not within(name, named | NO_PART_OF_A_RESULT)} == set()
    assert {place for place in named if not any(within(name, {place}) for name in imported)} == set()
