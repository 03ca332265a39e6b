from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cigpose.files import objects
from cigpose.files.errors import FetchError
from cigpose.files.objects import remove_object
from cigpose.train.checkpoints import CheckpointError, CheckpointStore


def state(value: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"weight": torch.full((3, 2), value)}, {"step": int(value)}


def stored(store: CheckpointStore) -> float | None:
    found = store.load_newest()
    return None if found is None else float(found[1]["weight"][0, 0])


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "run")
    request.getfixturevalue("s3").create_bucket(Bucket="training")
    return "s3://training/run"


def test_the_newest_of_the_kept_checkpoints_is_loaded(address: str) -> None:
    store = CheckpointStore(address, keep=2)
    assert store.load_newest() is None
    for step in (1, 2, 10):
        store.save(step, *state(step))
    assert store.names() == ["step-000000002", "step-000000010"]
    name, tensors, values = CheckpointStore(address).load_newest()
    assert (name, values["step"]) == ("step-000000010", 10)
    assert torch.equal(tensors["weight"], torch.full((3, 2), 10.0))


def test_what_a_killed_process_left_is_removed_and_what_it_had_moved_aside_is_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, *state(step))
    aside = tmp_path / ".step-000000002.abcdefgh.old"
    aside.mkdir()
    (tmp_path / "step-000000002").rename(aside / "step-000000002")
    for name in ("step-000000009", ".step-000000009.partial-abc"):  # half removed; half written
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    store.clear_halves()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]
    assert stored(store) == 2


def test_weights_that_a_training_killed_at_its_end_was_yet_to_remove_go_when_it_is_taken_up(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    best = store.save_weights(5, lambda path: path.write_bytes(b"best"))
    store.save(10, {}, {"weights": best})
    store.save_weights(10, lambda path: path.write_bytes(b"no better"))
    store.clear_halves()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", best]
    store.save_weights(12, lambda path: path.write_bytes(b"of nobody knows whom"))
    (tmp_path / "step-000000010" / "complete.json").write_text("{")
    store.clear_halves()
    assert len(list(tmp_path.glob("weights-*"))) == 2, "a damaged checkpoint may name them"


def test_half_a_checkpoint_on_s3_is_removed_and_the_others_stay(s3: Any) -> None:
    s3.create_bucket(Bucket="training")
    store = CheckpointStore("s3://training/run")
    store.save(3, *state(3))
    s3.put_object(Bucket="training", Key="run/step-000000009/state.json", Body=b"{}")
    store.clear_halves()
    assert stored(store) == 3
    assert not any("step-000000009/" in item["Key"] for item in s3.list_objects_v2(Bucket="training")["Contents"])


def test_tensors_of_any_layout_come_back_equal(address: str) -> None:
    store = CheckpointStore(address)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"image": image, "count": torch.tensor(3), "half": torch.randn(4).bfloat16(), "row": torch.arange(6)[::2]}
    store.save(1, tensors, {})
    loaded = store.load("step-000000001")[0]
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, *state(1))
    for step, missing in ((2, "complete.json"), (3, None)):
        store.save(step, *state(step))
        if missing:
            (tmp_path / f"step-{step:09d}" / missing).unlink()
        else:  # cut short after it was complete
            file = tmp_path / f"step-{step:09d}" / "state.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / ".step-000000009.partial-abc").mkdir()
    assert store.names() == ["step-000000001"]
    assert stored(store) == 1


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, *state(1))
    store.save(2, *state(2))
    file = tmp_path / "step-000000002" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="step-000000002 is damaged"):
        assert stored(store) == 1


def test_when_all_are_damaged_nothing_starts_anew_by_itself(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, *state(1))
    file = tmp_path / "step-000000001" / "state.json"
    file.write_text(file.read_text().replace("1", "2"))
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="--restart"):
        store.load_newest()


def test_a_manifest_without_its_tensors_starts_nothing_anew_by_itself(address: str) -> None:
    store = CheckpointStore(address, keep=3)
    store.save(1, *state(1))
    store.save(2, *state(2))
    remove_object(f"{address}/step-000000002/state.safetensors")
    with pytest.warns(UserWarning, match="step-000000002: state.safetensors is missing"):
        assert stored(store) == 1
    remove_object(f"{address}/step-000000001/state.safetensors")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"is missing, though.*--restart begins anew"):
        store.load_newest()
    store.clear()
    assert store.load_newest() is None


def test_weights_stay_as_long_as_a_kept_checkpoint_names_them(address: str, tmp_path: Path) -> None:
    store = CheckpointStore(address, keep=1)

    def write(value: float) -> Any:
        return lambda path: safetensors.torch.save_file({"weight": torch.tensor([value])}, path)

    first = store.save_weights(1, write(1.0))
    store.save(1, state(1)[0], {"weights": first})
    store.save(2, state(2)[0], {"weights": first})
    store.fetch(first, tmp_path / "out" / "model.safetensors")
    assert safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["weight"].item() == 1.0
    second = store.save_weights(3, write(3.0))
    store.save(3, state(3)[0], {"weights": second})
    with pytest.raises(FileNotFoundError):
        store.fetch(first, tmp_path / "gone")
    store.fetch(second, tmp_path / "out" / "model.safetensors")
    assert safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["weight"].item() == 3.0


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, *state(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(CheckpointError, match=r"disk is full.*make room"):
            store.save(2, *state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert stored(store) == 1


def test_clearing_takes_only_what_the_store_made(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, *state(1))
    store.save_weights(1, lambda path: path.write_bytes(b"x"))
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "mine.txt").write_text("keep")
    store.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "step-notes"]


def test_the_same_step_can_be_written_again(address: str) -> None:
    store = CheckpointStore(address)
    store.save(1, *state(1))
    store.save(1, {"weight": torch.full((3, 2), 7.0)}, {})
    assert stored(store) == 7


def test_the_state_is_plain_json_and_safetensors(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(4, *state(4))
    folder = tmp_path / "step-000000004"
    assert sorted(file.name for file in folder.iterdir()) == ["complete.json", "state.json", "state.safetensors"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 4}


def test_an_object_store_keeps_checkpoints(s3: Any) -> None:
    s3.create_bucket(Bucket="training")
    store = CheckpointStore("s3://training/runs/a", keep=1)
    assert store.load_newest() is None
    store.save(1, *state(1))
    store.save(2, *state(2))
    assert store.names() == ["step-000000002"]
    assert stored(CheckpointStore("s3://training/runs/a")) == 2
    store.clear()
    assert store.names() == []


@pytest.mark.usefixtures("fast_retries")
def test_a_server_that_is_down_is_not_a_training_that_has_not_begun(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.create_bucket(Bucket="training")
    store = CheckpointStore("s3://training/runs/a")
    store.save(1, *state(1))
    monkeypatch.setattr(CheckpointStore, "_manifest", lambda *_: objects.read_object("http://127.0.0.1:9/x", 9))
    with pytest.raises(FetchError, match="not reached"):
        store.load_newest()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/runs", "gs://training/runs", "memory://runs"])
def test_an_address_where_nothing_can_be_written_is_refused_at_once(address: str) -> None:
    with pytest.raises(CheckpointError, match=rf"train\.checkpoint\.address: {address}: .* or s3://bucket/path"):
        CheckpointStore(address)


def test_a_bucket_that_is_not_there_is_named_before_anything_is_trained(s3: Any) -> None:
    with pytest.raises(FetchError, match=r"s3://nowhere/runs: the server says NO_SUCH_BUCKET"):
        CheckpointStore("s3://nowhere/runs").names()
