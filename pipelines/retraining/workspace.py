"""The workspace of a retraining: a clone of the project below .dvc/tmp/exps, on the project's own DVC cache.

The user's tree is only read: its last commit is cloned, edits of tracked files are copied, and what comes out goes back
as a DVC experiment, which is a git ref. `dvc exp run --temp` would take the edits along by stashing them, so that one
who kills it at the wrong moment finds a tree without them; a git worktree would share the index's locks, the refs and
the settings with the user's checkout, and a killed one stays registered there.

The workspace stays until the next retraining, which takes over what it finished: stages, and downloads half way.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config, load_params
from cigpose.config.params_file import write_params
from cigpose.files.atomic import write_text
from pipelines.paths import RAW
from pipelines.processes import environment

FOLDER = Path(".dvc/tmp/exps/retrain")  # where `lineage.project_root` finds the way back from
KEPT = FOLDER.with_name("retrain.kept")
ALWAYS = ("params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", ".dvc/config.local", ".dvcignore")
"""Files that are taken along though git may not know them."""
FIRST_WEIGHTS = RAW / "pretrained"
_UNFINISHED = shutil.ignore_patterns(".*", "*.partial")  # these are written to as they stand
_WHO = {f"GIT_{role}_{what}": "retrain" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class WorkspaceError(RuntimeError):
    """The project cannot be copied, or DVC refuses it."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A copy of the project in which stages run."""

    root: Path
    """The user's project."""
    folder: Path
    """The same folder in the clone."""
    baseline: str
    """The commit it is a copy of."""
    edited: tuple[str, ...]
    """Tracked files that differ from it, taken along."""
    left_out: tuple[str, ...]
    """Files that git does not know, which are not there."""

    @property
    def clone(self) -> Path:
        """The top of the clone."""
        return self.root / FOLDER

    def env(self, experiment: str) -> dict[str, str]:
        """Environment of the stages: the copy's own modules, and the experiment's name as DVC tells it."""
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "DVC_EXP_NAME": experiment, "DVC_EXP_BASELINE_REV": self.baseline}


def make_workspace(root: Path, config: Config | None = None) -> Workspace:
    """Copy the project as it is now, with its data; the caller holds the project's claim.

    Args:
        root: the project.
        config: experiment to write into the copy's params.yaml; None for the user's own.

    Raises:
        WorkspaceError: there is no git commit to start from, or DVC cannot read the project.
    """
    try:
        top, baseline = (
            Path(_git(root, "rev-parse", "--show-toplevel").strip()),
            _git(root, "rev-parse", "HEAD").strip(),
        )
    except WorkspaceError as err:
        raise WorkspaceError(
            f"{root}: expected a git repository with a commit, as a retraining comes back as a DVC experiment. "
            "`git init`, `git add -A` and `git commit` make one."
        ) from err
    clone, kept = root / FOLDER, root / KEPT
    folder = clone / root.resolve().relative_to(top.resolve())
    _keep(folder, kept)
    shutil.rmtree(clone, ignore_errors=True)
    _git(top, "clone", "--quiet", "--local", "--no-tags", "--no-checkout", "--template=", str(top), str(clone))
    _git(clone, "-c", "core.hooksPath=/dev/null", "checkout", "--quiet", "--detach", baseline)
    edited = _listed(top, "diff", "--name-only", "--no-renames", "--ignore-submodules", "HEAD")
    for name in edited:
        _copy(top / name, clone / name)
    unknown = _listed(root, "ls-files", "--others", "--exclude-standard")
    for name in {*ALWAYS, *(name for name in unknown if Path(name).name == ".gitignore")}:
        if (root / name).is_file():
            _copy(root / name, folder / name)
    if config is not None:
        write_params(config, folder / "params.yaml")
    _share_cache(root, folder)
    _bring_data(root, folder, kept)
    _go_on(folder, kept)
    shutil.rmtree(kept, ignore_errors=True)
    left_out = tuple(name for name in unknown if not (folder / name).exists())
    return Workspace(root=root, folder=folder, baseline=baseline, edited=tuple(edited), left_out=left_out)


def _keep(folder: Path, kept: Path) -> None:
    """Put aside what the next workspace takes over; what a killed one had put aside is older, and goes first."""
    names = {"dvc.lock", *locked_outputs(folder), *(str(RAW / path.name) for path in (folder / RAW).glob("*"))}
    for name in names:
        _move(folder / name, kept / name)


def _move(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def _share_cache(root: Path, folder: Path) -> None:
    settings = configparser.RawConfigParser()
    settings.read(folder / ".dvc/config.local", encoding="utf-8")
    if not settings.has_section("cache"):
        settings.add_section("cache")
    settings.set("cache", "dir", f'"{(root / dvc(root, "cache", "dir").strip()).resolve()}"')
    with (folder / ".dvc/config.local").open("w", encoding="utf-8") as file:
        settings.write(file)


def locked_outputs(folder: Path) -> dict[str, str]:
    """Path -> md5 of every output that a folder's dvc.lock knows."""
    return {out["path"]: out.get("md5", "") for stage in _read_lock(folder).values() for out in stage.get("outs", ())}


def _read_lock(folder: Path) -> dict[str, Any]:
    with suppress(OSError, yaml.YAMLError, AttributeError):
        return dict(yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8")).get("stages") or {})
    return {}


def _bring_data(root: Path, folder: Path, kept: Path) -> None:
    """Outputs from DVC's cache; those it does not hold as links to the user's files, then what an earlier run fetched.

    A link costs no space, and a stage puts new data in place of old: the user's files stay as they are.
    """
    if (folder / "dvc.lock").is_file():
        dvc(folder, "checkout", "--force", "--allow-missing", "--quiet")
    for path in locked_outputs(root):
        if (root / path).exists() and not (folder / path).exists():
            _link(root / path, folder / path)
    made = raw_outputs(folder) | {Path(path).name for path in locked_outputs(kept)}
    for source in (kept / RAW).glob("*"):
        if source.name in made:  # what nobody makes is the user's own, and may be another by now
            _move(source, folder / RAW / source.name)
    for source in (root / RAW).glob("[!.]*"):
        if not (folder / RAW / source.name).exists():
            _link(source, folder / RAW / source.name)
    for source in (root / FIRST_WEIGHTS).glob("[!.]*"):  # the user's own lie beside those that were fetched
        if not (kept_one := folder / FIRST_WEIGHTS / source.name).exists() or not kept_one.samefile(source):
            kept_one.unlink(missing_ok=True)
            _link(source, kept_one)


def _go_on(folder: Path, kept: Path) -> None:
    """Take over stages that an earlier retraining finished, where the user's dvc.lock has them otherwise or not at all.

    DVC compares what an entry says with what there is: one that does not fit makes the stage stale, as it was.
    """
    known, stages = _read_lock(kept), _read_lock(folder)
    taken = {
        name: known[name] for name in stale_stages(folder) if known.get(name, stages.get(name)) != stages.get(name)
    }
    if taken:
        text = yaml.safe_dump({"schema": "2.0", "stages": stages | taken}, sort_keys=False)
        write_text(folder / "dvc.lock", text)
        dvc(folder, "checkout", "--force", "--allow-missing", "--quiet")
        for out in (out for stage in taken.values() for out in stage.get("outs", ())):
            _move(kept / out["path"], folder / out["path"])


def raw_outputs(folder: Path) -> set[str]:
    """Names of the folders of data/raw that stages make."""
    config = load_params(folder / "params.yaml")
    named = {*config.data.render, *config.data.download.sources, FIRST_WEIGHTS.name}
    return named | {Path(path).name for path in locked_outputs(folder) if Path(path).is_relative_to(RAW)}


def stale_stages(folder: Path) -> list[str]:
    """Stages that `dvc repro` would run, or might once those before them have.

    Raises:
        WorkspaceError: DVC cannot read the project.
    """
    return list(_status(folder))


def changes_by_stage(folder: Path) -> dict[str, list[str]]:
    """Stage -> why `dvc repro` would run it, where something has changed.

    Raises:
        WorkspaceError: DVC cannot read the project.
    """
    found = {}
    for stage, reasons in _status(folder).items():
        told = [words for reason in reasons if isinstance(reason, Mapping) for words in _in_words(reason)]
        told += [reason for reason in reasons if isinstance(reason, str) and reason != "always changed"]
        if told:
            found[stage] = told
    return found


def _in_words(reason: Mapping[str, Any]) -> list[str]:
    """`{"changed deps": {"params.yaml": {"seed": "modified"}}}` as `seed is modified`."""
    changed = [item for what in reason.values() if isinstance(what, Mapping) for item in what.items()]
    params = [item for _, how in changed if isinstance(how, Mapping) for item in how.items()]
    return [f"{name} is {how}" for name, how in [*changed, *params] if isinstance(how, str)]


def _status(folder: Path) -> dict[str, list[Any]]:
    return json.loads(dvc(folder, "status", "--json"))


def save_experiment(workspace: Workspace, name: str) -> None:
    """Give the user's repository the outcome as the DVC experiment `name`, on the commit the run started from.

    dvc.lock goes in as the stages left it. `dvc exp save` would first write into it that every stage had run with
    today's params, those also that were not asked to.

    Raises:
        WorkspaceError: git refuses.
    """
    clone, folder = workspace.clone, workspace.folder
    _git(clone, "add", "--update")
    _git(folder, "add", "--force", "--", *(name for name in ALWAYS[:3] if (folder / name).is_file()))
    files = [path for path, md5 in locked_outputs(folder).items() if not md5.endswith(".dir")]
    if new := _listed(folder, "ls-files", "--others", "--exclude-standard", "--", *files, ":(glob)**/.gitignore"):
        _git(folder, "add", "--", *new)
    tree = _git(clone, "write-tree").strip()
    commit = _git(clone, "commit-tree", tree, "-p", workspace.baseline, "-m", name, env=_WHO).strip()
    ref = f"refs/exps/{workspace.baseline[:2]}/{workspace.baseline[2:]}/{name}"
    _git(clone, "update-ref", ref, commit)
    _git(workspace.root, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(clone), f"{ref}:{ref}")


def dvc(folder: Path, *arguments: str) -> str:
    """Output of a DVC command.

    Raises:
        WorkspaceError: it failed; in its own last words.
    """
    return _output([sys.executable, "-m", "dvc", *arguments], folder)


def _git(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    return _output(["git", "--no-optional-locks", *arguments], folder, env)


def _output(command: list[str], folder: Path, env: Mapping[str, str] | None = None) -> str:
    run = subprocess.run(command, cwd=folder, env=environment(env), capture_output=True, text=True)
    if run.returncode:
        name = command[2] if command[0] == sys.executable else command[0]
        raise WorkspaceError(f"{name}: {(run.stderr.strip().splitlines() or [f'exited with {run.returncode}.'])[-1]}")
    return run.stdout


def _listed(folder: Path, *arguments: str) -> list[str]:
    command, *rest = arguments
    return [name for name in _git(folder, command, "-z", *rest).split("\0") if name]


def _copy(source: Path, target: Path) -> None:
    """Let `target` be as `source` is: a file, a link, or nothing."""
    target.unlink(missing_ok=True)
    if source.is_symlink() or source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


def _link(source: Path, target: Path) -> None:
    """Show a file or folder at another place without its bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file, ignore=_UNFINISHED)
    else:
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:  # another file system
        os.symlink(source, target)


def names_of(stages: Iterable[str]) -> set[str]:
    """Names as in dvc.yaml: of `shard@people`, `shard`."""
    return {name.partition("@")[0] for name in stages}
