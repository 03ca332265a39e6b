"""Two Ray nodes on this machine, shards over HTTP; one node is lost on the way."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from train_stage import Stage

from cigpose.config import load_params
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights
from pipelines.training.start import keep_start
from pipelines.training.worker import explain

asked = pytest.mark.skipif(
    "CIGPOSE_TEST_CLUSTER" not in os.environ,
    reason="makes a Ray cluster on this machine, and kills a node of it, two minutes; set CIGPOSE_TEST_CLUSTER=1",
)
PARAMS = {"train": {"batch_total": 64, "accumulate_steps": 2, "cluster": {"num_workers": 4}}}


@pytest.mark.parametrize(
    "error, message",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "with 8 persons per forward pass: raise train.accumulate_steps"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory on"),
        (OSError(28, "No space left on device", "/data/x.tar"), "/data/x.tar"),
        (ValueError("shard 3: 5 persons, index.json says 6."), "shard 3: 5 persons"),
        (KeyError("a bug"), "KeyError in a worker"),
    ],
    ids=["GPU memory", "memory", "disk", "data", "bug"],
)
def test_what_would_fail_again_is_told_in_words(error: Exception, message: str) -> None:
    assert message in (explain(error, PARAMS) or "")


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection closed by peer [127.0.0.1]:1"), ConnectionResetError("peer")]
)
def test_what_the_death_of_a_peer_causes_is_tried_again(error: Exception) -> None:
    assert explain(error, PARAMS) is None


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture
def one_node() -> Iterator[Any]:
    """A cluster of one node with room for one worker."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def two_nodes(one_node: Any) -> tuple[Any, str]:
    """A cluster of two nodes with room for one worker each."""
    one_node.add_node(**NODE)
    return one_node, one_node.address


@pytest.fixture
def served(stage: Stage) -> Iterator[str]:
    """Address of the shards."""
    handler = functools.partial(Quiet, directory=str(stage.folder / "data/shards"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def token() -> dict[str, str]:
    """What a driver needs to be let in."""
    return {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]} if "RAY_AUTH_TOKEN" in os.environ else {}


@pytest.mark.slow
@asked
def test_a_training_waits_for_a_node_that_comes_late(stage: Stage, one_node: Any) -> None:
    shutil.rmtree(stage.folder / ".runs", ignore_errors=True)
    stage.params(train__epochs=1, train__cluster={"num_workers": 2, "use_gpu": False})
    process = stage.start(RAY_ADDRESS=one_node.address, **token())
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "waiting for nodes of the cluster" in line)
        assert "it has 1 CPUs and 0 GPUs, and 2 workers need 1 CPUs each" in said
        time.sleep(20)
        assert process.poll() is None and not stage.steps(), "it waits"
        one_node.add_node(**NODE)
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    assert json.loads((stage.folder / "data/model/run.json").read_text())["epochs"] == 1


@pytest.mark.slow
@asked
@pytest.mark.parametrize("min_workers", [1, None], ids=["on what is left", "when the node returns"])
def test_two_nodes_train_from_http_and_go_on_when_one_is_lost(
    stage: Stage,
    two_nodes: tuple[Any, str],
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    min_workers: int | None,
) -> None:
    cluster, address = two_nodes
    shutil.rmtree(stage.folder / ".runs", ignore_errors=True)
    monkeypatch.chdir(stage.folder)
    stage.params()
    first = tmp_path / "first.safetensors"
    save_weights(first, build_model(load_params()).state_dict(), load_params())
    keep_start("models:/first/1", first, "models:/first/1")  # only the driver has its file
    stage.params(
        train__start_from="models:/first/1",
        train__epochs=6,
        train__cluster={"num_workers": 2, "use_gpu": False, "min_workers": min_workers},
        train__checkpoint={"every_steps": 2, "every_minutes": None, "keep": 2},
        train__loader__cache=str(tmp_path / "cache"),
        data__locations={name: f"{served}/{name}" for name in ("rendered-train", "rendered-val")},
    )
    process = stage.start(RAY_ADDRESS=address, **token())
    stage.wait_for_step(process, 4)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    if min_workers is None:
        before = stage.steps()[-1]
        time.sleep(20)
        assert stage.steps()[-1] <= before + 2 and process.poll() is None  # it waits
        cluster.add_node(**NODE)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    assert "resumed at step" in output
    assert list((tmp_path / "cache").glob("*.tar"))
    run = json.loads((stage.folder / "data/model/run.json").read_text())
    assert run["epochs"] == 6
    weights = safetensors.torch.load_file(stage.folder / "data/model/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
