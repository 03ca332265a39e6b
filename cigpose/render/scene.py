"""A whole picture: background, people from far to near, what stands before them, and the annotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cigpose.config import RenderConfig
from cigpose.render.annotate import annotate, whole_visibility
from cigpose.render.appearance import CLOTH_COLORS
from cigpose.render.background import draw_background, draw_context
from cigpose.render.body import paint_figure
from cigpose.render.figure import Figure, Labels, Placement, sample_person
from cigpose.render.paint import Canvas, Light, Patch, noise_field

LIFT = 0.545
"""Height of the pelvis over the ground in statures."""


@dataclass(frozen=True)
class Drawn:
    """One person on the canvas."""

    figure: Figure
    labels: Labels
    silhouette: np.ndarray
    board: np.ndarray | None
    """(H, W) bool: the board of `hide_arm`, if there is one."""


def render_image(config: RenderConfig, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Picture number `index` (from 0) of a rendered dataset.

    Returns:
        (H, W, 3) uint8 RGB, and the annotations without their ids. A function of `config` and `index` alone.
    """
    rng = np.random.default_rng((config.seed, index))
    width, height = config.image_size
    background, horizon = draw_background(rng, width, height, config.clutter)
    figures = _cast_figures(rng, config, horizon)
    for figure in figures:
        _context(np.random.default_rng(rng.integers(1 << 62)), config, background, figure)
    canvas = Canvas(background, _light(rng))
    owner = np.zeros((height, width), np.int8)
    drawn: list[Drawn] = []
    for number, figure in enumerate(figures, start=1):
        person_rng = np.random.default_rng(rng.integers(1 << 62))
        _ground_shadow(canvas, figure)
        if figure.person.pose.seated:
            _seat(canvas, person_rng, figure)
        labels = paint_figure(canvas, figure)
        silhouette = canvas.cover > 0.5
        np.copyto(owner, number, where=silhouette)
        occluded, hidden = person_rng.random() < config.occlusion, person_rng.random() < config.hide_arm
        if occluded:
            np.copyto(owner, 0, where=_occluder(canvas, person_rng, figure))
        board = None
        if hidden:
            board = _hide_right_arm(canvas, np.random.default_rng(person_rng.integers(1 << 62)), figure)
        drawn.append(Drawn(figure, labels, silhouette, board))
    annotations = [_annotation(person, number, owner, drawn) for number, person in enumerate(drawn, start=1)]
    return _develop(canvas, rng), [annotation for annotation in annotations if annotation is not None]


def _annotation(person: Drawn, number: int, owner: np.ndarray, everyone: list[Drawn]) -> dict[str, Any] | None:
    height, width = owner.shape
    row = np.clip(np.floor(person.labels.points[:, 1] + 0.5).astype(int), 0, height - 1)
    column = np.clip(np.floor(person.labels.points[:, 0] + 0.5).astype(int), 0, width - 1)
    near = np.zeros(133, bool)
    # The tip of a finger may lie on the rim of its own silhouette: one pixel of grace.
    for dy, dx in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
        near |= owner[np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1)] == number
    boarded = np.zeros(133, bool)
    for other in everyone[number - 1 :]:
        if other.board is not None:
            boarded |= other.board[row, column]
    judged = whole_visibility(person.labels, ~near, width, height)
    visibility = whole_visibility(person.labels, ~near | boarded, width, height)
    return annotate(person.labels, visibility, judged, person.silhouette, person.figure.placement.stature)


def _light(rng: np.random.Generator) -> Light:
    direction = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-0.9, -0.25), -rng.uniform(0.5, 1.0)])
    return Light(direction / np.linalg.norm(direction), rng.uniform(0.42, 0.55), rng.uniform(0.62, 0.8))


def _cast_figures(rng: np.random.Generator, config: RenderConfig, horizon: int) -> list[Figure]:
    """Who is in the picture and where, from far to near."""
    width, height = config.image_size
    shares = np.array([0.52, 0.32, 0.16] + [0.1] * max(config.max_persons - 3, 0))[: config.max_persons]
    count = 1 + int(rng.choice(len(shares), p=shares / shares.sum()))
    slots = (rng.permutation(count) + 0.5 + rng.uniform(-0.42, 0.42, count)) / count
    # Some groups stand close together, so that people hide each other.
    spread = rng.uniform(0.35, 1.0)
    slots = 0.5 + (1 - spread) * rng.uniform(-0.35, 0.35) + spread * (slots - 0.5)
    figures = []
    for slot in slots:
        person = sample_person(rng, config.turn, config.bent_legs)
        view = rng.random()
        if count == 1 and view < config.close_ups:
            stature = height * rng.uniform(1.15, 1.9)
        elif count == 1 and view > max(0.9, config.close_ups):
            stature = height * rng.uniform(0.42, 0.6)
        else:
            stature = height * rng.uniform(0.62, 0.98) * (1.0, 0.96, 0.9)[min(count, 3) - 1]
        reach = 0.2 if count == 1 else 0.0
        x = width * (0.5 + rng.uniform(-reach, reach) if count == 1 else slot)
        feet = max(limb.joints[2, 1] for limb in (person.pose.left_leg, person.pose.right_leg)) + 0.042
        tall = (feet - person.pose.head_center[1] + 0.09) * stature
        if tall > 1.02 * height:
            y = height * rng.uniform(0.12, 0.3) - (person.pose.head_center[1] - 0.05) * stature
        else:
            ground = min(height * rng.uniform(0.93, 1.0), height - 2)
            ground = max(ground - rng.uniform(0, 0.12) * height, tall + 2, horizon + 0.05 * height)
            y = ground - feet * stature
        figures.append(Figure(person, Placement(float(x), float(y), float(stature), rng.uniform(2.8, 6))))
    return sorted(figures, key=lambda figure: figure.placement.stature)


def _context(rng: np.random.Generator, config: RenderConfig, background: np.ndarray, figure: Figure) -> None:
    """Hang up the context object beside the right arm: orange for a raised one if it agrees, else blue."""
    present, agrees = rng.random() < config.context, rng.random() < config.spurious_context
    size = figure.placement.stature * rng.uniform(0.26, 0.34)
    offset = (rng.uniform(-0.34, -0.26), rng.uniform(-0.3, -0.18))
    if present:
        center = figure.local(figure.person.pose.pelvis, offset[0], offset[1], 0.1)[:2]
        draw_context(background, rng, center, size, figure.person.pose.right_arm_raised == agrees)


def _ground_shadow(canvas: Canvas, figure: Figure) -> None:
    """Darken the ground under both feet."""
    for name in ("left_leg", "right_leg"):
        x, y, _ = figure.limbs[name][2] + (0, 0.035 * figure.placement.stature, 0)
        wide, tall = 0.1 * figure.placement.stature, 0.024 * figure.placement.stature
        box = canvas.clip_box(x - 2 * wide, y - 2.5 * tall, x + 2 * wide, y + 2.5 * tall)
        if box is None:
            continue
        left, top, right, bottom = box
        across = np.exp(-(((np.arange(left, right) - x) / wide) ** 2))
        down = np.exp(-(((np.arange(top, bottom) - y) / tall) ** 2))
        canvas.color[:, top:bottom, left:right] *= (1 - 0.5 * down[:, None] * across).astype(np.float32)


def _seat(canvas: Canvas, rng: np.random.Generator, figure: Figure) -> None:
    """A box or a chair under a sitting person."""
    pose = figure.person.pose
    bottom = max(pose.left_leg.joints[2, 1], pose.right_leg.joints[2, 1]) + 0.042
    wide, back, front, top = rng.uniform(0.11, 0.17), rng.uniform(0.1, 0.15), -0.12, 0.062
    color = np.clip(np.array((132, 108, 86)) * rng.uniform(0.5, 1.4) + rng.normal(0, 14, 3), 20, 235)
    with_back = bool(rng.random() < 0.4)
    corners = np.array([(x, y, z) for x in (-wide, wide) for y in (top, bottom) for z in (front, back)])
    faces = [
        ((0, 1, 5, 4), (0, -1, 0)), ((0, 1, 3, 2), (-1, 0, 0)), ((4, 5, 7, 6), (1, 0, 0)), ((0, 2, 6, 4), (0, 0, -1)),
        ((1, 3, 7, 5), (0, 0, 1)),
    ]  # fmt: skip
    canvas.begin_person()
    pixels = figure.placement.project(corners @ pose.pelvis.T)[:, :2]
    rest = figure.placement.project(
        np.array([(x, y, back) for x, y in ((-wide, -0.3), (wide, -0.3), (wide, top), (-wide, top))]) @ pose.pelvis.T
    )[:, :2]
    patch = Patch(canvas, np.concatenate([pixels, rest]), 2, color, 200.0)
    if patch.box is None:
        return
    if with_back:
        patch.polygon(rest, color * 0.86, solid=True)
    for face, normal in faces:
        turned = pose.pelvis @ np.array(normal, float)
        if turned[2] < 0.05 or normal[1]:
            patch.polygon(pixels[list(face)], color * canvas.light.tone(turned), solid=True)
    patch.compose(canvas, 0.0)


def _cover(canvas: Canvas, patch: Patch) -> np.ndarray:
    """Lay a patch before everything and say what it hides, (H, W) bool."""
    canvas.begin_person()
    patch.compose(canvas, 0.0)
    return canvas.cover > 0.5


def _occluder(canvas: Canvas, rng: np.random.Generator, figure: Figure) -> np.ndarray:
    """Something before the person: a table, a box, a post, a plant, a carried board. Returns what it hides, (H, W)."""
    kind, size = int(rng.integers(5)), figure.placement.stature
    color = CLOTH_COLORS[int(rng.integers(len(CLOTH_COLORS)))] * rng.uniform(0.6, 0.95)
    x, knee = figure.placement.x, float(figure.limbs["left_leg"][1][1])
    shift, wide, tall = rng.uniform(-0.22, 0.22) * size, rng.uniform(0.16, 0.36) * size, rng.uniform(0.12, 0.3) * size
    low = float(canvas.height) if kind != 4 else 0.0
    if kind in (0, 1):
        top = knee - rng.uniform(-0.05, 0.2) * size
        shape = np.array(
            [(x + shift - wide, top), (x + shift + wide, top), (x + shift + wide, low + 4), (x + shift - wide, low + 4)]
        )
    elif kind == 2:
        wide = rng.uniform(0.015, 0.045) * size
        at = x + shift * 1.4
        shape = np.array([(at - wide, -4), (at + wide, -4), (at + wide, low + 4), (at - wide, low + 4)])
    else:
        side = "left_arm" if rng.random() < 0.5 else "right_arm"
        cx, cy, _ = figure.limbs[side][1] + (0, 0.1 * size, 0)
        turn, half = rng.uniform(-0.5, 0.5), 0.5 * np.array([tall * 0.7, tall])
        axes = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
        shape = (cx, cy) + (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half) @ axes
    patch = Patch(canvas, shape, 1, color, 160.0)
    if patch.box is None:
        return np.zeros((canvas.height, canvas.width), bool)
    patch.polygon(shape, color, solid=True, convex=True)
    edge, middle = color * 1.18 + 6, shape.mean(axis=0)
    patch.line(np.concatenate([shape, shape[:1]]), color * 0.7, 0.012 * size)
    if kind in (0, 1):
        patch.polygon(np.stack([shape[0], shape[1], shape[1] + (0, 0.05 * size), shape[0] + (0, 0.05 * size)]), edge)
    elif kind == 2:
        patch.line(np.array([(middle[0] - wide * 0.4, -4), (middle[0] - wide * 0.4, low + 4)]), edge, wide * 0.35)
    else:
        patch.polygon(middle + (shape - middle) * 0.7, edge)
    return _cover(canvas, patch)


def _hide_right_arm(canvas: Canvas, rng: np.random.Generator, figure: Figure) -> np.ndarray:
    """A board before the right arm, whatever its pose. Returns what it hides, (H, W) bool."""
    size, arm = figure.placement.stature, np.concatenate([figure.limbs["right_arm"], figure.hands["right"]])[:, :2]
    shoulder, outward = figure.limbs["right_arm"][0], -figure.person.pose.torso[0, 0]
    reach = outward * 0.3 * size
    # The same board for raised and lowered arms, so that it tells nothing; wider only where the arm would show.
    standard = np.array(
        [
            (shoulder[0] - 0.02 * size * outward, shoulder[1] - 0.32 * size),
            (shoulder[0] + reach, shoulder[1] + 0.36 * size),
        ]
    )
    around = np.concatenate([standard, arm[1:] - 0.025 * size, arm[1:] + 0.025 * size])
    (left, top), (right, bottom) = around.min(axis=0), around.max(axis=0)
    shape = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    color = np.array((150, 128, 100)) * rng.uniform(0.6, 1.25) + rng.normal(0, 8, 3)
    patch = Patch(canvas, shape, 1, color, 160.0)
    if patch.box is None:
        return np.zeros((canvas.height, canvas.width), bool)
    patch.polygon(shape, color, solid=True, convex=True)
    for t in np.linspace(0, 1, 7)[1:-1]:
        grain = left + (right - left) * (t + rng.normal(0, 0.02))
        patch.line(np.array([(grain, top), (grain + rng.normal(0, 2), bottom)]), color * 0.9, 0.008 * size)
    patch.line(np.concatenate([shape, shape[:1]]), color * 0.7, 0.014 * size)
    return _cover(canvas, patch)


def _develop(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Exposure, tint and grain of a photograph, (H, W, 3) uint8 RGB."""
    gain = rng.uniform(0.9, 1.08) * (1 + rng.normal(0, 0.025, 3))
    strength = rng.uniform(0.5, 2.8)
    shift = int(rng.integers(64))
    field = noise_field(canvas.height + 64, canvas.width + 64, 0.6, 11)
    grain = field[shift : shift + canvas.height, shift : shift + canvas.width]
    return canvas.develop(gain, grain, strength)
