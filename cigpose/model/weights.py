"""Weights in files: ours (safetensors with the configuration inside) and OpenMMLab's `.pth`, opened without trust.

A `.pth` is a pickle, and a pickle can run code. It is opened with torch's restricted unpickler only; the bookkeeping
classes that OpenMMLab's trainer leaves in its files are replaced by stand-ins that hold and do nothing, and any other
class or function a file asks for is refused by name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cigpose.config import Config, config_from_mapping
from cigpose.config.schema import ConfigError
from cigpose.files.atomic import write_bytes
from cigpose.model.estimator import CIGPose, RTMPose, build_model

log = logging.getLogger(__name__)

CONFIG_KEY = "config"
"""Metadata entry of our files that holds the configuration as JSON."""

DEAD_PREFIXES = ("head.mlp.", "head.cls_x.", "head.cls_y.")
"""CIGPose's layers inherited from RTMPose that no forward uses. A file may leave them out."""


class WeightsError(ValueError):
    """A file of weights that cannot be used: damaged, unsafe, or of another model."""


class _Inert:
    """Stands in for whatever a checkpoint's bookkeeping refers to: takes everything, keeps nothing, does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


# All that OpenMMLab checkpoints were seen to ask for beside tensors: the message hub's histories, with the numpy arrays
# and scalars in them and in the dataset's meta. None of it is needed here, so not even numpy itself is let in.
_INERT_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # how protocol 2 spells HistoryBuffer.mean
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


ONNX = "an ONNX file"
_FOREIGN = (  # how files begin that are taken for weights by mistake
    (rb"\s*<(!doctype|html|\?xml|head|body)", "a web page: its address gave a page in place of the file"),
    (rb"version https://git-lfs", "a pointer of Git LFS: the file itself was not fetched"),
    (rb"\x08[\x01-\x20][\x12\x1a\x3a\x42]", ONNX),
    (rb"\s*[{[]", "JSON text"),
    (rb"\x1f\x8b|7z|Rar!", "an archive, which has to be unpacked first"),
    (rb"\xff\xd8\xff|\x89PNG", "a picture"),
    (rb"[\x20-\x7e\s]{16}", "text"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""torch.save's magic number, with which its files before 1.6 begin; a pickle of anything else does not."""


def refuse_foreign(path: Path, expected: str) -> None:
    """Refuse a file whose first bytes tell that it is something else, and say what.

    Args:
        path: an existing file.
        expected: such as "a torch checkpoint".

    Raises:
        WeightsError: it is of a known other kind, or empty.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start[4:9] == b"\0\0\0\0{":  # safetensors: the header's length in 8 bytes, which may look like anything
        return
    kind = next((kind for pattern, kind in _FOREIGN if re.match(pattern, start, re.IGNORECASE)), None)
    if not start:
        kind = "an empty file"
    elif _PICKLE.match(start) and not start.startswith(_TORCH_LEGACY):
        kind = "a plain pickle, which can run code when it is opened and holds no weights that can be read safely"
    if kind and kind != expected:
        of_weights = "a .safetensors of ours or an official .pth"
        advice = "an .onnx that `cigpose export` wrote" if expected == ONNX else of_weights
        raise WeightsError(f"{path}: not {expected} but {kind}. Give {advice}.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, on the CPU.

    Args:
        path: `.safetensors`, or a `.pth` of torch: a state dict, or a checkpoint with `state_dict`. In the latter
            OpenMMLab's trainer stores the averaged (EMA) weights, and the raw ones under `ema_state_dict`: its EMAHook
            swaps the two on saving. So `state_dict` is what upstream's test uses.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: damaged, not weights, or a pickle that asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found.")
    refuse_foreign(path, _expected(path))
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as err:
            raise WeightsError(f"{path}: not a whole safetensors file ({err}). Copy or make it again.") from err
    return _tensors_of(_unpickle(path), path)


def state_dict_of(content: bytes, source: str | Path) -> dict[str, Tensor]:
    """The weights in the bytes of a safetensors file, on the CPU.

    Args:
        content: the whole file.
        source: where it comes from, for messages.

    Raises:
        WeightsError: damaged, or no such file.
    """
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as err:
        raise WeightsError(f"{source}: not a whole safetensors file ({err}). Copy or make it again.") from err


def _expected(path: Path) -> str:
    return "a safetensors file" if path.suffix == ".safetensors" else "a torch checkpoint"


def _unpickle(path: Path) -> object:
    stand_ins = [(_Inert, name) for name in _INERT_GLOBALS]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or hostile pickle can raise anything; whatever it is, nothing of the file has been run.
    except Exception as err:
        if refused := re.search(r"GLOBAL (\S+)", str(err)):
            raise WeightsError(
                f"{path}: asks for {refused[1]}, which is neither a tensor nor OpenMMLab's bookkeeping; opening it "
                "would run code from the file, so it is refused. Ask its author for a file of tensors only."
            ) from err
        # torch's own text advises to open the file without protection.
        lines = re.sub(r".*WeightsUnpickler error:", "", str(err), flags=re.DOTALL).strip().splitlines()
        reason = lines[0][:200] if lines and "weights_only" not in lines[0] else type(err).__name__
        raise WeightsError(f"{path}: not a readable torch checkpoint ({reason}). Download it again.") from err


def _tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict within what a `.pth` holds, without the prefix of a data-parallel wrapper."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: holds {type(content).__name__}, expected a mapping of names to tensors.")
    if odd := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path}: {_listed(odd)} are not tensors, expected a mapping of names to tensors.")
    return {str(key).removeprefix("module."): value.detach() for key, value in content.items()}


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def save_weights(
    path: str | Path, state_dict: Mapping[str, Tensor], config: Config, extra: Mapping[str, str] | None = None
) -> None:
    """Write weights with their configuration, whole or not at all.

    Args:
        path: the `.safetensors` file; an existing one is replaced.
        state_dict: tensors on any device.
        config: the experiment, stored as JSON in the file's metadata under `config`, without what is private.
        extra: more metadata, e.g. `{"epoch": "12"}`.

    Raises:
        WeightsError: a number of them is NaN or infinite; nothing is written.
    """
    path = Path(path)
    refuse_non_finite(state_dict, path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    metadata = {**(extra or {}), CONFIG_KEY: json.dumps(config.to_public_mapping(), sort_keys=True)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save_weights` wrote beside the tensors: `config` and the extra entries.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found.")
    refuse_foreign(path, "a safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as err:
        raise WeightsError(f"{path}: not a whole safetensors file ({err}). Copy or make it again.") from err


def read_config(path: str | Path) -> Config:
    """The configuration in one of our files.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file holds no configuration, or one that this version cannot use.
    """
    metadata = read_metadata(path)
    if CONFIG_KEY not in metadata:
        raise WeightsError(f"{path}: holds no configuration, so it is not one of ours. Give its preset's.")
    try:
        return config_from_mapping(json.loads(metadata[CONFIG_KEY]))
    except (ConfigError, json.JSONDecodeError) as err:
        raise WeightsError(f"{path}: its configuration cannot be used: {err}") from err


def load_checkpoint(path: str | Path, config: Config | None = None) -> CIGPose | RTMPose:
    """A model with the weights of a file, on the CPU, in evaluation mode.

    Args:
        path: our `.safetensors`, or an official `.pth`.
        config: the experiment the weights belong to. Ours carry it; a `.pth` does not, so that it must be given.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file cannot be opened safely, lacks a configuration, or holds another model: with a list
            of every tensor that is missing, unexpected or of another shape.
    """
    path = Path(path)
    if config is None:
        if path.suffix != ".safetensors" and path.is_file():
            refuse_foreign(path, _expected(path))
            raise WeightsError(
                f"{path}: a {path.suffix or 'file'} carries no configuration of ours. Give the one it was trained "
                "with, e.g. load_preset('cigpose-m_coco-wholebody_256x192')."
            )
        config = read_config(path)
    model = build_model(config)
    load_weights(model, read_state_dict(path), path)
    return model.eval()


def load_weights(model: CIGPose | RTMPose, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy a complete set of weights into a model.

    Args:
        model: changed only if everything fits.
        state_dict: every tensor of the model; CIGPose's dead ones may be absent.
        source: where they come from, for messages.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape or not finite; all of them are listed.
    """
    own = model.state_dict()
    dead = {key for key in own if isinstance(model, CIGPose) and key.startswith(DEAD_PREFIXES)}
    _copy(own, state_dict, source, optional=dead, name=model.config.name)
    if absent := dead - set(state_dict):
        log.info("%s: without %s, which no forward uses", source, _listed(absent))


def load_backbone(model: CIGPose | RTMPose, path: str | Path) -> None:
    """Copy a pretrained backbone into a model.

    Args:
        model: its `backbone` is changed, only if everything fits.
        path: a file with `backbone.*`; heads of other tasks in it, and stages the model does not build, are left out.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file cannot be opened safely, has no backbone, or one of another size.
    """
    prefix = "backbone."
    state_dict = read_state_dict(path)
    found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not found:
        first = _listed({key.split(".")[0] for key in state_dict})
        raise WeightsError(f"{path}: no tensor begins with {prefix!r}, only with {first}. Is it a backbone's file?")
    built = {name for name, _ in model.backbone.named_children()}
    stages = {f"stage{number}" for number in range(1, 5)} - built
    found = {key: value for key, value in found.items() if key.split(".")[1] not in stages}
    own = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    _copy(own, found, path, optional=set(), name=f"the backbone of {model.config.name}")


def refuse_non_finite(state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise WeightsError if a number in `state_dict`, which is that of `source`, is NaN or infinite."""
    if broken := [key for key, value in state_dict.items() if not bool(torch.isfinite(value).all())]:
        raise WeightsError(
            f"{source}: {len(broken)} of {len(state_dict)} tensors hold numbers that are not finite: "
            f"{_listed(broken, 3)}. The training has diverged, or the file is damaged; take an earlier one."
        )


@torch.no_grad()
def _copy(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str | Path, *, optional: set[str], name: str
) -> None:
    """Copy `given` into the tensors of `own` if it fits, else raise with a list of all that does not."""
    missing = set(own) - set(given) - optional
    unexpected = set(given) - set(own)
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in set(own) & set(given)
        if given[key].shape != own[key].shape
    ]
    complaints = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if found := [f"{len(names)} {what}: {_listed(names)}" for what, names in complaints.items() if names]:
        raise WeightsError(f"{source}: not the weights of {name}. {'; '.join(found)}.")
    refuse_non_finite(given, source)
    for key, value in given.items():
        own[key].copy_(value)
