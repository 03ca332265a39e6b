"""Trunk, neck, arms, legs, hair and shoes of a clothed figure, as parts to be drawn from far to near."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cigpose.render.figure import Figure, Labels
from cigpose.render.hand import paint_hand
from cigpose.render.head import HeadPainter
from cigpose.render.paint import Canvas, Panel, Patch, along, convex_hull, ramp

STEPS = 128
"""Samples of a profile along its axis."""

# Radii along the axis in statures, before the person's girth.
_UPPER_ARM = ramp((0, 0.0315), (0.35, 0.0295), (1, 0.0235), steps=STEPS)
_FOREARM = ramp((0, 0.0235), (0.25, 0.0245), (1, 0.0165), steps=STEPS)
_THIGH = ramp((0, 0.053), (0.3, 0.051), (1, 0.0345), steps=STEPS)
_SHIN = ramp((0, 0.0345), (0.28, 0.0375), (0.8, 0.0225), (1, 0.021), steps=STEPS)
_NECK = ramp((0, 0.036), (0.2, 0.0305), (0.3, 0.0285), (1, 0.028), steps=STEPS)
# The trunk from crotch to neck: half widths of a chest and of hips of average breadth, and half depths.
_CHEST = ramp(
    (0, 0), (0.35, 0.06), (0.5, 0.079), (0.72, 0.096), (0.82, 0.098), (0.87, 0.09), (0.91, 0.075), (0.955, 0.052),
    (1, 0.036), steps=STEPS,
)  # fmt: skip
_HIPS = ramp((0, 0.05), (0.1, 0.087), (0.2, 0.095), (0.3, 0.089), (0.45, 0.08), (0.6, 0.06), (1, 0), steps=STEPS)
_DEPTH = ramp(
    (0, 0.05), (0.12, 0.066), (0.22, 0.068), (0.45, 0.057), (0.72, 0.069), (0.86, 0.056), (0.94, 0.042), (1, 0.034),
    steps=STEPS,
)  # fmt: skip

# The foot in statures from the ankle: outwards, down, backwards.
_SOLE = np.array(
    [(0, 0.042, 0.043), (0.017, 0.042, 0.036), (0.02, 0.042, 0.0), (0.025, 0.042, -0.045), (0.027, 0.042, -0.078),
     (0.015, 0.042, -0.1), (-0.006, 0.042, -0.112), (-0.02, 0.042, -0.102), (-0.024, 0.042, -0.07),
     (-0.019, 0.042, -0.02), (-0.018, 0.042, 0.03)]
)  # fmt: skip
_INSTEP = np.array(
    [(0.02, -0.004, 0.014), (-0.02, -0.004, 0.014), (0.017, -0.004, -0.018), (-0.017, -0.004, -0.018),
     (0, 0.008, 0.036), (0.015, 0.016, -0.055), (-0.015, 0.014, -0.055), (0.012, 0.022, -0.09), (-0.01, 0.02, -0.098)]
)  # fmt: skip
_TONGUE = np.array([(0.012, 0.012, -0.05), (-0.012, 0.011, -0.05), (0.01, 0.02, -0.088), (-0.01, 0.018, -0.094)])
_CAP = np.array([(0.025, 0.03, -0.076), (0.0, 0.018, -0.084), (-0.023, 0.03, -0.082)])
_LACES = np.array(
    [(x, y - 0.1 * (z + 0.034), z) for z in (-0.034, -0.046, -0.058) for x, y in ((0.012, 0.01), (-0.012, 0.008))]
)
_SHOE = np.concatenate([_SOLE, _SOLE - (0, 0.013, 0), _INSTEP, _TONGUE, _CAP, _LACES])
_SHOE_PARTS = np.cumsum([len(_SOLE), len(_SOLE), len(_INSTEP), len(_TONGUE), len(_CAP)])


class Part(NamedTuple):
    """Something to draw, and how far away it is."""

    depth: float
    draw: Callable[[], None]


def paint_figure(canvas: Canvas, figure: Figure) -> Labels:
    """Draw a person before everything that is there, and label them."""
    canvas.begin_person()
    for part in sorted(_body_parts(canvas, figure), key=lambda part: -part.depth):
        part.draw()
    return figure.label(canvas)


def _body_parts(canvas: Canvas, figure: Figure) -> list[Part]:
    """Everything to draw, unsorted."""
    parts = [*_trunk(canvas, figure), *_head(canvas, figure)]
    for side in ("left", "right"):
        parts += _arm(canvas, figure, side)
        parts += _leg(canvas, figure, side)
    return parts


def _loft(
    canvas: Canvas,
    start: np.ndarray,
    end: np.ndarray,
    radius: np.ndarray,
    color: np.ndarray,
    fold: float,
    seed: int = 0,
) -> Part:
    """A plain loft as a part."""
    return Part(float(start[2] + end[2]) / 2, lambda: canvas.loft(start, end, radius, color, fold=fold, fold_seed=seed))


def _head(canvas: Canvas, figure: Figure) -> list[Part]:
    pose, looks, unit = figure.person.pose, figure.person.looks, figure.head_unit
    painter = HeadPainter(canvas, figure.person.face, looks, pose.head, figure.project_head, unit)
    base, top = figure.local(pose.torso, 0, -0.28, 0.004), figure.project_head(np.array([[0, 0.75, 0.3]]))[0]
    radius, color = _NECK * figure.thickness(base[2]), (looks.skin * 0.93)[:, None]
    if looks.pattern != "tank":
        color = np.where(along(STEPS) < 0.2, looks.top[:, None] * 0.9, color)
    parts = [
        Part(float(figure.head_origin[2]) - 0.6 * unit, painter.paint),
        _loft(canvas, base, top, radius, color, 0.0),
    ]
    if looks.hair_style in _LOOSE_HAIR:
        parts.append(_loose_hair(canvas, figure))
    return parts


_LOOSE_HAIR = {
    "long": ((0, -0.1, 0.35), (0, 2.05, 0.62), ramp((0, 1.0), (0.5, 1.06), (0.85, 0.95), (1, 0.7), steps=STEPS), 0.5),
    "tail": ((0, -0.45, 1.25), (0, 1.6, 1.45), ramp((0, 0.25), (0.3, 0.36), (1, 0.12), steps=STEPS), 1.0),
    "bun": ((0, -0.95, 0.95), (0, -1.05, 1.05), ramp((0, 0.46), (1, 0.42), steps=STEPS), 1.0),
}
"""Hair style -> ends of the mass of hair in the head's frame, its radii, and its depth over its radius."""


def _loose_hair(canvas: Canvas, figure: Figure) -> Part:
    """Long hair, a pony tail or a bun."""
    looks = figure.person.looks
    first, last, radius, flatness = _LOOSE_HAIR[looks.hair_style]
    start, end = figure.project_head(np.array([first, last]))
    color, radius, bulge = (looks.hair * 0.92)[:, None], radius * figure.head_unit, np.full(STEPS, flatness)
    return Part(
        float(max(start[2], end[2])),
        lambda: canvas.loft(start, end, radius, color, bulge=bulge, fold=0.12, fold_seed=looks.texture),
    )


def _trunk(canvas: Canvas, figure: Figure) -> list[Part]:
    pose, looks = figure.person.pose, figure.person.looks
    start, end = figure.local(pose.pelvis, 0, 0.05, 0), figure.local(pose.torso, 0, -0.295, 0.0)
    half = np.maximum(_CHEST * (pose.build.shoulder / 0.104), _HIPS * (pose.build.hip / 0.054))
    axis = end[:2] - start[:2]
    axis = axis / (np.sqrt(axis @ axis) + 1e-6)
    across = np.array([-axis[1], axis[0], 0.0])
    lateral, back = pose.torso[:, 0], pose.torso[:, 2]
    radius = np.hypot(half * (lateral @ across), _DEPTH * (back @ across))
    bulge = np.hypot(half * lateral[2], _DEPTH * back[2]) / radius
    scale = figure.thickness((start[2] + end[2]) / 2)
    panel = None
    if looks.pattern == "jacket":
        sideways = (float(lateral @ across), -float(lateral[2]))
        ahead = (-float(back @ across), float(back[2]))
        panel = Panel(looks.second, 0.42, (0.16, 0.97), sideways, ahead, 0.08 * scale)
    color = _top_colors(figure)

    def draw() -> None:
        canvas.loft(
            start, end, radius * scale, color, bulge=bulge, caps=(2.5, 5.0), smooth=True, fold=0.055,
            fold_seed=looks.texture, panel=panel,
        )  # fmt: skip

    parts = [Part(float(start[2] + end[2]) / 2, draw)]
    bare = looks.pattern == "tank"
    for side, name in ((-1, "right_arm"), (1, "left_arm")):
        inner, outer = figure.local(pose.torso, side * 0.028, -0.281, 0.0), figure.limbs[name][0]
        shoulder = ramp((0, 0.016), (1, 0.0315 + (0.0 if bare else _loose(looks.sleeve) * 0.3)), steps=STEPS)
        cloth = (looks.skin if bare else looks.top)[:, None]
        parts.append(_loft(canvas, inner, outer, shoulder * figure.thickness(outer[2]), cloth, 0.0 if bare else 0.04))
    if looks.skirt:
        parts.append(_skirt(canvas, figure))
    return parts


def _top_colors(figure: Figure) -> np.ndarray:
    """(3, STEPS) colours of the trunk from the crotch up."""
    looks, position = figure.person.looks, along(STEPS)
    colors = np.repeat(looks.top[:, None], STEPS, axis=1)
    if looks.pattern == "stripes":
        colors = np.where((position * 11).astype(int) % 2 == 0, looks.second[:, None], colors)
    elif looks.pattern == "chest band":
        colors = np.where(np.abs(position - 0.64) < 0.09, looks.second[:, None], colors)
    elif looks.pattern == "tank":
        colors = np.where(position > 0.9, looks.skin[:, None], colors)
    hem = 0.05 + 0.17 * ((looks.texture % 97) / 96)
    edge = looks.bottom[:, None] * 0.6 if looks.texture % 3 == 0 else colors * 0.88
    colors = np.where(position < hem + 0.03, edge, colors)
    return np.where(position < hem, looks.bottom[:, None], colors)


def _skirt(canvas: Canvas, figure: Figure) -> Part:
    """A skirt that hangs from the waist around both thighs, its hem cut straight."""
    looks, pose = figure.person.looks, figure.person.pose
    knees = (figure.limbs["left_leg"][1], figure.limbs["right_leg"][1])
    start, reach = figure.local(pose.pelvis, 0, -0.04, 0), min(looks.skirt * 2, 1.25)
    end = start + ((knees[0] + knees[1]) / 2 - start) * reach
    scale = figure.thickness(start[2])
    gap = float(np.hypot(*(knees[0][:2] - knees[1][:2]))) / 2 * reach
    apart = abs(float(knees[0][2] - knees[1][2])) / 2 * reach
    radius = ramp((0, 0.07 * scale), (0.3, 0.1 * scale), (1, max(0.1 * scale, gap + 0.055 * scale)), steps=STEPS)
    # At the waist the top lies over the skirt; further down the skirt lies over the thighs.
    deep = max(0.118 * scale, apart + 0.07 * scale)
    thick = ramp((0, 0.04 * scale), (0.2, 0.064 * scale), (0.45, 0.118 * scale), (1, deep), steps=STEPS)
    color, bulge = looks.bottom[:, None], thick / radius
    return Part(
        float(start[2] + end[2]) / 2 - 0.05 * scale,
        lambda: canvas.loft(
            start, end, radius, color, bulge=bulge, caps=(4.0, 8.0), smooth=True, fold=0.1, fold_seed=looks.texture
        ),
    )


def _loose(cover: float) -> float:
    """How far a sleeve stands off at its end, in statures."""
    return 0.0055 if cover > 0.9 else 0.0075


def _arm(canvas: Canvas, figure: Figure, side: str) -> list[Part]:
    looks = figure.person.looks
    shoulder, elbow, wrist = figure.limbs[f"{side}_arm"]
    scale = figure.thickness(elbow[2])
    stripes = looks.second if looks.pattern == "stripes" else None
    parts = []
    bare = looks.skin[:, None]
    for part, (start, end, radius) in enumerate(((shoulder, elbow, _UPPER_ARM), (elbow, wrist, _FOREARM))):
        size, color, fold = _dress(radius, bare, part, looks.sleeve, _loose(looks.sleeve), looks.top, stripes)
        parts.append(_loft(canvas, start, end, size * scale, color, fold, looks.texture + part))
    hand, length = figure.hands[side], figure.hand_size
    palm_seen = bool(getattr(figure.person.pose, f"{side}_arm").frame[2, 2] < 0)
    depth = float(hand[:, 2].mean()) - 0.3 * length
    parts.append(Part(depth, lambda: paint_hand(canvas, hand, length, looks.skin, palm_seen)))
    return parts


def _leg(canvas: Canvas, figure: Figure, side: str) -> list[Part]:
    looks = figure.person.looks
    hip, knee, ankle = figure.limbs[f"{side}_leg"]
    scale = figure.thickness(knee[2])
    parts = []
    bare = looks.skin[:, None]
    for part, (start, end, radius) in enumerate(((hip, knee, _THIGH), (knee, ankle, _SHIN))):
        if part == 1:
            bare = np.where(along(STEPS) > 0.84, looks.socks[:, None], bare)
        size, color, fold = _dress(radius, bare, part, looks.trouser, 0.006, looks.bottom, None)
        parts.append(_loft(canvas, start, end, size * scale, color, fold, looks.texture + 5 + part))
    parts.append(Part(float(ankle[2]), lambda: _shoe(canvas, figure, side)))
    return parts


def _dress(
    radius: np.ndarray,
    color: np.ndarray,
    part: int,
    cover: float,
    loose: float,
    cloth: np.ndarray,
    stripes: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Put cloth on a limb's upper (part 0) or lower (part 1) half.

    Args:
        radius: (STEPS,) of the bare limb.
        color: (3, STEPS) or (3, 1) of the bare limb.
        part: 0 or 1.
        cover: share of the whole limb under cloth.
        loose: how far the cloth stands off at its end.
        cloth: (3,) its colour.
        stripes: (3,) colour of its stripes.

    Returns:
        Radii, colours, strength of the creases.
    """
    position = (part + along(STEPS)) / 2
    if position[0] >= cover:
        return radius, color, 0.0
    covered = position < cover
    fabric = cloth[:, None]
    if stripes is not None:
        fabric = np.where((position * 14).astype(int) % 2 == 0, stripes[:, None], fabric)
    slack = loose * (0.3 + 0.7 * position / cover) * covered
    if position[-1] > cover - 0.035:
        fabric = np.where(covered, np.where(position > cover - 0.035, fabric * 0.86, fabric), color)
    return radius + slack, fabric, 0.055


def _shoe(canvas: Canvas, figure: Figure, side: str) -> None:
    looks, leg = figure.person.looks, getattr(figure.person.pose, f"{side}_leg")
    points = figure.foot(side, _SHOE)
    size = 0.16 * figure.placement.stature
    sole, raised, instep, tongue, cap, laces = np.split(points[:, :2], _SHOE_PARTS)
    patch = Patch(canvas, points[:31, :2], 0.1 * size, looks.shoes, 80.0)
    if patch.box is None:
        return
    patch.polygon(convex_hull(np.concatenate([sole, raised])), looks.sole, solid=True, convex=True)
    patch.polygon(convex_hull(np.concatenate([raised, instep])), looks.shoes, solid=True, convex=True)
    if leg.frame[2, 1] < 0.2 or leg.frame[2, 2] > 0:
        patch.polygon(convex_hull(tongue), looks.shoes * 1.1 + 4, convex=True)
        patch.line(cap, looks.shoes * 0.78, 0.03 * size)
        patch.line(laces.reshape(3, 2, 2), looks.sole, 0.03 * size)
    tone = canvas.light.tone(np.array([0, -0.5, -0.85]))
    patch.compose(canvas, float(points[: len(_SOLE), 2].mean()) - 0.2 * size, tone)
