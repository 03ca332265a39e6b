"""A cluster whose nodes have nothing but the package, and some of which are not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import torch
from recorded import Recorder
from tiny_training import make_config

from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError
from cigpose.model.estimator import build_model
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset
from cigpose.train.checkpoints import CheckpointStore
from cigpose.train.loop import train
from cigpose.train.place import Place, StartingModel
from cigpose.train.state import influential_params
from pipelines.training import cluster, driver, worker
from pipelines.training.cluster import TrainingError
from pipelines.training.start import FILE
from pipelines.training.worker import explain


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, float]], list[Any]]:
    """What a joined cluster has at each look, the last of which stays; and what the autoscaler was asked for."""
    there: list[dict[str, float]] = []
    asked: list[Any] = []
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray, "cluster_resources", lambda: there[0] if len(there) == 1 else there.pop(0))
    monkeypatch.setattr(cluster.autoscaler, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster, "LOOKS_EVERY_S", 0)
    return there, asked


def config_of(**changes: Any) -> Any:
    return make_config(train__cluster={"num_workers": 2, "threads_per_worker": 4, **changes}).train.cluster


def test_gpus_that_are_not_there_yet_are_asked_for_and_waited_for(
    growing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    there, asked = growing
    there += [{"CPU": 2}] * 4 + [{"CPU": 10, "GPU": 1}] * 2 + [{"CPU": 18, "GPU": 2}]
    assert cluster.find_resources(config_of(use_gpu=True)) is True
    assert asked == [[{"CPU": 4, "GPU": 1}] * 2, []], "and asked for no longer when the workers begin"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert (
        "waiting for nodes of the cluster, 60 min at most: it has 2 CPUs and 0 GPUs, and 2 workers need a GPU" in said
    )


def test_nodes_that_do_not_come_are_not_waited_for_for_ever(growing: Any) -> None:
    there, asked = growing
    there.append({"CPU": 2})
    minutes = iter(range(100))
    with pytest.raises(TrainingError, match=r"2 workers with a GPU each.*2 CPUs and 0 GPUs.*\(5 min: train\.cluster"):
        cluster.find_resources(config_of(use_gpu=True, wait_minutes=5), clock=lambda: 60.0 * next(minutes))
    assert next(minutes) == 7 and asked[-1] == []


def test_this_machine_alone_is_not_waited_for(growing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there, asked = growing
    monkeypatch.delenv("RAY_ADDRESS")
    there.append({"CPU": 2})
    with pytest.raises(TrainingError, match="a GPU each"):
        cluster.find_resources(config_of(use_gpu=True))
    assert not asked


def test_interfaces_and_credentials_reach_the_nodes_and_the_token_does_not() -> None:
    environment = {
        "NCCL_SOCKET_IFNAME": "ens5",
        "GLOO_SOCKET_IFNAME": "ens5",
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_SECRET_ACCESS_KEY": "s",
        "RAY_AUTH_TOKEN": "t",
        "MLFLOW_TRACKING_PASSWORD": "p",
        "PATH": "/bin",
    }
    assert cluster.passed_on(environment) == {
        name: value for name, value in environment.items() if name.startswith(("NCCL", "GLOO", "AWS"))
    }


def test_a_node_that_sees_another_folder_of_checkpoints_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with cluster.marked(str(tmp_path / "run/checkpoints")) as marker:
        cluster.refuse_other_folder(marker)
        elsewhere = str(tmp_path / "other/checkpoints" / Path(str(marker)).name)
        with pytest.raises(
            TrainingError, match=r"not the folder that the driver sees. Set train.checkpoint.address to"
        ) as caught:
            cluster.refuse_other_folder(elsewhere)
        assert explain(caught.value, {"train": {}}) == str(caught.value), "tried again it would fail alike"
    assert not any((tmp_path / "run/checkpoints").iterdir())
    with cluster.marked("s3://bucket/run") as marker:
        cluster.refuse_other_folder(marker)


def test_a_node_without_the_drivers_files_gets_the_network_to_start_from_by_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "put", lambda content: ("kept by Ray", content))
    monkeypatch.setattr(ray, "get", lambda reference: reference[1])
    content, config = b"weights", make_config()
    start = StartingModel(read=lambda: content, config=config, where="models:/first/1", sha256="0" * 64)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    received = worker._received(driver._sent(start), tmp_path)
    assert received is not None and received.read() == content
    assert (received.config, received.where, received.sha256) == (config, start.where, start.sha256)
    monkeypatch.delenv("RAY_ADDRESS")  # this machine alone has the file, and Ray's memory is small
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_bytes(b"the file")
    sent = driver._sent(start)
    received = worker._received(sent, tmp_path)
    assert sent is not None and sent["content"] is None
    assert received is not None and received.read() == b"the file"
    assert worker._received(driver._sent(None), tmp_path) is None


def test_what_a_killed_driver_marked_its_folder_with_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".driver-0badcafe").touch()
    with cluster.marked(str(tmp_path)) as marker:
        assert [str(path) for path in tmp_path.iterdir()] == [marker]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_node_with_nothing_but_addresses_trains(tmp_path: Path, s3: Any) -> None:
    s3.create_bucket(Bucket="people")
    own = tmp_path / "driver"
    for name in ("rendered-train", "rendered-val"):
        config = make_config(**{f"data__render__{name}__num_images": 6})
        render_dataset(config.data.render[name], own / "raw" / name)
        write_dataset(config, name, own / "raw", own / "shards")
    torch.manual_seed(5)
    weights = build_model(make_config()).state_dict()
    first = {key: tensor for key, tensor in weights.items() if key.startswith("backbone.")}
    torch.save({"state_dict": first}, own / "first.pth")
    for file in filter(Path.is_file, own.rglob("*")):
        s3.upload_file(str(file), "people", str(file.relative_to(own)))
    config = make_config(
        train__epochs=1,
        train__loader__cache=str(tmp_path / "cache"),
        data__locations={name: f"s3://people/shards/{name}" for name in ("rendered-train", "rendered-val")},
        model__backbone__pretrained="s3://people/first.pth",
    )
    nowhere = tmp_path / "not" / "there"
    place = Place(
        rank=0,
        world=1,
        device=torch.device("cpu"),
        shards=nowhere / "data/shards",
        root=nowhere,
        store=CheckpointStore("s3://people/run"),
        params=influential_params(config, {}, sha256_of(own / "first.pth")),
    )
    result = train(config, place, Recorder())
    place.store.fetch(result["weights"], tmp_path / "best.safetensors")
    found = safetensors.torch.load_file(tmp_path / "best.safetensors")
    assert found.keys() == weights.keys() and not nowhere.exists()
    torch.save({"state_dict": {key: tensor + 1 for key, tensor in first.items()}}, own / "other.pth")
    s3.upload_file(str(own / "other.pth"), "people", "first.pth")
    place.store.clear()
    with pytest.raises(
        DataError, match=r"s3://people/first\.pth: sha256 is .*, the weights that `dvc repro pretrained`"
    ):
        train(config, place, Recorder())
