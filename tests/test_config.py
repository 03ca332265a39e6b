from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from paper_presets import PRESETS

from cigpose.config import Config, config_from_mapping, load_params, load_preset, params_file, preset_text, presets
from cigpose.config.params_file import params_text, replace_params, write_params
from cigpose.config.schema import ConfigError
from cigpose.files.atomic import claimed


def quickstart() -> dict[str, Any]:
    return copy.deepcopy(load_preset("quickstart").to_mapping())


def change(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    section = values
    for key in parents:
        section = section[key]
    section[last] = value
    return values


def test_the_fourteen_models_the_baselines_and_the_quickstart_are_there() -> None:
    baselines = {f"rtmpose-{size}_coco-wholebody_{crop}" for size, crop in
                 (("m", "256x192"), ("l", "256x192"), ("l", "384x288"), ("x", "384x288"))}  # fmt: skip
    assert set(presets()) == set(PRESETS.values()) | baselines | {"quickstart"}


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_named_as_its_file_and_its_crop(name: str) -> None:
    config = load_preset(name)
    assert config.name == name
    if name != "quickstart":
        width, height = config.model.input_size
        assert name.endswith(f"_{height}x{width}")


@pytest.mark.parametrize("name", presets())
def test_what_use_writes_reads_back_as_the_preset(name: str, tmp_path: Path) -> None:
    config = load_preset(name)
    write_params(config, tmp_path / "params.yaml")
    assert load_params(tmp_path / "params.yaml") == config
    assert config_from_mapping(config.to_mapping()) == config
    assert config_from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


def test_transforms_of_the_user_are_written_to_params_yaml_and_read_again(tmp_path: Path) -> None:
    values = quickstart()
    entries = [{"Blur": None}, {"OneOf": {"transforms": [{"ToGray": {"p": 1}}, {"Rotate": {"limit": [-5, 5]}}]}}] * 3
    values["augmentation"]["stage2"]["extra"] = entries
    config = config_from_mapping(values)
    write_params(config, tmp_path / "params.yaml")
    assert load_params(tmp_path / "params.yaml") == config
    assert load_params(tmp_path / "params.yaml").to_mapping()["augmentation"]["stage2"]["extra"] == entries


@pytest.mark.parametrize("name", presets())
def test_what_use_writes_is_complete_and_fits_the_page(name: str) -> None:
    text = params_text(load_preset(name))
    assert yaml.safe_load(text) == load_preset(name).to_mapping()
    assert max(map(len, text.splitlines())) <= 120
    assert max(map(len, preset_text(name).splitlines())) <= 120


def test_the_committed_params_are_the_quickstart(root: Path) -> None:
    assert (root / "params.yaml").read_text() == params_text(load_preset("quickstart"))


@pytest.mark.parametrize("name", presets())
def test_a_preset_measures_its_epochs_as_its_model_as_the_original_does(name: str) -> None:
    config = load_preset(name)
    epochs = config.for_validation()
    assert epochs.evaluate.batch >= config.evaluate.batch  # a training worker's share, which changes no figure
    assert replace(epochs, evaluate=replace(epochs.evaluate, batch=config.evaluate.batch)) == config


def test_params_of_before_train_validation_had_their_epochs_measured_by_evaluate() -> None:
    values = load_preset("cigpose-l_crowdpose_256x192").to_mapping()
    del values["train"]["validation"]
    assert config_from_mapping(values) == load_preset("cigpose-l_crowdpose_256x192")
    values["evaluate"]["flip"] = True
    with pytest.raises(ConfigError, match=r"^evaluate\.flip: unknown key"):
        config_from_mapping(values)


@pytest.mark.parametrize("upstream", sorted(PRESETS))
def test_a_paper_preset_holds_every_number_of_the_original(upstream: str, golden: Path) -> None:
    zoo = {entry["config"]: entry for entry in json.loads((golden / "zoo.json").read_text())}
    entry, config = zoo[upstream], load_preset(PRESETS[upstream])
    model, train, head = config.model, config.train, entry["head"]
    assert list(model.input_size) == entry["input_size_wh"]
    assert len(config.keypoint_set) == entry["num_keypoints"]
    assert len(config.keypoint_set.edges) == head["num_edges_undirected"]
    assert len(config.keypoint_set.groups) == head["num_groups"]
    for name in ("widen_factor", "deepen_factor", "expand_ratio", "pretrained"):
        assert getattr(model.backbone, name) == entry["backbone"][name]
    assert (model.head.hidden, model.head.gau_s) == (head["gau"]["hidden_dims"], head["gau"]["s"])
    assert model.head.gau_expansion == head["gau"]["expansion_factor"]
    assert model.head.final_kernel_size == head["final_layer_kernel_size"]
    assert model.hgnn.num_layers == head["hgnn"]["num_layers"]
    assert (model.causal.train_top_k, model.causal.eval_top_k) == (head["cim"]["k_train"], head["cim"]["k_val"])
    assert model.causal.counterfactual_weight == head["loss_cf"]["loss_weight"]
    assert model.loss_beta == head["loss_kpt"]["beta"]
    assert list(model.simcc.sigma) == entry["codec"]["sigma"]
    assert model.simcc.split_ratio == entry["codec"]["simcc_split_ratio"]
    recipe = entry["train"]
    assert (train.epochs, config.seed) == (recipe["max_epochs"], recipe["seed"])
    assert train.loss_batch == train.batch_per_worker == recipe["batch_size_per_gpu"]
    assert train.resolved_learning_rate == recipe["base_lr"]
    assert train.optimizer.weight_decay == recipe["optimizer"]["weight_decay"]
    assert train.optimizer.clip_grad_norm == (recipe["clip_grad"] or {}).get("max_norm")
    assert train.schedule.warmup_steps == recipe["schedule"][0]["end"]
    assert train.schedule.warmup_start_factor == recipe["schedule"][0]["start_factor"]
    assert len(train.schedule.cosines) == len(recipe["schedule"]) - 1
    for ours, theirs in zip(train.schedule.cosines, recipe["schedule"][1:], strict=True):
        assert (ours.begin_epoch, ours.end_epoch) == (theirs["begin"], theirs["end"])
        assert ours.final_factor * recipe["base_lr"] == pytest.approx(theirs["eta_min"])
    assert (train.ema.momentum, train.ema.gamma) == (recipe["ema"]["momentum"], recipe["ema"]["gamma_default"])
    assert train.validate_every_epochs == recipe["val_interval"]
    assert config.evaluate.batch == recipe["val_batch_size"]
    assert config.evaluate.flip_test is entry["test_cfg"]["flip_test"]
    assert (config.evaluate.boxes == "detections") is bool(entry["data"]["val_bbox_file"])
    assert config.augmentation.stage2_from_epoch == recipe["stage2_switch_epoch"]
    for stage, theirs in (("stage1", "augmentation_stage1"), ("stage2", "augmentation_stage2")):
        mine, other = getattr(config.augmentation, stage), entry[theirs]
        blur, median, dropout = other["albumentation"]
        box, hsv = other["bbox_transform"], other["hsv"]
        assert mine.flip_prob == other["flip"]["prob"]
        assert mine.half_body_prob == other["half_body"]["prob"]
        assert (mine.shift_factor, mine.shift_prob) == (box["shift_factor"], box["shift_prob"])
        assert (list(mine.scale_range), mine.scale_prob) == (box["scale_factor"], box["scale_prob"])
        assert (mine.rotate_degrees, mine.rotate_prob) == (box["rotate_factor"], box["rotate_prob"])
        assert list(mine.hsv_delta) == [hsv["hue_delta"], hsv["saturation_delta"], hsv["value_delta"]]
        assert (mine.blur_prob, mine.median_blur_prob, mine.dropout_prob) == (blur["p"], median["p"], dropout["p"])
        assert list(mine.dropout_size) == [dropout["min_height"], dropout["max_height"]]
    readme = entry["upstream_readme"]
    assert config.published is not None
    assert config.published.ap == readme.get("whole_ap", readme.get("ap"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.epochs", "many", "train.epochs: expected int, got 'many'"),
        ("train.epochs", True, "train.epochs: expected int, got True"),
        ("train.epoch", 3, "train.epoch: unknown key. Did you mean 'epochs'"),
        ("model.input_size", [192], r"model.input_size: expected 2 values, got 1"),
        ("model.input_size", [190, 256], r"model.input_size must be multiples of \d+"),
        ("model.input_size", 192, r"model.input_size: expected a list, got 192"),
        ("model.head.kind", "hrnet", "model.head.kind: 'hrnet' is not one of 'cigpose', 'rtmpose'"),
        ("model.causal.train_top_k", -1, "model.causal.train_top_k must be 0 or more, got -1"),
        ("model.causal.train_top_k", 134, "model.causal.train_top_k: 134 of only 133 keypoints"),
        ("keypoints", "halpe", "'halpe' is not one of"),
        ("train.batch_total", 15, "batch_total must be a multiple of 2"),
        ("data.train", [], "train: name at least one dataset"),
        ("data.val", "nothing", "dataset 'nothing' is neither in datasets nor in locations"),
        ("data.render.rendered-val.occlusion", 1.5, "data.render.rendered-val.occlusion must be between 0 and 1"),
        ("data.render.rendered-val.image_size", [10, 10], "at least 64 x 64"),
        ("data", 3, "data: expected a mapping, got 3"),
        ("train.cluster.use_gpu", "never", "train.cluster.use_gpu"),
        ("evaluate.metric", "whole/PCK", "evaluate.metric: 'whole/PCK' is not among .*whole/AP, .*hand/AR"),
        ("evaluate.metric", "body/ap", "Did you mean 'body/AP'"),
        ("keypoints", "coco", "evaluate.metric: 'whole/AP' is not among what the evaluation of 'coco' gives"),
        ("keypoints", {"name": "mine", "names": 3, "sigmas": [1.0]}, "keypoints: not a table of keypoints"),
        ("model.backbone.out_stage", 7, "out_stage must be 2, 3 or 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_named_with_its_path(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(change(quickstart(), path, value))


HOSTILE = [
    "x$(touch f)",
    "x`touch f`",
    "x'y",
    "a b",
    "x;y",
    "../x",
    "/x",
    "..",
    ".",
    "",
    "x\n",
    "x\u0000",
    "\u00e9",
    "x.y",
]


@pytest.mark.parametrize("table", ["render", "datasets", "download.sources", "locations"])
@pytest.mark.parametrize("key", HOSTILE, ids=ascii)
def test_a_key_that_becomes_a_folder_or_a_stage_is_plain(table: str, key: str) -> None:
    values = quickstart()
    section = values["data"]
    for part in table.split("."):
        section = section[part]
    empty = {"download.sources": [], "locations": "s3://people/shards"}
    section[key] = next(iter(section.values())) if section else empty[table]
    with pytest.raises(ConfigError) as error:
        config_from_mapping(values)
    text = f"data.{table}: {key!r} cannot be used as a key. Expected letters, digits, `_` and `-` only."
    assert str(error.value) == text


PATHS = ["../x", "a/../../x", "/etc/x", "..", "a.zip:../x", "a/..", "", "x\ny", "x\u0000"]


@pytest.mark.parametrize("field", ["raw", "images", "annotations", "detections", "split_file"])
@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_what_a_dataset_reads_lies_below_its_folder(field: str, path: str) -> None:
    where = f"data.datasets.rendered-val.{field}"
    with pytest.raises(ConfigError) as error:
        config_from_mapping(change(quickstart(), where, path))
    assert str(error.value) == f"{where}: {path!r} cannot be used as a path. Expected a relative path without `..` and line breaks."  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model.backbone.pretrained",
            "../../x.pth",
            "model.backbone.pretrained: '../../x.pth' cannot be used as a path",
        ),
        ("data.download.drive_ids", {"../x": "1"}, "data.download.drive_ids: '../x' cannot be used as a path"),
        ("data.download.sources.pretrained", ["/x"], "data.download.sources.pretrained: '/x' cannot be used as a path"),
        *(
            ("name", name, f"name: {name!r} cannot be used as a name")
            for name in ("../../x", "/x", "a/b", "..", ".x", "")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_cannot_lead_out_of_the_project(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_mapping(change(quickstart(), path, value))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "rtmpose-m_v1.2"),
        ("data.datasets.rendered-val.raw", "mine/2026 spring"),
        ("data.datasets.rendered-val.raw", "."),
        ("data.datasets.rendered-val.images", "photos/first..last (1)"),
        ("data.datasets.rendered-val.annotations", "labels.zip:annotations/val.json"),
        ("model.backbone.pretrained", "body/cspnext-m.pth"),
        ("data.locations", {"rendered-val": "s3://people/../shards"}),
    ],
)
def test_a_relative_path_may_have_folders_spaces_and_dots(path: str, value: Any) -> None:
    config_from_mapping(change(quickstart(), path, value))


def test_a_missing_key_is_named_with_its_path() -> None:
    values = quickstart()
    del values["train"]["loss_batch"]
    with pytest.raises(ConfigError, match=r"train\.loss_batch: missing"):
        config_from_mapping(values)


def test_a_number_written_with_an_exponent_is_a_number() -> None:
    config = config_from_mapping(change(quickstart(), "train.optimizer.learning_rate", "1e-3"))
    assert config.train.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", 0.0012), ("linear", 0.0048), ("sqrt", 0.0024)], ids=["none", "linear", "sqrt"]
)
def test_the_learning_rate_follows_the_total_batch_by_its_named_rule(rule: str, expected: float) -> None:
    values = change(quickstart(), "train.optimizer", {"learning_rate": 0.0012, "learning_rate_batch": 16})
    values["train"]["optimizer"]["learning_rate_scaling"] = rule
    values["train"]["batch_total"] = 64
    assert config_from_mapping(values).train.resolved_learning_rate == pytest.approx(expected)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cigpose-m_coco-wholebody_256x192"):
        load_preset("cigpose-m")


def test_params_that_are_not_there_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cigpose use quickstart"):
        load_params(tmp_path / "params.yaml")


def test_params_that_are_not_yaml_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: [1, 2")
    with pytest.raises(ConfigError, match=r"params.yaml: not valid yaml"):
        load_params(tmp_path / "params.yaml")


def test_a_config_cannot_be_changed() -> None:
    config: Config = load_preset("quickstart")
    with pytest.raises(AttributeError):
        config.train.epochs = 3  # type: ignore[misc]


def test_a_params_file_is_replaced_by_one_at_a_time_and_the_users_is_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params_file, "is_preset", lambda path: False)  # which takes longer than is waited for here
    params = tmp_path / "params.yaml"
    params.write_text("mine: 1\n")
    other = threading.Thread(target=replace_params, args=(load_preset("quickstart"), params))
    with claimed(tmp_path / ".params.yaml.lock", "replacing it"):
        other.start()
        other.join(0.3)
        assert other.is_alive() and params.read_text() == "mine: 1\n"
        params.write_text("mine: 2\n")
    other.join(30)
    assert (tmp_path / "params-before-1.yaml").read_text() == "mine: 2\n"
