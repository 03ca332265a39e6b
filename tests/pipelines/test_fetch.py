from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cigpose.config import Config, config_from_mapping, load_params
from cigpose.config.params_file import write_params
from cigpose.deploy.predictor import Predictor
from cigpose.evaluate.calibration import Calibration
from cigpose.files.digest import sha256_of
from cigpose.model.weights import read_config
from pipelines import download, register
from pipelines.registry import fetch
from pipelines.registry.versions import RegistryError
from pipelines.training.start import read_start


@pytest.mark.slow  # registers a model, and fetches it in a process of its own
def test_the_champion_is_loaded_by_its_name_with_its_calibration(
    project: Path, trained, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(config, seed=1, whole_ap=0.5)
    weights = project / "data/model/model.safetensors"
    known = Calibration(tables={"all": ([0.0, 1.0], [0.1, 0.9])}, error=0.0, labels=1, models=(sha256_of(weights),))
    known.write(project / "data/report")
    register.register(config, project)
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "cache"))
    picture = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    named = Predictor.load("models:/cigpose-quickstart@champion", device="cpu")(picture)
    local = Predictor.load(weights, device="cpu")(picture)
    assert named.calibrated and local.calibrated
    assert np.array_equal(named.keypoints, local.keypoints) and np.array_equal(named.scores, local.scores)

    cached = list((project / "cache").rglob("model.safetensors"))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("fetched again"))
    values = {
        **config.to_mapping(),
        "train": {**config.to_mapping()["train"], "start_from": "models:/cigpose-quickstart"},
    }
    write_params(config_from_mapping(values), project / "params.yaml")
    assert download.main(["pretrained"]) == 0  # a training may start from it, whatever the alias means tomorrow
    start = read_start(load_params())
    assert start is not None and start.read() == weights.read_bytes()
    assert (start.where, start.config) == ("models:/cigpose-quickstart/1", read_config(weights))
    for address in ("models:/cigpose-quickstart", "models:/cigpose-quickstart/1"):
        assert [fetch.fetch_model(address)] == cached
    for address, sentence in {
        "models:/cigpose-quickstart@best": "cigpose-quickstart has no version best. The newest: 1; aliases: champion.",
        "models:/nobody/3": "nobody: no model of that name is registered",
        "models:/a/b/c": "expected models:/NAME@ALIAS or models:/NAME/VERSION",
    }.items():
        with pytest.raises(RegistryError, match=sentence):
            fetch.fetch_model(address)
