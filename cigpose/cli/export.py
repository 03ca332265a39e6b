"""`cigpose export`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import Config, load_params, load_preset

if TYPE_CHECKING:  # torch: only where it is needed
    from torch import Tensor, nn


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    export = subparsers.add_parser(
        "export",
        help="write the network as an ONNX file",
        description="Write the network as one ONNX file with a free batch size, and compare it with torch. --int8 "
        "looks at crops of the training data of params.yaml; --evaluate (always with --int8) measures torch's network "
        "and the file on its validation data, and prints what the file loses.",
    )
    export.add_argument(
        "--model",
        default="data/model/model.safetensors",
        help="models:/NAME@ALIAS of the registry, our .safetensors or a folder with one, or an official .pth (default: "
        "%(default)s)",
    )
    export.add_argument("--preset", help="what an official .pth was trained as, see `cigpose presets`")
    export.add_argument("--out", type=Path, default=Path("model.onnx"), help="file to write (default: %(default)s)")
    export.add_argument(
        "--decoded", action="store_true", help="uint8 RGB crops in, keypoints and scores out, instead of logits"
    )
    numbers = export.add_mutually_exclusive_group()
    numbers.add_argument("--fp16", action="store_true", help="float16 inside, for GPUs; half as large")
    numbers.add_argument("--int8", action="store_true", help="8-bit backbone, for CPUs")
    export.add_argument(
        "--calibration-crops", type=int, default=256, help="training crops for --int8 (default: %(default)s)"
    )
    export.add_argument("--evaluate", action=argparse.BooleanOptionalAction, help="default: with --int8 only")
    export.add_argument("--params", type=Path, default=Path("params.yaml"), help="of the data (default: %(default)s)")
    export.add_argument("--shards", type=Path, default=Path("data/shards"), help="default: %(default)s")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from cigpose.deploy.export import export_onnx
    from cigpose.deploy.models import find_model
    from cigpose.deploy.onnx import OnnxModel
    from cigpose.evaluate.checkpoint import merge_config
    from cigpose.model.weights import load_checkpoint

    model = load_checkpoint(find_model(options.model), load_preset(options.preset) if options.preset else None)
    evaluated = options.int8 if options.evaluate is None else options.evaluate
    data: Config | None = None
    if evaluated or options.int8:
        data = merge_config(model.config, load_params(options.params), where=str(options.model))
    path = export_onnx(
        model,
        model.config,
        options.out,
        decoded=options.decoded,
        numbers="int8" if options.int8 else "float16" if options.fp16 else "float32",
        calibration=_training_crops(data, options.shards, options.calibration_crops) if data and options.int8 else (),
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, compared with torch")
    if evaluated and data:
        print(_loss(model, OnnxModel(path), data, options.shards), end="")


def _training_crops(config: Config, root: Path, count: int) -> list[Tensor]:
    """Batches of uint8 (B, H, W, 3) crops, as evaluation cuts them, in equal parts from all training sets."""
    from cigpose.loader.batches import eval_loader

    labelled = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, boxes="ground_truth", batch=1))
    each = -(-count // len(config.data.train))
    crops = []
    for dataset in config.data.train:
        loader = eval_loader(labelled, dataset, rank=0, world=1, root=root)
        crops += [batch["crops"] for batch in itertools.islice(loader, each)]
    return crops


def _loss(model: nn.Module, exported: Any, config: Config, root: Path) -> str:
    """A table of AP: of torch, of the file, and the difference."""
    from cigpose.evaluate.checkpoint import measure

    if exported.decoded and config.evaluate.flip_test:  # keypoints cannot be averaged as logits are
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, flip_test=False))
    figures = [measure(network, config, shards_root=root) for network in (model, exported)]
    flip = "with" if config.evaluate.flip_test else "without"
    lines = [
        f"on {config.data.val}, {config.evaluate.boxes} boxes, {flip} flip test",
        "AP           torch     file     lost",
    ]
    for name, before in figures[0].items():
        if name.endswith("/AP"):
            after = figures[1][name]
            lines.append(f"{name.removesuffix('/AP'):<11} {before:6.4f}   {after:6.4f}  {before - after:+7.4f}")
    return "\n".join(lines) + "\n"
