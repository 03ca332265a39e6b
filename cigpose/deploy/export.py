"""The network as an ONNX file, in forms that other people's runtimes take.

B crops, K keypoints, (W, H) of the crop in pixels. Besides our own metadata (`cigpose.deploy.onnx`) a file carries
`cigpose_meta`, the public format of cigpose-onnx.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cigpose.codec import decode
from cigpose.config import Config
from cigpose.deploy.agreement import TOLERANCE, example_crops, refuse_different
from cigpose.deploy.onnx import CONFIG_KEY, DECODED, LOGITS, OUTPUTS_KEY, require_packages
from cigpose.deploy.quantize import to_float16, to_int8
from cigpose.files.atomic import written_file
from cigpose.model.estimator import MEAN_RGB, STD_RGB, Normalize, normalize

META_KEY = "cigpose_meta"
NAMES_KEY = "cigpose_keypoints"
INPUT, INPUT_DECODED = "input", "crops"

Numbers = Literal["float32", "float16", "int8"]
"""What a network computes with inside; what goes in and comes out is the same for all."""


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        simcc_x, simcc_y = self.model(images)
        return simcc_x, simcc_y


class _Decoded(nn.Module):
    def __init__(self, model: nn.Module, split_ratio: float) -> None:
        super().__init__()
        self.normalize, self.model, self.split_ratio = Normalize(), model, split_ratio

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        simcc_x, simcc_y = self.model(self.normalize(crops))
        return decode(simcc_x, simcc_y, self.split_ratio)


def export_onnx(
    model: nn.Module,
    config: Config,
    path: str | Path,
    *,
    decoded: bool = False,
    numbers: Numbers = "float32",
    calibration: Iterable[Tensor] = (),
    tolerance: float = TOLERANCE,
) -> Path:
    """Write the network as one ONNX file, and run it to see that it computes what torch computes.

    Args:
        model: the network; a copy in eval mode on the CPU is exported.
        config: of the model; kept in the file.
        path: the file to write, at once or not at all; only an earlier export is replaced.
        decoded: False: input `input` float32 (B, 3, H, W) normalised RGB, outputs `simcc_x` (B, K, bins of x) and
            `simcc_y` (B, K, bins of y), as `forward` of the model. True: input `crops` uint8 (B, H, W, 3) RGB, outputs
            `keypoints` (B, K, 2) in crop pixels and `scores` (B, K), for programs without torch.
        numbers: float16 halves the file and suits GPUs; int8 suits CPUs. Both are refused only where they differ as a
            broken file does: what they cost is for an evaluation to say.
        calibration: batches of uint8 (B, H, W, 3) RGB crops for int8, of training data: never of what measures it.
        tolerance: see `TOLERANCE`; for float32.

    Returns: `path`.

    Raises:
        MissingPackageError: the ONNX packages are not installed.
        ValueError: onnxruntime and torch differ by more than `tolerance`, `path` is a file of another kind, or int8 is
            asked for without crops.
    """
    require_packages("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    _refuse_others(path)
    network = copy.deepcopy(model).float().cpu().eval()
    module = (_Decoded(network, config.model.simcc.split_ratio) if decoded else _Logits(network)).eval()
    crops = torch.cat(list(calibration)) if numbers == "int8" else None
    example = crops if crops is not None else example_crops(config, 2)
    with (
        written_file(path) as part,
        # beside it, and named as it, so that what a kill leaves is cleared as that is
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder,
    ):
        floats = Path(folder) / "float32.onnx"
        _program(module, example[:2] if decoded else normalize(example[:2]).contiguous(), path, decoded).save(
            str(floats), external_data=False
        )
        if numbers == "float16":
            graph = to_float16(floats)
        elif crops is not None:
            graph = to_int8(floats, crops.numpy() if decoded else normalize(crops).contiguous().numpy())
        else:
            graph = _loaded(floats)
        _describe(graph, config, decoded, numbers)
        part.write_bytes(graph.SerializeToString())
        refuse_different(module, part, path, config, tolerance, decoded=decoded, numbers=numbers, crops=crops)
    return path


def _program(module: nn.Module, example: Tensor, path: Path, decoded: bool) -> Any:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=[INPUT_DECODED if decoded else INPUT],
            output_names=list(DECODED if decoded else LOGITS),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
    if program is None:
        raise ValueError(f"{path}: torch.onnx.export gave no program. Is torch 2.9 or newer installed?")
    return program


def _loaded(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))


def _describe(graph: Any, config: Config, decoded: bool, numbers: Numbers) -> None:
    """Put our metadata in place of the exporter's, which quotes our source lines and their paths at every node."""
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]
    width, height = config.model.input_size
    public = {
        "input_w": width,
        "input_h": height,
        "split_ratio": config.model.simcc.split_ratio,
        "mean": MEAN_RGB,
        "std": STD_RGB,
        "padding": config.augmentation.box_padding,
        "keypoint_set": config.keypoint_set.name,
        "keypoint_names": config.keypoint_set.names,
        "numbers": numbers,
    }
    metadata = {
        META_KEY: json.dumps(public),
        CONFIG_KEY: json.dumps(config.to_public_mapping()),
        OUTPUTS_KEY: " ".join(DECODED if decoded else LOGITS),
        NAMES_KEY: " ".join(config.keypoint_set.names),
    }
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)


def _refuse_others(path: Path) -> None:
    """See that nothing but an export of ours is replaced."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder. Give the name of a file, such as {path / 'model.onnx'}.")
    if path.exists() and CONFIG_KEY.encode() not in path.read_bytes():
        raise ValueError(f"{path}: exists, and `cigpose export` did not write it. Give another --out.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks, which concern its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
