"""The network as an ONNX file, and an ONNX file as a network.

B crops, K keypoints, (W, H) of the crop in pixels. The file carries its configuration, so that a `Predictor` needs
nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.codec import decode
from cigpose.config import Config, config_from_mapping
from cigpose.files.atomic import written_file
from cigpose.model.causal import CausalIntervention
from cigpose.model.estimator import Normalize, normalize
from cigpose.model.weights import ONNX, refuse_foreign

CONFIG_KEY = "cigpose_config"
OUTPUTS_KEY = "cigpose_outputs"
NAMES_KEY = "cigpose_keypoints"
LOGITS = ("simcc_x", "simcc_y")
DECODED = ("keypoints", "scores")
TOLERANCE = 1e-4
"""Largest difference between onnxruntime and torch, relative to the largest output. Sums of a few thousand float32
products in another order differ by about 1e-5; a wrong operator differs by more than 0.1."""

_TIE = 2e-6  # confounding scores (0 to 1) so close that rounding decides which is higher
_MAX_TIED_CHOICES = 512
_CHECK_BATCHES = (1, 3)


class MissingPackageError(ModuleNotFoundError, ValueError):
    """A package that only some commands need; both kinds, so that callers who report user errors report it too."""


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
    tolerance: float = TOLERANCE,
) -> Path:
    """Write the network as one ONNX file, and run it to see that it computes what torch computes.

    Args:
        model: the network; a copy in eval mode on the CPU is exported, in float32.
        config: of the model; kept in the file.
        path: the file to write, at once or not at all; only an earlier export is replaced.
        decoded: False: input `images` float32 (B, 3, H, W) normalised RGB, outputs `simcc_x` (B, K, bins of x) and
            `simcc_y` (B, K, bins of y), as `forward` of the model. True: input `crops` uint8 (B, H, W, 3) RGB, outputs
            `keypoints` (B, K, 2) in crop pixels and `scores` (B, K), for programs without torch.
        tolerance: see `TOLERANCE`.

    Returns: `path`.

    Raises:
        MissingPackageError: the ONNX packages are not installed.
        ValueError: onnxruntime and torch differ by more than `tolerance`, or `path` is a file of another kind.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    _refuse_others(path)
    network = copy.deepcopy(model).float().cpu().eval()
    module = (_Decoded(network, config.model.simcc.split_ratio) if decoded else _Logits(network)).eval()
    outputs = DECODED if decoded else LOGITS
    name = "crops" if decoded else "images"
    with written_file(path) as part:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (_example(config, 2, decoded),),
                dynamo=True,
                input_names=[name],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                verbose=False,
            )
        if program is None:
            raise ValueError(f"{path}: torch.onnx.export gave no program. Is torch 2.9 or newer installed?")
        program.model.metadata_props.update(
            {
                CONFIG_KEY: json.dumps(config.to_public_mapping()),
                OUTPUTS_KEY: " ".join(outputs),
                NAMES_KEY: " ".join(config.keypoint_set.names),
            }
        )
        program.save(str(part), external_data=False)
        _compare(module, part, path, config, tolerance, decoded=decoded)
    return path


def _refuse_others(path: Path) -> None:
    """See that nothing but an export of ours is replaced."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder. Give the name of a file, such as {path / 'model.onnx'}.")
    if path.exists() and CONFIG_KEY.encode() not in path.read_bytes():
        raise ValueError(f"{path}: exists, and `cigpose export` did not write it. Give another --out.")


class OnnxModel(nn.Module):
    """An exported network that is called like the original: float32 images in, (simcc_x, simcc_y) out.

    Args:
        path: a file that `export_onnx` wrote, with logits as outputs.
        threads: of onnxruntime; 0 leaves it the choice.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackageError: onnxruntime is not installed.
        ValueError: it is not such a file.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no ONNX file there. `cigpose export` writes one.")
        refuse_foreign(path, ONNX)
        self.session = _session(path, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if CONFIG_KEY not in metadata:
            raise ValueError(
                f"{path}: carries no configuration, so it was not written by `cigpose export`. Export again."
            )
        self.config = config_from_mapping(json.loads(metadata[CONFIG_KEY]))
        found = metadata.get(OUTPUTS_KEY, "").split()
        if found != list(LOGITS):
            raise ValueError(
                f"{path}: gives {' and '.join(found)}, expected {' and '.join(LOGITS)}. Export again without --decoded."
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as of `PoseEstimator.forward`, computed by onnxruntime on the CPU."""
        feed = {self.session.get_inputs()[0].name: np.ascontiguousarray(images.detach().cpu().numpy())}
        simcc_x, simcc_y = self.session.run(list(LOGITS), feed)
        return torch.from_numpy(simcc_x).to(images.device), torch.from_numpy(simcc_y).to(images.device)


def _session(path: Path, threads: int = 0) -> Any:
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would slow torch's
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's own exceptions have no common base
        raise ValueError(f"{path}: onnxruntime cannot load it ({err}). Export it again.") from err


def _require(*modules: str) -> None:
    missing = []
    for module in modules:
        try:
            __import__(module)
        except ModuleNotFoundError:
            missing.append(module)
    if missing:
        raise MissingPackageError(
            f"{', '.join(missing)} not installed, which ONNX files need. Run `pip install {' '.join(missing)}`."
        )


def _example(config: Config, batch: int, decoded: bool, seed: int = 0) -> Tensor:
    width, height = config.model.input_size
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (batch, -(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    crops = patches.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return torch.from_numpy(crops) if decoded else normalize(torch.from_numpy(crops)).contiguous()


@torch.inference_mode()
def _compare(module: nn.Module, file: Path, path: Path, config: Config, tolerance: float, *, decoded: bool) -> None:
    """Refuse a file that does not compute what torch does, on random crops in batches of several sizes."""
    session = _session(file, threads=1)
    names = [output.name for output in session.get_outputs()]
    for batch in _CHECK_BATCHES:
        example = _example(config, batch, decoded, seed=batch)
        found = session.run(names, {session.get_inputs()[0].name: example.numpy()})
        away = _distance(found, module(example))
        for row in np.flatnonzero(~(away <= tolerance)):
            crop, outputs = example[row : row + 1], [output[row : row + 1] for output in found]
            nearest = float(away[row])
            for choice in _tied_choices(module, crop):
                if nearest <= tolerance:
                    break
                nearest = min(nearest, float(_distance(outputs, _choosing(module, crop, _always(choice)))[0]))
            if not nearest <= tolerance:
                raise ValueError(
                    f"{path}: onnxruntime differs from torch by {nearest:.2g} of the largest output, allowed is "
                    f"{tolerance:.2g}. Nothing was written; try another version of torch or onnxruntime."
                )


def _distance(found: list[np.ndarray], expected: tuple[Tensor, ...]) -> np.ndarray:
    """(B,) largest difference of each crop's outputs, relative to the largest output.

    Of decoded keypoints the median counts: two bins may be equally high, and the coordinate jumps.
    """
    each = []
    for ours, theirs in zip(found, (tensor.numpy() for tensor in expected), strict=True):
        if ours.shape != theirs.shape:
            return np.full(len(ours), np.inf)
        away = np.abs(ours - theirs).reshape(len(ours), -1) / max(float(np.abs(theirs).max()), 1e-12)
        each.append(np.median(away, axis=1) if ours.shape[-1] == 2 else away.max(axis=1))
    return np.max(each, axis=0)


def _tied_choices(module: nn.Module, crop: Tensor) -> list[Tensor]:
    """What CIM may replace in one crop where confounding scores tie and rounding picks: masks (1, K).

    Every logit of a person follows that choice. Ties are rare in a trained network and the rule in a fresh one.
    """
    cim = next((part for part in module.modules() if isinstance(part, CausalIntervention)), None)
    if cim is None or cim.strategy != "top_k" or cim.eval_top_k == 0:
        return []
    seen: list[Tensor] = []

    def note(score: Tensor) -> Tensor:
        seen.append(score[0])
        return CausalIntervention.select(cim, score)

    _choosing(module, crop, note)
    score = seen[0]
    cut = score.topk(cim.eval_top_k).values[-1]
    sure = torch.nonzero(score > cut + _TIE).flatten().tolist()
    tied = torch.nonzero((score - cut).abs() <= _TIE).flatten().tolist()
    choices = []
    for rest in itertools.islice(itertools.combinations(tied, cim.eval_top_k - len(sure)), _MAX_TIED_CHOICES):
        mask = torch.zeros(1, len(score), dtype=torch.bool)
        mask[0, [*sure, *rest]] = True
        choices.append(mask)
    return choices


def _choosing(module: nn.Module, crop: Tensor, select: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Outputs of one crop when CIM replaces what `select` says of the scores (1, K)."""
    cim = next(part for part in module.modules() if isinstance(part, CausalIntervention))
    cim.__dict__["select"] = select
    try:
        outputs: tuple[Tensor, ...] = module(crop)
    finally:
        del cim.__dict__["select"]
    return outputs


def _always(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda score: mask


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
