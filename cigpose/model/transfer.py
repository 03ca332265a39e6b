"""The first weights of a network from another one, tensor by tensor, as far as they fit.

Keypoints are matched by their names: three tensors of our heads have a row for each keypoint, and a row is taken from
the keypoint of the same name, wherever that stands in the other's set. Attention and graph layers are the same for all
keypoints, whose number and edges they learn nothing of, and go over whole.

Another resolution of the same picture (equal aspect ratio), or another number of bins per pixel, is no other task. A
SimCC classifier is linear, and bin i of n stands for the place i/n of the crop, so a classifier whose rows are
interpolated gives the old one's logits read between its bins. The map of a keypoint, too, shows the same at another
size. Crops of another aspect ratio show people elsewhere, so there both are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.keypoints import KeypointSet
from cigpose.model.weights import WeightsError, refuse_non_finite

BY_KEYPOINT = ("head.final_layer.weight", "head.final_layer.bias", "head.cim.canonical_features.weight")
"""Tensors whose first axis is keypoints."""
BY_BIN = tuple(f"head.{classifier}{axis}." for classifier in ("cls_", "cls_g", "initial_pred_") for axis in "xy")
"""How the names of tensors begin whose first axis is bins."""
BY_CELL = ("head.mlp.1.weight", "head.mlp_pre_gau.1.weight")
"""Tensors whose last axis is cells of the feature map, row by row."""
EMBEDDING = "head.mlp_pre_gau.", "head.mlp."
"""What makes the embeddings that go into the attention unit: of CIGPose's head, and of RTMPose's. The former has layers
of the latter's name too, which nobody uses."""
LISTED = 3


@dataclass(frozen=True, kw_only=True)
class WeightTransfer:
    """What becomes of each tensor of a network that starts from another one."""

    taken: list[str] = field(default_factory=list)
    """As they are."""
    mapped: dict[str, str] = field(default_factory=dict)
    """In part or in another order: tensor -> how, such as `12 of 14 keypoints`."""
    interpolated: dict[str, str] = field(default_factory=dict)
    """To another resolution: tensor -> shapes."""
    anew: dict[str, str] = field(default_factory=dict)
    """Tensor -> why it keeps its random start."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the other network that have no place in this one."""
    keypoints: dict[str, Any] = field(default_factory=dict)
    """`from` and `to`, names of both sets, `matched` and `anew`, names of keypoints."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def summary(self) -> str:
        """What happened, in one sentence."""
        counts = {"taken": self.taken, "mapped": self.mapped, "interpolated": self.interpolated, "made anew": self.anew}
        said = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names or what == "taken")
        return f"{said} of {sum(map(len, counts.values()))} tensors; {self._keypoints_said()}"

    def lines(self) -> list[str]:
        """The summary, and what a user should look at: what is not as it was, and why."""
        rows = {**self.mapped, **self.interpolated, **self.anew}
        kinds: dict[str, list[str]] = {}
        for name, why in rows.items():
            what = "made anew" if name in self.anew else "mapped" if name in self.mapped else "interpolated"
            kinds.setdefault(f"{what} ({why})", []).append(name)
        unused = {"has no place here": self.unused} if self.unused else {}
        return [self.summary(), *(f"{what}: {_listed(names)}" for what, names in {**kinds, **unused}.items())]

    def _keypoints_said(self) -> str:
        known, anew = self.keypoints, self.keypoints["anew"]
        if known["from"] is None:
            return "the file does not say which keypoints it knows, so that theirs are made anew"
        missing = f" (anew: {_listed(anew)})" if anew else ""
        total = len(known["matched"]) + len(anew)
        return f"{len(known['matched'])} of {total} keypoints by name from {known['from']}{missing}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


@torch.no_grad()
def start_from(
    model: nn.Module, given: Mapping[str, Tensor], config: Config, source: Config | None, where: str
) -> WeightTransfer:
    """Copy into a network what it can take from another one; the rest of it stays as it is.

    On the `meta` device nothing is copied, and what would be is told.

    Args:
        model: the network that `config` describes.
        given: tensors of the other one, on the CPU or `meta`.
        config: this experiment.
        source: the other's, which says what its keypoints are called and how large its crops are; None if not known.
        where: where the other one comes from, for messages.

    Raises:
        WeightsError: nothing fits, or a number is NaN or infinite.
    """
    own = model.state_dict()
    names = source and source.keypoint_set
    places = {name: _place_in(given, name, own) for name in own}
    found = WeightTransfer(
        unused=sorted(set(given) - set(places.values())),
        keypoints=_matched_keypoints(config.keypoint_set, names or None),
    )
    moved: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if (place := places[name]) not in given:
            found.anew[name] = "not in the file"
        elif (changed := _fitted(name, given[place], tensor, config, source, found)) is not None:
            moved[name] = changed
            if place != name and name in found.taken:
                found.taken.remove(name)
                found.mapped[name] = f"as the other head's {place}"
    if not any(own[name].numel() > 1 for name in moved):
        raise WeightsError(
            f"train.start_from: nothing of {where} fits {config.name}: none of its {len(given)} tensors has the name "
            f"and shape of one of the {len(own)} here. Give a model of the same architecture and widths."
        )
    if not any(tensor.is_meta for tensor in (*moved.values(), *own.values())):
        refuse_non_finite({places[name]: given[places[name]] for name in moved}, where)
        for name, tensor in moved.items():
            own[name].copy_(tensor)
    return found


def _place_in(given: Mapping[str, Tensor], name: str, own: Mapping[str, Tensor]) -> str:
    """Name in another network of what has the name `name` in this one."""
    cigpose, rtmpose = EMBEDDING
    if name.startswith(cigpose) and name not in given:
        return name.replace(cigpose, rtmpose)
    renamed = name.replace(rtmpose, cigpose)
    return renamed if renamed not in own and renamed in given else name


def _matched_keypoints(own: KeypointSet, other: KeypointSet | None) -> dict[str, Any]:
    known = set(other.names) if other else set()
    return {
        "from": other and other.name,
        "to": own.name,
        "matched": [name for name in own.names if name in known],
        "anew": [name for name in own.names if name not in known],
    }


def _fitted(
    name: str, given: Tensor, own: Tensor, config: Config, source: Config | None, found: WeightTransfer
) -> Tensor | None:
    """The tensor in its new shape, noted in `found`; None if it cannot be had."""
    if name in BY_KEYPOINT:
        return _fit_keypoints(name, given, own, config, source, found)
    is_scrambled = name in BY_CELL and source is not None and _map_size(source) != _map_size(config)
    if given.shape == own.shape and not is_scrambled:
        found.taken.append(name)
        return given
    if not _differs_by_size_of_crop(name, given, own):
        found.anew[name] = f"{_shape(given)} there, {_shape(own)} here"
        return None
    if source is None or not _has_equal_aspect(config, source):
        found.anew[name] = "crops of another aspect ratio" if source else "the file does not say the size of its crops"
        return None
    found.interpolated[name] = f"{_shape(given)} to {_shape(own)}"
    if own.is_meta or given.is_meta:
        return own
    if name in BY_CELL:
        return resample_cells(given, _map_size(source), _map_size(config))
    return resample_bins(given, len(own))


def _fit_keypoints(
    name: str, given: Tensor, own: Tensor, config: Config, source: Config | None, found: WeightTransfer
) -> Tensor | None:
    if source is None or len(source.keypoint_set) != len(given):
        found.anew[name] = "the file does not say which keypoints these are"
        return None
    if given.shape[1:] != own.shape[1:]:
        found.anew[name] = f"{_shape(given)} there, {_shape(own)} here"
        return None
    names, place = config.keypoint_set.names, {key: i for i, key in enumerate(source.keypoint_set.names)}
    rows = [i for i, key in enumerate(names) if key in place]
    if not rows:
        found.anew[name] = f"no keypoint of {source.keypoint_set.name} has a name of {config.keypoint_set.name}"
        return None
    if names == source.keypoint_set.names:
        found.taken.append(name)
        return given
    found.mapped[name] = f"{len(rows)} of {len(names)} keypoints"
    if own.is_meta or given.is_meta:
        return own
    here, there = torch.tensor(rows), torch.tensor([place[names[i]] for i in rows])
    return own.clone().index_copy_(0, here, given[there].to(own))


def _differs_by_size_of_crop(name: str, given: Tensor, own: Tensor) -> bool:
    """Whether two shapes are equal but for the axis that depends on the size of the crop."""
    if name in BY_CELL:
        return given.shape[:-1] == own.shape[:-1]
    return name.startswith(BY_BIN) and given.shape[1:] == own.shape[1:]


def _has_equal_aspect(config: Config, source: Config) -> bool:
    (width, height), (w, h) = config.model.input_size, source.model.input_size
    return width * h == w * height


def _map_size(config: Config) -> tuple[int, int]:
    """(height, width) of the feature map."""
    width, height = config.model.input_size
    stride = 2 ** (config.model.backbone.out_stage + 1)
    return height // stride, width // stride


def resample_bins(weight: Tensor, bins: int) -> Tensor:
    """A classifier's weight or bias over another number of bins of the same side: (n, ...) -> (bins, ...).

    The logits are those of before, read with linear interpolation.
    """
    at = (torch.arange(bins, dtype=torch.float64) * (len(weight) / bins)).clamp(max=len(weight) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(weight) - 1)
    share = (at - low).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    return torch.lerp(weight[low], weight[high], share)


def resample_cells(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The weight of a keypoint's map at another resolution: (C, cells of `old`) -> (C, cells of `new`).

    Args:
        weight: a row for each channel of the embedding.
        old: (height, width) of the feature map it was made for.
        new: of the one it is for now.

    Returns: weights whose sums over a map that shows the same are the same.
    """
    maps = weight.view(len(weight), 1, *old)
    resized = F.interpolate(maps, size=new, mode="bilinear", antialias=new[0] < old[0])
    return resized.flatten(1) * (old[0] * old[1] / (new[0] * new[1]))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
