"""Files of weights: ours, OpenMMLab's, damaged ones and hostile ones."""

from __future__ import annotations

import collections
import json
import logging
import os
import pickle
import stat
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import cigpose
from cigpose.model import weights
from cigpose.model.estimator import build_model
from cigpose.model.weights import WeightsError


def perturbed(model):
    """A model whose every tensor differs from a fresh one, so that equality means something."""
    generator = torch.Generator().manual_seed(7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
        else:
            value.add_(3)
    return model


@pytest.fixture
def config(tiny_config):
    return tiny_config()


@pytest.fixture
def model(config):
    return perturbed(build_model(config))


def assert_equal_weights(model, state_dict):
    own = model.state_dict()
    for key, value in state_dict.items():
        assert torch.equal(own[key], value), key


# --- ours ---


def test_our_file_gives_back_weights_and_configuration(tmp_path, config, model):
    path = tmp_path / "model.safetensors"
    weights.save_weights(path, model.state_dict(), config, {"epoch": "12"})
    loaded = cigpose.load_checkpoint(path)
    assert_equal_weights(loaded, model.state_dict())
    assert not loaded.training
    assert loaded.config == config
    metadata = weights.read_metadata(path)
    assert metadata["epoch"] == "12"
    assert json.loads(metadata["config"])["name"] == config.name


def test_channels_last_and_half_precision_weights_are_saved_too(tmp_path, config, model):
    path = tmp_path / "model.safetensors"
    model = model.to(memory_format=torch.channels_last).bfloat16()
    weights.save_weights(path, model.state_dict(), config)
    assert_equal_weights(cigpose.load_checkpoint(path).bfloat16(), model.state_dict())


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, config, model, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.save_weights(path, model.state_dict(), config)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        weights.save_weights(path, build_model(config).state_dict(), config)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_usual_permissions(tmp_path, config, model):
    path, usual = tmp_path / "model.safetensors", tmp_path / "usual"
    weights.save_weights(path, model.state_dict(), config)
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_file_without_configuration_asks_for_one(tmp_path, model, config):
    path = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(WeightsError, match=r"bare.safetensors: holds no configuration"):
        cigpose.load_checkpoint(path)
    assert_equal_weights(cigpose.load_checkpoint(path, config), model.state_dict())


def test_a_configuration_of_another_version_is_refused_with_the_key(tmp_path, model, config):
    path = tmp_path / "odd.safetensors"
    values = config.to_mapping() | {"colour": "blue"}
    safetensors.torch.save_file(model.state_dict(), path, {"config": json.dumps(values)})
    with pytest.raises(WeightsError, match=r"odd.safetensors: its configuration cannot be used: colour: unknown key"):
        cigpose.load_checkpoint(path)


def test_weights_that_are_no_numbers_are_neither_saved_nor_loaded(tmp_path, config, model):
    path = tmp_path / "model.safetensors"
    weights.save_weights(path, model.state_dict(), config)
    whole = path.read_bytes()
    numbers = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    broken = {**model.state_dict(), **{key: torch.full_like(value, torch.nan) for key, value in numbers.items()}}
    with pytest.raises(WeightsError, match="tensors hold numbers that are not finite"):
        weights.save_weights(path, broken, config)
    assert path.read_bytes() == whole
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({key: value.contiguous() for key, value in broken.items()}, path, metadata)
    with pytest.raises(WeightsError, match=r"model.safetensors: \d+ of \d+ tensors hold numbers that are not finite"):
        cigpose.load_checkpoint(path)


def test_a_missing_file_says_so(tmp_path, config):
    for name in ("no.safetensors", "no.pth"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: not found"):
            cigpose.load_checkpoint(tmp_path / name, config)
        with pytest.raises(FileNotFoundError, match=rf"{name}: not found"):
            cigpose.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00garbage", b"<html>404</html>"], ids=len)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, config, content, suffix):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"damaged{suffix}: not a ") as caught:
        cigpose.load_checkpoint(path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "not a torch checkpoint but a web page"),
        (pickle.dumps({"weights": [1.0, 2.0]}), "not a torch checkpoint but a plain pickle"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.9.0", "not a torch checkpoint but an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not a torch checkpoint but a pointer of Git LFS"),
        (b"", "not a torch checkpoint but an empty file"),
    ],
    ids=["web page", "pickle", "onnx", "lfs", "empty"],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, config, content, kind):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    for given in (config, None):
        with pytest.raises(WeightsError, match=kind) as caught:
            cigpose.load_checkpoint(path, given)
        assert "weights_only" not in str(caught.value)


def test_what_torch_says_of_a_damaged_pickle_is_no_advice_to_run_it(tmp_path, config):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02\xff\xff")
        archive.writestr("model/version", b"3")
    with pytest.raises(WeightsError, match="not a readable torch checkpoint") as caught:
        cigpose.load_checkpoint(path, config)
    assert "weights_only" not in str(caught.value)


def test_a_safetensors_file_is_known_whatever_its_first_byte(tmp_path):
    for number in range(256):
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"x": torch.ones(1)}, path, {"note": "n" * number})
        assert weights.read_metadata(path)["note"] == "n" * number


def test_weights_that_are_not_numbers_are_refused(tmp_path, config, model):
    path = tmp_path / "model.safetensors"
    weights.save_weights(path, model.state_dict(), config)
    tensors = safetensors.torch.load_file(path)
    next(value for value in tensors.values() if value.is_floating_point()).view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, path, weights.read_metadata(path))
    complaint = r"model\.safetensors: 1 of \d+ tensors hold numbers that are not finite"
    with pytest.raises(WeightsError, match=complaint):
        cigpose.load_checkpoint(path)


# --- OpenMMLab's ---


@pytest.fixture
def openmmlab(monkeypatch):
    """Classes under the names that OpenMMLab's trainer pickles; gone again when the file is read."""

    class HistoryBuffer:
        def __init__(self, values):
            self._log_history = np.array(values)
            self._count_history = np.ones(len(values))
            self.max_length = 1000000
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            raise AssertionError

    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.__module__ = HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"

    def save(checkpoint, path, **options):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
            torch.save(checkpoint, path, **options)

    return types.SimpleNamespace(HistoryBuffer=HistoryBuffer, save=save)


def trainer_checkpoint(openmmlab, model):
    """What mmengine's runner writes with an EMAHook: averaged weights in `state_dict`, raw ones in the other."""
    averaged = collections.OrderedDict((key, value.clone()) for key, value in model.state_dict().items())
    averaged._metadata = collections.OrderedDict({"": {"version": 1}})
    raw = {f"module.{key}": torch.zeros_like(value) for key, value in averaged.items()}
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "meta": {
            "epoch": 420, "iter": 1000, "cfg": "model = dict(type='TopdownPoseEstimator')", "seed": np.int64(21),
            "dataset_meta": {"dataset_name": "coco_wholebody", "sigmas": np.full(133, 0.03, np.float32)},
            "hook_msgs": {"best_score": np.float64(0.599), "last_ckpt": "epoch_420.pth"},
        },
        "state_dict": averaged,
        "ema_state_dict": {"steps": torch.tensor(1000), **raw},
        "message_hub": {
            "log_scalars": collections.OrderedDict({"train/loss": openmmlab.HistoryBuffer([3.0, 2.0])}),
            "runtime_info": collections.OrderedDict(epoch=420, best=np.float32(0.5)),
            "resumed_keys": collections.OrderedDict({"train/loss": True}),
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"start_factor": 1e-5, "_last_lr": [0.002]}],
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_an_official_checkpoint_loads_with_its_averaged_weights(tmp_path, config, model, openmmlab, options):
    path = tmp_path / "best_coco-wholebody_AP_epoch_420.pth"
    checkpoint = trainer_checkpoint(openmmlab, model)
    openmmlab.save(checkpoint, path, **options)
    assert "mmengine" not in sys.modules
    loaded = cigpose.load_checkpoint(path, config)
    assert_equal_weights(loaded, checkpoint["state_dict"])
    assert not loaded.training


def test_nothing_of_the_bookkeeping_comes_alive(tmp_path, model, openmmlab):
    path = tmp_path / "official.pth"
    openmmlab.save(trainer_checkpoint(openmmlab, model), path)
    allowed = set(torch.serialization.get_safe_globals())
    content = weights._unpickle(path)
    assert set(torch.serialization.get_safe_globals()) == allowed, "the permission ends with the call"
    assert type(content["message_hub"]["log_scalars"]["train/loss"]) is weights._Inert
    assert type(content["meta"]["dataset_meta"]["sigmas"]) is weights._Inert
    assert content["message_hub"]["log_scalars"]["train/loss"].__dict__ == {}


def test_an_official_checkpoint_needs_a_configuration(tmp_path, model):
    path = tmp_path / "official.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(WeightsError, match=r"official.pth: a .pth carries no configuration of ours.*load_preset"):
        cigpose.load_checkpoint(path)


def test_a_bare_state_dict_with_a_data_parallel_prefix_loads(tmp_path, config, model):
    path = tmp_path / "bare.pth"
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)
    assert_equal_weights(cigpose.load_checkpoint(path, config), model.state_dict())


def test_dead_tensors_may_be_absent_and_are_named(tmp_path, config, model, caplog):
    state_dict = {k: v for k, v in model.state_dict().items() if not k.startswith(weights.DEAD_PREFIXES)}
    assert len(model.state_dict()) - len(state_dict) == 4
    path = tmp_path / "slim.pth"
    torch.save(state_dict, path)
    with caplog.at_level(logging.INFO, logger="cigpose"):
        loaded = cigpose.load_checkpoint(path, config)
    assert_equal_weights(loaded, state_dict)
    assert "without head.cls_x.weight, head.cls_y.weight, head.mlp.0.g, head.mlp.1.weight" in caplog.text


def test_everything_that_does_not_fit_is_listed(tmp_path, config, model):
    state_dict = dict(model.state_dict())
    del state_dict["head.gcn.bn_input.weight"], state_dict["head.initial_pred_x.bias"]
    state_dict["head.surprise"] = torch.zeros(3)
    state_dict["head.cls_gx.weight"] = torch.zeros(5, 32)
    path = tmp_path / "other.pth"
    torch.save(state_dict, path)
    with pytest.raises(WeightsError) as caught:
        cigpose.load_checkpoint(path, config)
    message = str(caught.value)
    assert f"{path}: not the weights of {config.name}." in message
    assert "2 missing: head.gcn.bn_input.weight, head.initial_pred_x.bias" in message
    assert "1 unexpected: head.surprise" in message
    assert "1 of another shape: head.cls_gx.weight (5, 32) for (128, 32)" in message


def test_weights_that_do_not_fit_change_nothing(tmp_path, config, model):
    fresh = build_model(config)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    state_dict = dict(model.state_dict()) | {"head.surprise": torch.zeros(3)}
    with pytest.raises(WeightsError):
        weights.load_weights(fresh, state_dict, "memory")
    assert_equal_weights(fresh, before)


def test_the_baseline_refuses_weights_of_the_whole_model(tmp_path, tiny_config, config, model):
    path = tmp_path / "cigpose.safetensors"
    weights.save_weights(path, model.state_dict(), config)
    with pytest.raises(WeightsError, match=r"unexpected: head.cim.canonical_features.weight.* more"):
        cigpose.load_checkpoint(path, tiny_config(model__head__kind="rtmpose"))


# --- hostile files ---


class RunsCode:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path, state_dict):
    """Name -> a file that would write `folder/pwned` when unpickled freely, and the global it should be refused for."""
    command = f"touch {folder}/pwned"
    attacks = {
        "system": (RunsCode(os.system, command), "posix.system"),
        "eval": (RunsCode(eval, f"open({str(folder / 'pwned')!r}, 'w')"), "eval"),
        "getattr": (RunsCode(RunsCode(getattr, os, "system"), command), None),
        "open": (RunsCode(open, str(folder / "pwned"), "w"), "open"),
    }
    for name, (attack, refused) in attacks.items():
        yield name, {"state_dict": state_dict, "meta": attack}, refused


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, config, model, legacy):
    count = 0
    for name, content, refused in hostile_files(tmp_path, model.state_dict()):
        path = tmp_path / f"{name}.pth"
        try:
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        except (TypeError, pickle.PicklingError):
            continue  # not picklable at all
        with pytest.raises(WeightsError, match=rf"{name}.pth: ") as caught:
            cigpose.load_checkpoint(path, config)
        assert not (tmp_path / "pwned").exists()
        if refused:
            assert refused in str(caught.value)
            assert "would run code" in str(caught.value)
        count += 1
    assert count >= 3


def handwritten_checkpoint(path: Path, opcodes: bytes):
    """A torch zip file around hand-made pickle opcodes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", opcodes)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(
            b"\x80\x02c__builtin__\ngetattr\ncposix\nsystem\nX\x04\x00\x00\x00nameq\x86R.", id="module by name"
        ),
        pytest.param(
            b"\x80\x02c__builtin__\ngetattr\nc__builtin__\ngetattr\nX\x0b\x00\x00\x00__globals__\x86R"
            b"X\x0a\x00\x00\x00touch pwned\x85R.",
            id="call of what getattr gave",
        ),
        pytest.param(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nX\x08\x00\x00\x00__init__\x85R}b.", id="numpy"),
    ],
)
def test_the_stand_ins_cannot_be_turned_into_anything(tmp_path, config, opcodes):
    path = tmp_path / "crafted.pth"
    handwritten_checkpoint(path, opcodes)
    with pytest.raises(WeightsError, match=r"crafted.pth: "):
        cigpose.load_checkpoint(path, config)


def test_arrays_in_place_of_tensors_are_refused(tmp_path, config, model):
    path = tmp_path / "arrays.pth"
    torch.save({key: value.numpy() for key, value in model.state_dict().items()}, path)
    with pytest.raises(WeightsError, match=r"arrays.pth: backbone.*more are not tensors"):
        cigpose.load_checkpoint(path, config)


@pytest.mark.parametrize("content", [[], {}, 3, {"state_dict": 3}, None], ids=str)
def test_a_file_without_a_mapping_of_tensors_is_refused(tmp_path, config, content):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"odd.pth: .*expected a mapping of names to tensors"):
        cigpose.load_checkpoint(path, config)


# --- backbones ---


def test_a_pretrained_backbone_loads_without_its_own_head(tmp_path, config, openmmlab):
    source = perturbed(build_model(config))
    path = tmp_path / "cspnext-m_udp-aic-coco_210e-256x192-f2f7d6f6_20230130.pth"  # not its digest: only a hint
    found = {key: value for key, value in source.state_dict().items() if key.startswith("backbone.")}
    history = openmmlab.HistoryBuffer([1.0])
    openmmlab.save({"state_dict": {**found, "head.deconv.weight": torch.zeros(3)}, "message_hub": history}, path)
    target = build_model(config)
    head = {key: value.clone() for key, value in target.state_dict().items() if key.startswith("head.")}
    weights.load_backbone(target, path)
    assert_equal_weights(target, found)
    assert_equal_weights(target, head)


def test_stages_that_are_not_built_are_left_out(tmp_path, tiny_config):
    whole = perturbed(build_model(tiny_config(model__backbone__out_stage=4)))
    short = build_model(tiny_config(model__backbone__out_stage=3))
    path = tmp_path / "backbone.pth"
    torch.save(whole.state_dict(), path)
    weights.load_backbone(short, path)
    assert torch.equal(short.backbone.stage3[0].conv.weight, whole.backbone.stage3[0].conv.weight)
    torch.save({k: v for k, v in whole.state_dict().items() if "stage2" not in k}, path)
    with pytest.raises(WeightsError, match=r"the backbone of quickstart. \d+ missing: backbone.stage2"):
        weights.load_backbone(short, path)


def test_a_backbone_of_another_width_is_refused(tmp_path, config, tiny_config):
    path = tmp_path / "backbone.pth"
    torch.save(build_model(tiny_config(model__backbone__widen_factor=0.25)).state_dict(), path)
    with pytest.raises(WeightsError, match=r"of another shape: backbone.stage1.*\(32,\) for \(16,\)"):
        weights.load_backbone(build_model(config), path)


def test_a_file_without_a_backbone_is_refused(tmp_path, config, model):
    path = tmp_path / "head.pth"
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("head.")}, path)
    with pytest.raises(WeightsError, match=r"head.pth: no tensor begins with 'backbone.', only with head"):
        weights.load_backbone(build_model(config), path)
