"""The pixel part of an augmentation stage: one albumentations Compose, the original's steps and then the user's.

HSV, blur, median blur and dropout are the original's. `augmentation.stage1.extra` (and `stage2.extra`) adds transforms
of the library by name; they see the finished crop, and keypoints follow those that move pixels. All randomness of a
crop comes from one generator.
"""

from __future__ import annotations

import difflib
import inspect
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations
import cv2
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion
from albumentations.core.composition import BaseCompose

from cigpose.config import AugmentationStage, Config
from cigpose.config.schema import ConfigError
from cigpose.keypoints import KeypointSet

BLUR_SIZES = (3, 7)
"""Smallest and largest (odd) kernel of both blurs."""
IS_DRAWN, GAINS, BLUR, MEDIAN_BLUR, HOLE, NUM_DRAWN = 0, slice(1, 4), 4, 5, slice(6, 10), 10
"""Columns of what is drawn for a crop: 1; gains as of `draw_hsv_gains`; sizes of the blurs, 0: none; left, top, right
and bottom of the hole, right and bottom excluded, 0: none. And their number."""
TRIALS = 4
"""Times a transform of the user is tried before anything is trained."""
INVERSION_STEPS = 20
"""Of the fixed-point iteration that inverts a distortion."""
PROBE = 8.0
"""Pixels of the triangles by which a mirrored crop is known."""
_PLACES = np.array([(0.5, 0.5), (0.3, 0.35), (0.7, 0.35), (0.35, 0.7), (0.65, 0.65)])
_TRIANGLE = np.array([(0.0, 0.0), (PROBE, 0.0), (0.0, PROBE)])
_MOVED = 1e-3

Pose = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Crop (H, W, 3) uint8 RGB, keypoints (K, 2) in its pixels, visible (K,)."""


def draw_hsv_gains(rng: np.random.Generator, stage: AugmentationStage) -> tuple[int, int, int]:
    """Whole-number changes of hue, saturation and value; each is left out with probability 1/2."""
    draws = rng.random(6).tolist()
    hue, saturation, value = (
        int((2 * size - 1) * delta) if kept < 0.5 else 0  # int: towards zero
        for size, kept, delta in zip(draws[:3], draws[3:], stage.hsv_delta, strict=True)
    )
    return hue, saturation, value


def change_hsv(crop: np.ndarray, gains: Sequence[int]) -> np.ndarray:
    """Hue turned (of 180), saturation and value shifted and clipped (of 255), in OpenCV's 8-bit HSV.

    Args:
        crop: (H, W, 3) uint8 RGB.
        gains: changes of hue, saturation and value.

    Returns: (H, W, 3) uint8 RGB. As in the original, the way to HSV and back changes pixels slightly, gains 0 or not.
    """
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV)
    if gains[0]:
        turned = ((np.arange(256) + gains[0]) % 180).astype(np.uint8)
        cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), turned), hsv, 0)
    flat = hsv.reshape(hsv.shape[0], -1)
    more, less = ([0, *(max(0, min(255, sign * gain)) for gain in gains[1:])] for sign in (1, -1))
    if any(more):  # uint8 addition that stops at 255
        row = np.array(more * hsv.shape[1], dtype=np.uint8)
        np.minimum(flat, 255 - row, out=flat)
        flat += row
    if any(less):
        row = np.array(less * hsv.shape[1], dtype=np.uint8)
        np.maximum(flat, row, out=flat)
        flat -= row
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv)


class OriginalHSV(albumentations.ImageOnlyTransform):  # type: ignore[misc]
    """`change_hsv` by drawn gains: YOLOXHSVRandomAug of MMDetection; the library draws and rounds otherwise."""

    def __init__(self, stage: AugmentationStage) -> None:
        super().__init__(p=1.0)
        self._stage = stage

    def get_params(self) -> dict[str, Any]:
        """The gains of one call."""
        return {"gains": draw_hsv_gains(self.random_generator, self._stage)}

    def apply(self, img: np.ndarray, gains: tuple[int, int, int], **_: Any) -> np.ndarray:
        """The changed crop."""
        return change_hsv(img, gains)


class BlackDropout(albumentations.CoarseDropout):  # type: ignore[misc]
    """CoarseDropout of one hole that writes black into the crop, a copy already, and needs no generator to fill it."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The hole of one call: the library's draws, one by one in its order, and not by arrays of one."""
        height, width = params["shape"][:2]
        rng = self.random_generator
        self.py_random.randint(*self.num_holes_range)
        tall = int(height * rng.uniform(*self.hole_height_range))
        wide = int(width * rng.uniform(*self.hole_width_range))
        top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
        rng.integers(0, 2**32 - 1)  # what would fill it
        return {"holes": np.array([(left, top, left + wide, top + tall)])}

    def apply(self, img: np.ndarray, holes: np.ndarray, **_: Any) -> np.ndarray:
        """The same crop, with its hole (1, 4: left, top, right, bottom) black."""
        left, top, right, bottom = holes[0].tolist()
        img[top:bottom, left:right] = 0
        return img


def _noting(kind: Any, name: str, column: int | slice) -> Any:
    """A transform like `kind` that draws as it does, and writes its param `name` into a column of `note`."""

    def apply(self: Any, img: np.ndarray, **drawn: Any) -> np.ndarray:
        self.note[column] = drawn[name]
        return img

    metaclass: Any = type(kind)
    return metaclass(f"Noting{kind.__name__}", (kind,), {"apply": apply})


_ORIGINAL = (OriginalHSV, albumentations.Blur, albumentations.MedianBlur, BlackDropout)
"""Of what the original's pixel part is made, in its order."""
_NOTING = (
    _noting(OriginalHSV, "gains", GAINS),
    _noting(albumentations.Blur, "kernel", BLUR),
    _noting(albumentations.MedianBlur, "kernel", MEDIAN_BLUR),
    _noting(BlackDropout, "holes", HOLE),
)
"""The same, drawn and not done."""


class PixelDraw:
    """What a stage without transforms of the user would do to a crop: drawn alike, and left to `device` to be done."""

    def __init__(self, stage: AugmentationStage, input_size: tuple[int, int]) -> None:
        """Build the transforms.

        Args:
            stage: probabilities.
            input_size: (width, height) of crops.
        """
        self._steps = _original(stage, _NOTING)
        self._compose = _compose(self._steps, moves=False)
        self._blank = np.zeros((input_size[1], input_size[0], 3), dtype=np.uint8)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """(NUM_DRAWN,) int16; all that is random comes from the generator, as in `PixelAugmentation`."""
        note = np.zeros(NUM_DRAWN, dtype=np.int16)
        note[IS_DRAWN] = 1
        for step in self._steps:
            step.note = note
        _seed(self._compose, rng)
        self._compose(image=self._blank)
        return note


class PixelAugmentation:
    """The Compose of one stage. Not for several threads at once: albumentations keeps generators in its transforms."""

    def __init__(self, stage: AugmentationStage, keypoint_set: KeypointSet, where: str = "augmentation") -> None:
        """Build the transforms.

        Args:
            stage: probabilities, and the user's transforms.
            keypoint_set: says which keypoints change their names in a mirrored crop.
            where: what messages call the stage.

        Raises:
            ConfigError: a transform that albumentations does not have, or does not take these arguments.
        """
        self.original = _original(stage)
        self.extra = [build_transform(entry, f"{where}.extra[{i}]") for i, entry in enumerate(stage.extra)]
        self._compose = _compose([*self.original, *self.extra], moves=bool(self.extra))
        self._flip_index = keypoint_set.flip_index

    def __call__(self, crop: np.ndarray, keypoints: np.ndarray, visible: np.ndarray, rng: np.random.Generator) -> Pose:
        """A changed crop and its keypoints; the arguments stay as they are.

        Args:
            crop: (H, W, 3) uint8 RGB.
            keypoints: (K, 2) in crop pixels.
            visible: (K,), 0 or 1.
            rng: all that is random comes from it.
        """
        _seed(self._compose, rng)
        if not self.extra:
            return self._compose(image=crop)["image"], keypoints, visible
        return _move(self._compose, crop, keypoints, visible, self._flip_index)


def _seed(compose: Any, rng: np.random.Generator) -> None:
    compose.set_random_state(rng, random.Random(int(rng.integers(1 << 63))))


def _original(stage: AugmentationStage, kinds: Sequence[Any] = _ORIGINAL) -> list[Any]:
    """The original's steps, in its order."""
    hsv, blur, median_blur, dropout = kinds
    low, high = stage.dropout_size
    hole = {"num_holes_range": (1, 1), "hole_height_range": (low, high), "hole_width_range": (low, high)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name albumentations does not know is only a warning there
        steps = [
            hsv(stage),
            blur(blur_limit=BLUR_SIZES, p=stage.blur_prob),
            median_blur(blur_limit=BLUR_SIZES, p=stage.median_blur_prob),
            dropout(**hole, p=stage.dropout_prob),
        ]
    return [step for step in steps if step.p > 0]


def _compose(transforms: list[Any], *, moves: bool) -> Any:
    # Not remove_invisible: points outside of the crop, and behind a hole, stay in their places of the list.
    params = albumentations.KeypointParams(format="xy", remove_invisible=False) if moves else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Got processor for keypoints, but no transform")
        return albumentations.Compose(transforms, keypoint_params=params, is_check_shapes=False)


def _move(
    compose: Any, crop: np.ndarray, keypoints: np.ndarray, visible: np.ndarray, flip_index: Sequence[int] | np.ndarray
) -> Pose:
    """What a Compose makes of a crop and its keypoints.

    In a mirrored crop left and right change names. A keypoint that lay outside has no pixels that could have moved with
    it, and one that a transform lost has no place: neither is visible then.
    """
    height, width = crop.shape[:2]
    probes = (_PLACES * (width - PROBE, height - PROBE))[:, None] + _TRIANGLE
    before = np.vstack([keypoints, probes.reshape(-1, 2)])
    done = compose(image=crop, keypoints=np.column_stack([before, np.arange(len(before))]))
    rows = done["keypoints"][:, 2].round().astype(int)  # a transform may leave some out
    lost = np.ones(len(before), dtype=bool)
    lost[rows] = False
    after = before.copy()
    after[rows] = done["keypoints"][:, :2]
    has_moved = (np.abs(after - before) > _MOVED).any(axis=1)
    after[~has_moved] = before[~has_moved]  # as it was, and not as float32 has it
    outside = has_moved & ((before < 0) | (before > (width - 1, height - 1))).any(axis=1)
    num = len(keypoints)
    visible = np.where((outside | lost)[:num], 0, visible).astype(visible.dtype)
    moved, probes = after[:num], after[num:].reshape(-1, 3, 2)
    one, other = probes[:, 1] - probes[:, 0], probes[:, 2] - probes[:, 0]
    if np.sign(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum() < 0:
        moved, visible = moved[flip_index], visible[flip_index]
    return done["image"], moved, visible


def _follow_maps(_self: Any, keypoints: np.ndarray, map_x: np.ndarray, map_y: np.ndarray, **_: Any) -> np.ndarray:
    """Where a distortion takes keypoints (N, 2 and more columns), given whence it takes each pixel.

    In the place of the library's own way, which loses points closer than 3 pixels and those near the border, and knows
    whole pixels only. A point for which the map cannot be inverted, as in a fold, is left out.
    """
    maps = np.dstack([map_x, map_y]).astype(np.float32)
    last = np.array([maps.shape[1] - 1, maps.shape[0] - 1], dtype=np.float32)
    wanted = keypoints[:, :2].astype(np.float32)
    found = wanted.copy()
    for _step in range(INVERSION_STEPS):
        inside = np.clip(found, 0, last)  # beyond the border the distortion goes on as it was there
        taken = cv2.remap(maps, inside[None, :, 0], inside[None, :, 1], cv2.INTER_LINEAR)[0] + found - inside
        found += wanted - taken
    good = np.abs(wanted - taken).max(axis=1) < 1
    return np.column_stack([found, keypoints[:, 2:]])[good]


def build_transform(entry: Mapping[str, Any], where: str, **changes: Any) -> Any:
    """A transform of albumentations from `{Name: {argument: value}}`.

    Args:
        entry: one name; arguments may be None. `transforms` of OneOf and the like are such entries themselves.
        where: its place in params.yaml.
        **changes: arguments in place of those of the entry.

    Raises:
        ConfigError: there is no such transform, or it does not take these arguments.
    """
    ((name, arguments),) = entry.items()
    kind: Any = getattr(albumentations, name, None)
    bases = (albumentations.BasicTransform, BaseCompose)
    if not (inspect.isclass(kind) and issubclass(kind, bases)):
        known = [n for n, found in vars(albumentations).items() if inspect.isclass(found) and issubclass(found, bases)]
        raise ConfigError(f"{where}: albumentations has no transform {name!r}.{_nearest(name, known)}")
    values = {**(arguments or {}), **changes}
    known = list(inspect.signature(kind).parameters)
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(f"{where}: {name} has no argument {unknown[0]!r}.{_nearest(unknown[0], known)}")
    if issubclass(kind, BaseCompose) and isinstance(values.get("transforms"), list):
        inner = enumerate(values["transforms"])
        values["transforms"] = [build_transform(each, f"{where}.{name}.transforms[{i}]") for i, each in inner]
    if issubclass(kind, BaseDistortion):
        metaclass: Any = type(kind)
        kind = metaclass(name, (kind,), {"apply_to_keypoints": _follow_maps})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # values that do not fit are replaced by defaults with no more than one
            warnings.filterwarnings("ignore", message=".* is a special case of")
            return kind(**values)
    except ConfigError:
        raise
    except Exception as err:  # a transform may raise whatever it likes
        raise ConfigError(f"{where}: {name} does not take these arguments: {_reason(err)}.") from err


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(sorted(known)[:12])} ..."


def _reason(err: BaseException) -> str:
    """One clause; pydantic's own text takes four lines."""
    errors = getattr(err.__cause__, "errors", None)
    if errors is None:
        return (str(err) or type(err).__name__).split("\n")[0].rstrip(".")
    first = errors()[0]
    place = first["loc"][0] if first["loc"] else "together"
    return f"{place}: {first['msg'].split(chr(10))[0]}, got {first['input']!r}"


def check_extra(config: Config) -> None:
    """Build and try every transform that the user added, so that none fails in the middle of a training.

    Raises:
        ConfigError: one does not exist, does not take its arguments, or makes of a crop what cannot be trained on.
    """
    for stage in ("stage1", "stage2"):
        for i, entry in enumerate(getattr(config.augmentation, stage).extra):
            where = f"augmentation.{stage}.extra[{i}]"
            build_transform(entry, where)
            transform = build_transform(entry, where, p=1.0)
            (name,) = entry
            if fault := _try(transform, config.model.input_size):
                raise ConfigError(f"{where}: {name} {fault}.")


def _try(transform: Any, input_size: tuple[int, int]) -> str | None:
    """What is wrong with a transform, as the rest of a sentence that begins with its name."""
    width, height = input_size
    rng = np.random.default_rng(0)
    crop = cv2.resize(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8), (width, height))
    keypoints = rng.uniform(-0.2, 1.2, (20, 2)) * (width, height)
    visible, names = np.ones(len(keypoints)), np.arange(len(keypoints))
    for seed in range(TRIALS):
        results = []
        try:
            compose = _compose([transform], moves=True)
            for _ in range(2):
                compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results.append(_move(compose, crop.copy(), keypoints, visible, names))
        except Exception as err:
            return f"cannot be used on crops: {_reason(err)}"
        made, again = results
        if made[0].shape != crop.shape or made[0].dtype != crop.dtype:
            return (
                f"makes {made[0].dtype} {made[0].shape[1]} x {made[0].shape[0]} of a uint8 crop of {width} x {height}; "
                "it must keep size and kind"
            )
        if not np.isfinite(made[1]).all():
            return "puts keypoints nowhere"
        if not all(map(np.array_equal, made, again)):
            return "makes different crops of equal random numbers; a run could not be repeated"
    return None
