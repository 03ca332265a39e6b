"""Which run `train` takes, guards, or makes again: decided before Ray starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from train_stage import Stage

from cigpose.config import load_params
from cigpose.config.schema import ConfigError
from cigpose.model.estimator import build_model
from cigpose.train.checkpoints import CheckpointStore
from pipelines import train
from pipelines.lineage import digest_of
from pipelines.tracking.run import Run
from pipelines.training import identity, results
from pipelines.training.watch import Watch

HOLDER = """
import sys
from pathlib import Path
from cigpose.files.atomic import claimed
with claimed(Path(sys.argv[1]), "a training of this run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def trained(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The stage's folder as the working directory; a training only notes the folder of its run, here."""
    folders: list[Path] = []

    def note(config: Any, params: Any, folder: Path, store: Any) -> None:
        folders.append(folder)
        raise ValueError("trained")

    monkeypatch.chdir(stage.folder)
    monkeypatch.setattr(train, "train_run", note)
    return folders


@contextmanager
def held(lock: Path) -> Iterator[int]:
    """Another process that holds a lock: its id."""
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.communicate("")


def finish_run() -> Path:
    """The folder of the run of params.yaml, with made-up results."""
    config = load_params()
    folder = identity.run_folder(config, identity.run_params(config))
    for name in ("model/model.safetensors", *train.OUTPUTS[1:]):
        (folder / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "results" / name).write_text('{"best_epoch": 1, "epochs": 2}')
    results.seal(folder, "run")
    return folder


def outcome_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit status and output of the stage."""
    capsys.readouterr()
    try:
        code = train.main(arguments)
    except SystemExit as end:  # of a command line that is none
        code = end.code
    return code, "".join(capsys.readouterr())


def test_a_transform_that_does_not_exist_is_said_before_anything_is_trained(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage.params(augmentation__stage2__extra=[{"RandomBrightnesContrast": {"p": 0.2}}])
    code, output = outcome_of(capsys)
    assert output.startswith("train: augmentation.stage2.extra[0]: albumentations has no transform 'RandomBrightnesC")
    assert code == 1 and output.rstrip().endswith("Did you mean 'RandomBrightnessContrast'?") and not trained


def test_changed_first_weights_are_another_run(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage.params(model__backbone__pretrained="mine.safetensors")
    weights = stage.folder / "data/raw/pretrained/mine.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = build_model(load_params()).state_dict()
    safetensors.torch.save_file(state, weights)
    first = finish_run()
    code, output = outcome_of(capsys)
    assert code == 0 and "finished before" in output
    safetensors.torch.save_file({key: tensor + 1 for key, tensor in state.items()}, weights)
    assert outcome_of(capsys) == (1, "train: trained\n")
    assert trained == [first.with_name(trained[0].name)] and trained[0] != first
    weights.unlink()
    assert "not found. `dvc repro pretrained` fetches the backbone's first weights." in outcome_of(capsys)[1]


def test_another_evaluation_is_of_the_same_run(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage.params(seed=6)
    folder = finish_run()
    other = {"person_score": "box", "oks_nms_threshold": None, "keypoint_score_threshold": 0.1, "area": "box"}
    others = {f"evaluate__{name}": value for name, value in {**other, "batch": 3, "metric": "body/AP"}.items()}
    stage.params(seed=6, **others)
    assert outcome_of(capsys) == (
        0,
        f"{folder}: finished before with these params; its results are taken. --restart trains anew.\n"
        "quickstart: best epoch 1 of 2\n",
    )
    stage.params(seed=6, train__validation__metric="body/AP")
    assert outcome_of(capsys)[0] == 1 and trained[0] != folder


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda folder: (folder / "results/model/model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda folder: (folder / "results/plots/loss.csv").unlink(), "loss.csv is missing"),
        (lambda folder: (folder / "DONE").write_text("a91f\n"), "DONE names no digests of the results"),
        (lambda folder: (folder / "DONE").write_text('{"files": {}}'), "DONE names no results"),
    ],
    ids=["empty", "missing", "an earlier version's", "nothing vouched for"],
)
def test_damaged_results_are_named_and_made_again(
    stage: Stage,
    trained: list[Path],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], object],
    sentence: str,
) -> None:
    stage.params(seed=2)
    folder = finish_run()
    harm(folder)
    code, output = outcome_of(capsys)
    assert code == 1 and trained == [folder]
    assert sentence in output and output.endswith("train: trained\n") and "the run is trained again" in output
    assert not (folder / "DONE").exists()


def test_halves_of_results_that_a_killed_training_left_go_with_the_next(stage: Stage, trained: list[Path]) -> None:
    folder = finish_run()
    halves = [folder / ".DONE.0badcafe.part", Path("data/metrics/.train.json.0badcafe.part")]
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text("{")
    halves += [Path("data/.model.0badcafe.part"), Path("data/.model.0badcafe.old")]
    for half in halves[2:]:
        half.mkdir()
    results.seal(folder, "run")
    assert train.main([]) == 0 and not trained
    assert not any(half.exists() for half in halves)


@pytest.mark.parametrize("arguments", [(), ("--restart",)], ids=["train", "restart"])
def test_a_second_training_of_a_run_says_who_is_there_and_touches_nothing(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    stage.params(seed=3)
    folder = finish_run()
    store = CheckpointStore(folder / "checkpoints")
    store.save(1, {}, {})
    before = sorted(folder.rglob("*"))
    with held(folder.with_name(f"{folder.name}.lock")) as owner:
        code, output = outcome_of(capsys, *arguments)
    assert code == 1 and output.startswith(f"train: a training of this run is running already (process {owner} on ")
    assert sorted(folder.rglob("*")) == before and store.names() == ["step-000000001"]
    assert not trained
    outcome_of(capsys, "--restart")  # the owner has gone
    assert trained == [folder] and not folder.exists()


def test_the_flow_can_ask_for_a_restart_where_dvc_hands_no_arguments_on(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.params(seed=6)
    folder = finish_run()
    outcome_of(capsys)
    assert not trained, "finished before: its results are taken"
    monkeypatch.setenv("CIGPOSE_RESTART", "1")
    outcome_of(capsys)
    assert trained == [folder] and not folder.exists()


@pytest.mark.parametrize("protocol", ["evaluate", "train.validation"])
def test_a_figure_of_crowds_is_refused_where_the_labels_tell_no_crowds(
    stage: Stage, trained: list[Path], tmp_path: Path, protocol: str
) -> None:
    stage.params(**{f"{protocol.replace('.', '__')}__metric": "whole/AP_easy"})
    with pytest.raises(ConfigError, match=rf"^{protocol}\.metric: 'whole/AP_easy' is not among"):
        Watch(load_params(), Run(tmp_path), Path("data/shards"))


@pytest.mark.slow
def test_of_two_real_trainings_the_second_is_refused(stage: Stage) -> None:
    stage.params(seed=5)
    known = set(stage.folder.glob(".runs/*.lock"))
    process = stage.start()
    try:
        deadline = time.monotonic() + 120
        while not any(lock.stat().st_size for lock in set(stage.folder.glob(".runs/*.lock")) - known):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # it holds its run, and Ray has not been started
        code, output = stage.run("--restart")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert code == 1 and f"running already (process {process.pid} on " in output
    assert "Traceback" not in output


def test_two_runs_do_not_keep_their_checkpoints_at_one_address_at_once(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = str(tmp_path / "kept")
    stage.params(seed=4, train__checkpoint={"address": address})
    CheckpointStore(address).save(1, {}, {})
    lock = stage.folder / ".runs" / f"checkpoints-{digest_of(address)}.lock"
    with held(lock):
        _, output = outcome_of(capsys, "--restart")
    assert f"a training with its checkpoints at {address} is running already" in output
    assert CheckpointStore(address).names() == ["step-000000001"]


def test_a_mistyped_option_is_refused_and_nothing_is_trained(
    stage: Stage, trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage.params()
    for mistake in ("--restrat", "--res", "quickstart"):
        code, output = outcome_of(capsys, mistake)
        assert code == 2 and f"unrecognized arguments: {mistake}" in output
    code, output = outcome_of(capsys, "--help")
    assert code == 0 and "--restart" in output
    assert not trained
