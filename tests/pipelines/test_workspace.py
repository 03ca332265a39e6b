from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_stages import dvc, git, make_toy, tree, wait_for

from cigpose.config import Config
from pipelines import processes
from pipelines.retraining import turn
from pipelines.retraining.words import LastWords
from pipelines.retraining.workspace import (
    FOLDER,
    Workspace,
    WorkspaceError,
    make_workspace,
    save_experiment,
    stale_stages,
)


@pytest.fixture
def toy(project: Path, config: Config) -> Path:
    return make_toy(project, config)


def set_epochs(folder: Path, number: int) -> None:
    file = folder / "params.yaml"
    values = yaml.safe_load(file.read_text())
    values["train"]["epochs"] = number
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def epochs_in_lock(folder: Path) -> int:
    return yaml.safe_load((folder / "dvc.lock").read_text())["stages"]["train"]["params"]["params.yaml"]["train.epochs"]


def repro(workspace: Workspace, *stages: str) -> None:
    for stage in stages:
        dvc(workspace.folder, "repro", "--single-item", "--quiet", stage)


@pytest.mark.slow
def test_a_run_in_the_workspace_leaves_the_users_tree_as_it_is_and_comes_back_as_an_experiment(toy: Path) -> None:
    dvc(toy, "repro", "--quiet")
    (toy / "data/raw/coco/.partial").mkdir()
    with (toy / "stage.py").open("a") as file:
        file.write("# an edit that is not committed\n")
    (toy / "idea.py").write_text("not known to git")
    before, status = tree(toy), git(toy, "status", "--porcelain")

    workspace = make_workspace(toy)
    assert workspace.edited == ("stage.py",) and workspace.left_out == ("idea.py",)
    assert (workspace.folder / "stage.py").read_text().endswith("# an edit that is not committed\n")
    mine, theirs = toy / "data/raw/coco/archive.zip", workspace.folder / "data/raw/coco/archive.zip"
    assert theirs.samefile(mine) and not theirs.with_name(".partial").exists()
    changed = stale_stages(workspace.folder)
    assert not set(changed) & {"train", "evaluate", "register", "download"}, "data and metrics have come along"
    set_epochs(workspace.folder, 7)
    dvc(workspace.folder, "repro", "--single-item", "--force", "--quiet", "download")
    assert not theirs.samefile(mine), "new data take the place of the link"
    repro(workspace, "evaluate")
    save_experiment(workspace, "retrain-from-evaluate")  # the training was not asked for
    repro(workspace, "train", "evaluate", "register")
    save_experiment(workspace, "retrain-7")

    assert tree(toy) == before
    assert git(toy, "status", "--porcelain") == status and not git(toy, "stash", "list")
    assert "retrain-7" in dvc(toy, "exp", "show", "--json")
    left_out = git(toy, "for-each-ref", "--format=%(objectname)", "refs/exps/**/retrain-from-evaluate").strip()
    written = yaml.safe_load(git(toy, "show", f"{left_out}:dvc.lock"))["stages"]["train"]["params"]["params.yaml"]
    assert written == {"train.epochs": 4}, "dvc.lock says what the stage ran with"
    dvc(toy, "exp", "apply", "retrain-7")
    assert epochs_in_lock(toy) == yaml.safe_load((toy / "params.yaml").read_text())["train"]["epochs"] == 7
    assert (toy / "data/model").read_bytes() == (workspace.folder / "data/model").read_bytes() != before["data/model"]
    assert (toy / "idea.py").exists() and not stale_stages(toy)


@pytest.mark.slow
def test_the_next_workspace_goes_on_where_a_stopped_one_was_and_the_users_data_stay(toy: Path) -> None:
    file = toy / "params.yaml"
    values = yaml.safe_load(file.read_text())
    values["data"]["download"]["sources"] = {"other": ["train2017.zip"]}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    first = make_workspace(toy)
    assert {"render@rendered-train", "download", "train"} <= set(stale_stages(first.folder))
    repro(first, "render", "download")
    half = first.folder / "data/raw/other/.partial"
    half.mkdir(parents=True)
    (half / "train2017.zip").write_text("half of it")
    (first.folder / ".git/HEAD").unlink()  # as a kill may leave it
    for name in ("mine", "pretrained"):
        (toy / "data/raw" / name).mkdir(parents=True)
        (toy / "data/raw" / name / "weights").write_text("a user's own")
        (first.folder / "data/raw" / name).mkdir()
        (first.folder / "data/raw" / name / "weights").write_text("as they were then")

    second = make_workspace(toy)
    assert not set(stale_stages(second.folder)) & {"render@rendered-train", "render@rendered-val", "download"}
    assert (second.folder / "data/raw/other/.partial/train2017.zip").read_text() == "half of it"
    for name in ("mine", "pretrained"):
        assert (second.folder / "data/raw" / name / "weights").samefile(toy / "data/raw" / name / "weights")
    assert not (toy / "dvc.lock").exists()
    assert sorted(path.name for path in (toy / "data/raw").iterdir()) == ["mine", "pretrained"]


def test_a_project_that_git_does_not_know_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"expected a git repository with a commit.*`git commit` make one\.$"):
        make_workspace(tmp_path)


def test_the_stage_that_a_killed_retraining_left_is_stopped_and_another_process_of_that_number_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "_mark", str)
    workspace = tmp_path / FOLDER
    workspace.mkdir(parents=True)
    for folder, survives in ((workspace, False), (tmp_path, True)):
        process = processes.start([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder)
        try:
            with pytest.raises(ZeroDivisionError), turn.noted(tmp_path, "6d1ac1e2-6b5c-4f0e-9d0c-0d7a4ad1e5c1") as note:
                note.write(process.pid)
                left = note.path.read_bytes()
                1 / 0  # noqa: B018
            assert turn.clear_if_killed(tmp_path) is None, "an error is no kill"
            note.path.write_bytes(left)
            with turn.only_retraining(tmp_path):
                assert turn.clear_if_killed(tmp_path) is None, "somebody is at work"
            assert turn.clear_if_killed(tmp_path) == "6d1ac1e2-6b5c-4f0e-9d0c-0d7a4ad1e5c1"
            assert (process.poll() is None) == survives
            assert not note.path.exists()
        finally:
            processes.stop_group(process, ((signal.SIGKILL, 5.0),))


def test_of_a_failed_stage_its_own_sentence_is_kept_whole_and_not_what_a_library_says_after_it() -> None:
    words, sentence = LastWords("train"), "train: params.yaml: " + "a long reason, " * 40 + "and what to do."
    for line in (
        "Running stage 'train':",
        "> python -m pipelines.train",
        sentence,
        "UserWarning: leaked",
        "ERROR: failed to reproduce 'train'",
    ):
        words.hear(line)
    assert words.sentence == sentence
    words = LastWords("train")
    words.hear("ValueError: no")
    words.hear("ERROR: failed to reproduce 'train'")
    assert words.sentence == "train: ValueError: no"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("Running stage 'shard@people':", "Completed"),
        ("Stage 'train' is cached - skipping run, checking out outputs", "From the cache"),
        ("Stage 'train' didn't change, skipping", "Up to date"),
    ],
)
def test_the_state_of_a_stage_says_whether_it_ran(line: str, state: str) -> None:
    words = LastWords("shard")
    words.hear(line)
    assert words.done == state


HOLD = """
import sys, time
from pathlib import Path
from pipelines.retraining.turn import only_retraining
with only_retraining(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_killed_owner_frees_the_project(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=processes.environment()
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(
            OSError, match=rf"running already \(process {owner.pid} on {os.uname().nodename}, since .* ago\)"
        ):
            turn.only_retraining(tmp_path).__enter__()
    finally:
        owner.kill()
        owner.communicate()
    with turn.only_retraining(tmp_path):
        pass
    assert wait_for(lambda: (tmp_path / ".runs/retrain.lock").read_text() == "")
