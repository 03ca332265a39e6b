"""What goes on beside the training: scores that come late, checkpoints that a thread writes, and kills in between."""

from __future__ import annotations

import errno
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from recorded import KilledError, Recorder, deterministic, final_state, place

from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.labels import dataset_truth, open_shards
from cigpose.evaluate.predict import predict
from cigpose.train import loop, scoring, validation, workers
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.loop import train
from cigpose.train.snapshots import Snapshot


@pytest.fixture
def late_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score comes only when it is waited for."""
    monkeypatch.setattr(scoring.Scorer, "is_done", property(lambda _: False))


def test_a_score_of_another_process_is_that_of_this_one_to_the_last_bit(
    tiny_config: Any, shards: Path, whole_run: Any
) -> None:
    config = tiny_config().for_validation()
    truth = dataset_truth(open_shards(config, config.data.val, shards), config)
    _, recorder, _ = whole_run
    for record, predictions in zip(recorder.validations, recorder.predictions, strict=True):
        expected = evaluate_predictions(predictions, truth, config.keypoint_set, config.evaluate)
        assert {name: record[name] for name in expected} == expected
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("late_scores")
def test_what_comes_of_a_training_does_not_depend_on_when_scores_come(
    tiny_config: Any, shards: Path, tmp_path: Path, whole_run: Any
) -> None:
    config, recorder = tiny_config(), Recorder()
    result = train(config, place(config, shards, tmp_path), recorder)
    first = recorder.validations[0]
    later = next(record["step"] for record in recorder.logs if record["step"] > first["step"])
    assert recorder.told.index(f"log {later}") < recorder.told.index(f"validation {first['step']}")
    assert {key: result[key] for key in ("best", "weights")} == {key: whole_run[2][key] for key in ("best", "weights")}
    assert deterministic(result["history"]) == deterministic(whole_run[2]["history"])
    assert deterministic(final_state(tmp_path)[1]["history"]) == deterministic(whole_run[2]["history"])
    assert final_state(tmp_path)[1]["unscored"] is None


@pytest.mark.parametrize("killed_at", [6, 8], ids=["right after", "a checkpoint later"])
def test_a_kill_between_predictions_and_their_score_loses_nothing(
    tiny_config: Any, shards: Path, tmp_path: Path, whole_run: Any, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    config = tiny_config(train__checkpoint={"every_steps": 3, "every_minutes": None, "keep": 1})
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(scoring.Scorer, "is_done", property(lambda _: False))
        train(config, place(config, shards, tmp_path), Recorder(killed_at))
    values = final_state(tmp_path)[1]
    first = whole_run[1].validations[0]
    assert values["unscored"]["step"] == first["step"] <= values["step"]
    assert not [record for record in values["history"] if record["kind"] == "validation"]
    torch.rand(5)  # generators stand elsewhere in the new process
    recorder = Recorder()
    result = train(config, place(config, shards, tmp_path), recorder)
    assert deterministic(recorder.validations) == deterministic(whole_run[1].validations)
    assert deterministic(result["history"]) == deterministic(whole_run[2]["history"])
    assert result["best"] == whole_run[2]["best"]
    ours, theirs = final_state(tmp_path), final_state(whole_run[0])
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])
    assert ours[1]["random"] == theirs[1]["random"]
    best = [safetensors.torch.load_file(f / "checkpoints" / result["weights"]) for f in (tmp_path, whole_run[0])]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[1])


def test_weights_without_a_score_that_are_gone_are_named(tiny_config: Any, shards: Path, tmp_path: Path) -> None:
    config = tiny_config()
    store = place(config, shards, tmp_path).store
    state = loop._Training(config, place(config, shards, tmp_path), Recorder()).state
    state.unscored = {"epoch": 1, "step": 5, "weights": "weights-000000005.safetensors"}
    tensors, values = state.state_dict()
    store.save(5, tensors, {**values, "params": place(config, shards, tmp_path).params, "random": []})
    with pytest.raises(CheckpointError, match=r"weights-000000005.safetensors: these weights, .*--restart begins anew"):
        train(config, place(config, shards, tmp_path), Recorder())


def test_steps_go_on_while_a_checkpoint_is_written(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: Any
) -> None:
    save, has_gone_on = CheckpointStore.save, threading.Event()

    def slow_save(store: CheckpointStore, step: int, *arguments: Any) -> str:
        assert step > 3 or has_gone_on.wait(60), "training waits for its checkpoint"
        return save(store, step, *arguments)

    class Witness(Recorder):
        def on_log(self, record: dict[str, Any]) -> None:
            super().on_log(record)
            if record["step"] > 3:
                has_gone_on.set()

    monkeypatch.setattr(CheckpointStore, "save", slow_save)
    config = tiny_config()
    result = train(config, place(config, shards, tmp_path), Witness())
    assert result["best"] == whole_run[2]["best"]
    assert final_state(tmp_path)[0].keys() == final_state(whole_run[0])[0].keys()


def test_a_full_disk_stops_the_training_with_its_sentence(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    config, recorder = tiny_config(), Recorder()
    with pytest.raises(CheckpointError, match=r"the disk is full, checkpoint step-000000003 was not written"):
        train(config, place(config, shards, tmp_path), recorder)
    assert recorder.checkpoints == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cigpose")]


def test_a_snapshot_is_of_the_moment_it_was_taken_and_keeps_its_memory() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"image": image, "count": torch.tensor(3), "half": torch.randn(4).bfloat16()}
    snapshot = Snapshot()
    for _ in range(2):
        snapshot.take(tensors)
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.add_(1)
        kept = snapshot.read()
        assert all(torch.equal(kept[key], before[key]) for key in tensors)
    addresses = [tensor.data_ptr() for tensor in kept.values()]
    snapshot.take(tensors)
    assert [tensor.data_ptr() for tensor in snapshot.read().values()] == addresses


def test_only_rank_0_reads_the_checkpoint(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: Any
) -> None:
    name, tensors, values = CheckpointStore(whole_run[0] / "checkpoints").load_newest()
    config = tiny_config()
    monkeypatch.setattr(workers, "from_rank_0", lambda value: value or (name, values))
    monkeypatch.setattr(workers, "tensors_from_rank_0", lambda value: value or tensors)
    other = place(config, shards, tmp_path)  # where there is no checkpoint
    object.__setattr__(other, "rank", 1)
    object.__setattr__(other, "world", 2)
    training = loop._Training(config, other, Recorder())
    assert training.resumed and training.state.step == values["step"]
    weights = training.state.model.state_dict()
    assert all(torch.equal(weights[key], tensors[f"model.{key}"]) for key in weights)


def test_validations_compute_as_the_training_does_and_in_batches_as_large(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(model: torch.nn.Module, loader: Any, *arguments: Any, **options: Any) -> Any:
        hook = model.backbone.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        assert loader.epoch.plan.batch_sizes.max() <= 8 < config.evaluate.batch
        try:
            return predict(model, loader, *arguments, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(validation, "predict", watched)
    config = tiny_config(train__epochs=1, train__precision="bf16")
    recorder = Recorder()
    train(config, place(config, shards, tmp_path), recorder)
    assert set(seen) == {torch.bfloat16}
    assert recorder.predictions[0].keypoint_scores.any()
    wide = tiny_config(train__batch_total=256)
    assert (wide.for_validation().evaluate.batch, config.for_validation().evaluate.batch) == (256, 32)
