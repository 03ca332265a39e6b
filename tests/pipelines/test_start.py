"""What `train.start_from` names: fetched, kept, refused, and taken by the stage `train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from train_stage import Stage

from cigpose.config import Config, load_params, load_preset
from cigpose.model.estimator import build_model
from cigpose.model.weights import WeightsError, save_weights
from pipelines import download, train
from pipelines.training import start


def other_model(stage: Stage, path: Path, seed: int = 3) -> Config:
    """Write a model of the stage's experiment, and give that."""
    stage.params()
    config = load_params(stage.folder / "params.yaml")
    torch.manual_seed(seed)
    save_weights(path, build_model(config).state_dict(), config)
    return config


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A project folder as the working directory; nothing here is trained, so that it has no shards."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return Stage(tmp_path / "project")


def said(capsys: pytest.CaptureFixture[str], command: Any, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = command(list(arguments))
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()[-1]


def test_a_model_is_kept_as_it_was_until_another_is_named_and_a_changed_one_is_refused(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    source = other_model(stage, mine / "model.safetensors")
    first = (mine / "model.safetensors").read_bytes()
    stage.params(train__start_from=str(mine))  # a folder, as data/model is
    with pytest.raises(FileNotFoundError, match=r"is not there, but train.start_from is .*`dvc repro pretrained`"):
        start.read_start(load_params())
    assert said(capsys, download.main, "pretrained") == (0, f"{start.FILE}: from {mine}")
    other_model(stage, mine / "model.safetensors", seed=4)
    stage.params(train__start_from=str(mine))
    found = start.read_start(load_params())
    assert found is not None and found.read() == first and found.config == source

    stage.params(train__start_from="elsewhere")
    with pytest.raises(FileNotFoundError, match=f"is from {mine}, but train.start_from is elsewhere"):
        start.read_start(load_params())
    assert said(capsys, download.main, "pretrained")[1].startswith(
        f"download: {stage.folder}/elsewhere: no such model."
    )
    stage.params(train__start_from=str(mine))
    start.FILE.write_bytes(first + b" ")
    code, sentence = said(capsys, train.main)
    assert code == 1 and sentence.startswith(f"train: {start.FILE}: sha256 is ") and "It has changed since" in sentence

    stage.params()
    assert said(capsys, download.main, "pretrained")[0] == 0
    assert not start.FILE.exists() and not start.FACTS.exists() and start.read_start(load_params()) is None
    start.FILE.write_bytes(b"the user's own")
    refused = said(capsys, download.main, "pretrained")
    assert refused == (1, f"download: {start.FILE}: a file of yours has the name of one of ours. Rename it.")
    assert start.FILE.read_bytes() == b"the user's own"


def test_an_official_model_comes_as_tensors_only_and_its_keypoints_are_known_by_its_name(
    stage: Stage, tmp_path: Path
) -> None:
    tensors = {"head.final_layer.bias": torch.arange(14.0), "head.gau.gamma": torch.ones(2, 16)}
    for name in ("cigpose-m_crowdpose_256x192.pth", "best.pth"):
        torch.save({"state_dict": tensors, "meta": {"epoch": 3}}, tmp_path / name)
        stage.params(train__start_from=str(tmp_path / name))
        assert download.main(["pretrained"]) == 0
        found = start.read_start(load_params())
        assert found is not None
        assert safetensors.torch.load(found.read()).keys() == tensors.keys()
        known = load_preset("cigpose-m_crowdpose_256x192") if name.startswith("cigpose") else None
        assert (found.config and found.config.keypoint_set) == (known and known.keypoint_set)


def test_an_address_gives_its_model_and_what_opens_it_is_kept_nowhere(
    stage: Stage, tmp_path: Path, host: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    other_model(stage, tmp_path / "m.safetensors")
    address = host.put("/m.safetensors", (tmp_path / "m.safetensors").read_bytes())
    stage.params(train__start_from=address.replace("://", "://me:S3CRET@") + "?sig=S3CRET")
    assert download.main(["pretrained"]) == 0
    found = start.read_start(load_params())
    assert found is not None and found.where == address
    host.put("/m.safetensors", b"<!doctype html><p>Sign in")
    assert download.main(["pretrained"]) == 1
    out, err = capfd.readouterr()
    assert f"download: {address}: not a safetensors file but a web page" in err
    assert "S3CRET" not in out + err + start.FACTS.read_text()
    kept = start.read_start(load_params())
    assert kept is not None and kept.sha256 == found.sha256


def test_before_anything_is_started_a_file_of_which_nothing_fits_is_one_sentence(stage: Stage, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(3, 3)}, tmp_path / "other.pth")
    stage.params(train__start_from=str(tmp_path / "other.pth"))
    assert download.main(["pretrained"]) == 0
    names = len(build_model(load_params()).state_dict())
    sentence = (
        f"train.start_from: nothing of {tmp_path}/other.pth fits quickstart: none of its 1 tensors has the name and "
        f"shape of one of the {names} here. Give a model of the same architecture and widths."
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(sentence)}$"):
        start.plan_start(load_params())
    stage.params(train__optimizer__learning_rate_factors={"bakbone": 0.1})
    with pytest.raises(ValueError, match=r"learning_rate_factors: the network has no part 'bakbone'. Did you mean 'ba"):
        start.plan_start(load_params())
