"""One person on the canvas: the pose is projected, the parts are sorted by depth and drawn, the keypoints collected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cigpose.data.rendered import skeleton
from cigpose.data.rendered.appearance import Appearance, sample_appearance
from cigpose.data.rendered.face import Face, HeadPainter, ear_points, eye_points, landmark_visible, sample_face
from cigpose.data.rendered.hand import Hand, hidden_in_hand, paint_hand, palm_outline, sample_hand
from cigpose.data.rendered.paint import Canvas, Panel, Patch, ramp
from cigpose.data.rendered.skeleton import Limb, Pose, sample_build, sample_pose

STEPS = 48
LEFT_HAND, RIGHT_HAND, FACE, FOOT = slice(91, 112), slice(112, 133), slice(23, 91), slice(17, 23)

# Foot, in statures from the ankle: outwards, down, backwards.
SOLE = np.array(
    [(0, 0.042, 0.043), (0.017, 0.042, 0.036), (0.02, 0.042, 0.0), (0.025, 0.042, -0.045), (0.027, 0.042, -0.078),
     (0.015, 0.042, -0.1), (-0.006, 0.042, -0.112), (-0.02, 0.042, -0.102), (-0.024, 0.042, -0.07),
     (-0.019, 0.042, -0.02), (-0.018, 0.042, 0.03)]
)  # fmt: skip
UPPER = np.array(
    [(0.02, -0.004, 0.014), (-0.02, -0.004, 0.014), (0.017, -0.004, -0.018), (-0.017, -0.004, -0.018), (0, 0.008, 0.036),
     (0.015, 0.016, -0.055), (-0.015, 0.014, -0.055), (0.012, 0.022, -0.09), (-0.01, 0.02, -0.098)]
)  # fmt: skip
FOOT_POINTS = np.array([(-0.015, 0.034, -0.106), (0.025, 0.036, -0.08), (0.0, 0.034, 0.041)])
"""Big toe, small toe, heel."""


@dataclass(frozen=True)
class Person:
    """A sampled person: who, how, and how they look."""

    pose: Pose
    face: Face
    left_hand: Hand
    right_hand: Hand
    looks: Appearance


def sample_person(rng: np.random.Generator) -> Person:
    """A random person."""
    build = sample_build(rng)
    pose = sample_pose(rng, build)
    return Person(pose, sample_face(rng), sample_hand(rng), sample_hand(rng), sample_appearance(rng))


@dataclass(frozen=True)
class Placement:
    """Where a person stands in the picture: a pinhole camera of their own."""

    x: float
    y: float
    """Pixel of the pelvis."""
    stature: float
    """Pixels per stature at the pelvis."""
    distance: float
    """Of the camera, in statures."""

    def scale(self, z: np.ndarray | float) -> np.ndarray | float:
        """Pixels per stature at depth z."""
        return self.stature * self.distance / (self.distance + z)

    def project(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) statures from the pelvis to x, y, depth in pixels."""
        scale = self.stature * self.distance / (self.distance + points[:, 2])
        return np.stack(
            [self.x + scale * points[:, 0], self.y + scale * points[:, 1], self.stature * points[:, 2]], axis=1
        )


@dataclass(frozen=True)
class Labels:
    """What is known about one person's 133 keypoints once drawn."""

    points: np.ndarray
    """(133, 2) pixels, also of those outside the picture."""
    visible: np.ndarray
    """(133,) bool: neither the person's own body nor the border hides it."""
    face_turned_away: bool
    hand_sizes: tuple[float, float]
    """Length of left and right hand in pixels."""
    head_size: float
    """Height of the face in pixels."""


class Figure:
    """A person at a place, ready to be drawn."""

    def __init__(self, person: Person, placement: Placement) -> None:
        self.person, self.placement = person, placement
        pose, project = person.pose, placement.project
        self.limbs = {
            name: project(getattr(pose, name).joints) for name in ("left_arm", "right_arm", "left_leg", "right_leg")
        }
        scale = float(placement.scale(pose.head_center[2]))
        self.head_unit = skeleton.HEAD_UNIT * pose.build.head * scale
        self.head_origin = project(pose.head_center[None])[0]
        self.landmarks = self.project_head(person.face.landmarks)
        self.hands = {
            side: project(self._hand_points(getattr(pose, f"{side}_arm"), getattr(person, f"{side}_hand")))
            for side in ("left", "right")
        }
        self.hand_size = skeleton.HAND * placement.stature
        self.feet = {
            side: self._foot(getattr(pose, f"{side}_leg"), FOOT_POINTS, sign)
            for side, sign in (("left", 1), ("right", -1))
        }

    def project_head(self, points: np.ndarray) -> np.ndarray:
        """Head frame (N, 3) to x, y, depth in pixels; the head is small enough for parallel rays."""
        return self.head_origin + self.head_unit * (points @ self.person.pose.head.T)

    def _hand_points(self, arm: Limb, hand: Hand) -> np.ndarray:
        return arm.joints[2] + (hand.points * skeleton.HAND) @ arm.frame.T

    def _foot(self, leg: Limb, points: np.ndarray, side: int) -> np.ndarray:
        return self.placement.project(leg.joints[2] + (points * (side, 1, 1)) @ leg.frame.T)

    def local(self, frame: np.ndarray, *point: float) -> np.ndarray:
        """(3,) pixels of a point in a frame at the pelvis."""
        return self.placement.project((frame @ np.array(point))[None])[0]

    def paint(self, canvas: Canvas) -> Labels:
        """Draw the person before everything that is there, and label them."""
        canvas.begin_person()
        parts: list[tuple[float, Callable[[], None]]] = []
        parts += self._trunk(canvas)
        for side in ("left", "right"):
            parts += self._arm(canvas, side)
            parts += self._leg(canvas, side)
        parts += self._head(canvas)
        for _, draw in sorted(parts, key=lambda part: -part[0]):
            draw()
        return self._label(canvas)

    def _scale(self, depth: float) -> float:
        """Pixels per stature at a depth in pixels."""
        return float(self.placement.scale(depth / self.placement.stature)) * self.person.pose.build.girth

    def _head(self, canvas: Canvas) -> list[tuple[float, Callable[[], None]]]:
        pose, looks, unit = self.person.pose, self.person.looks, self.head_unit
        painter = HeadPainter(canvas, self.person.face, looks, pose.head, self.project_head, unit)
        parts: list[tuple[float, Callable[[], None]]] = [(self.head_origin[2] - 0.6 * unit, painter.paint)]
        base, top = self.local(pose.torso, 0, -0.272, 0.004), self.project_head(np.array([[0, 0.75, 0.3]]))[0]
        collar = np.where(np.arange(STEPS)[None] < 0.16 * STEPS, looks.top[:, None] * 0.94, looks.skin[:, None] * 0.93)
        if looks.pattern == "tank":
            collar = np.repeat(looks.skin[:, None] * 0.93, STEPS, axis=1)
        radius = ramp((0, 0.036), (0.14, 0.031), (0.16, 0.0285), (1, 0.028), steps=STEPS) * self._scale(base[2])
        parts.append((float(base[2]), lambda: canvas.loft(base, top, radius, collar)))
        if looks.hair_style in ("long", "tail", "bun"):
            parts.append(self._loose_hair(canvas))
        return parts

    def _loose_hair(self, canvas: Canvas) -> tuple[float, Callable[[], None]]:
        looks, unit = self.person.looks, self.head_unit
        color = (looks.hair * 0.92)[:, None]
        if looks.hair_style == "long":
            start, end = self.project_head(np.array([[0, -0.1, 0.35], [0, 2.05, 0.62]]))
            radius = unit * ramp((0, 1.0), (0.5, 1.06), (0.85, 0.95), (1, 0.7), steps=STEPS)
        elif looks.hair_style == "tail":
            start, end = self.project_head(np.array([[0, -0.45, 1.25], [0, 1.6, 1.45]]))
            radius = unit * ramp((0, 0.25), (0.3, 0.36), (1, 0.12), steps=STEPS)
        else:
            start, end = self.project_head(np.array([[0, -0.95, 0.95], [0, -1.05, 1.05]]))
            radius = unit * ramp((0, 0.46), (1, 0.42), steps=STEPS)
        bulge = 0.5 if looks.hair_style == "long" else 1.0
        seed = looks.texture
        return float(max(start[2], end[2])), lambda: canvas.loft(
            start, end, radius, color, bulge=bulge, fold=0.35, fold_seed=seed
        )

    def _trunk(self, canvas: Canvas) -> list[tuple[float, Callable[[], None]]]:
        pose, looks = self.person.pose, self.person.looks
        start, end = self.local(pose.pelvis, 0, 0.05, 0), self.local(pose.torso, 0, -0.295, 0.0)
        build = pose.build
        wide, hips = build.shoulder / 0.104, build.hip / 0.054
        half = ramp(
            (0, 0.05), (0.1, 0.088 * hips), (0.22, 0.094 * hips), (0.45, 0.079), (0.72, 0.095 * wide), (0.85, 0.094 * wide),
            (0.93, 0.062 * wide), (1, 0.034), steps=STEPS,
        )  # fmt: skip
        deep = ramp(
            (0, 0.05),
            (0.12, 0.066),
            (0.22, 0.068),
            (0.45, 0.056),
            (0.72, 0.068),
            (0.86, 0.056),
            (1, 0.034),
            steps=STEPS,
        )
        axis = end[:2] - start[:2]
        axis = axis / (np.sqrt(axis @ axis) + 1e-6)
        across = np.array([-axis[1], axis[0], 0.0])
        lateral, back = pose.torso[:, 0], pose.torso[:, 2]
        radius = np.hypot(half * (lateral @ across), deep * (back @ across))
        thick = np.hypot(half * lateral[2], deep * back[2])
        scale = self._scale((start[2] + end[2]) / 2)
        panel = None
        if looks.pattern == "jacket":
            panel = Panel(
                looks.second, 0.42, (0.16, 0.97), (float(lateral @ across), -float(lateral[2])), (-float(back @ across), float(back[2]))
            )  # fmt: skip
        color = self._top_colors()
        parts: list[tuple[float, Callable[[], None]]] = [
            (
                float((start[2] + end[2]) / 2),
                lambda: canvas.loft(
                    start,
                    end,
                    radius * scale,
                    color,
                    bulge=thick / radius,
                    fold=0.16,
                    fold_seed=looks.texture,
                    panel=panel,
                ),
            )
        ]
        for side in (-1, 1):
            inner = self.local(pose.torso, side * 0.035, -0.278, 0.0)
            outer = self.limbs["left_arm" if side > 0 else "right_arm"][0]
            bare = looks.pattern == "tank"
            strap = (looks.skin if bare else looks.top)[:, None]
            shoulder = np.array([0.026, 0.031]) * self._scale(outer[2])
            parts.append(
                (float((inner[2] + outer[2]) / 2), _lofted(canvas, inner, outer, shoulder, strap, 0.0 if bare else 0.1))
            )
        if looks.skirt:
            parts.append(self._skirt(canvas))
        return parts

    def _top_colors(self) -> np.ndarray:
        """(3, STEPS) colours of the trunk from the crotch up."""
        looks = self.person.looks
        along = np.linspace(0, 1, STEPS)
        colors = np.repeat(looks.top[:, None], STEPS, axis=1)
        if looks.pattern == "stripes":
            colors = np.where((along * 11).astype(int)[None] % 2 == 0, looks.second[:, None], colors)
        elif looks.pattern == "chest band":
            colors = np.where((np.abs(along - 0.64) < 0.09)[None], looks.second[:, None], colors)
        elif looks.pattern == "tank":
            colors = np.where((along > 0.9)[None], looks.skin[:, None], colors)
        hem = 0.05 + 0.17 * ((looks.texture % 97) / 96)
        belt = looks.bottom * 0.6
        colors = np.where(
            (along < hem + 0.03)[None], belt[:, None] if looks.texture % 3 == 0 else colors * 0.88, colors
        )
        return np.where((along < hem)[None], looks.bottom[:, None], colors)

    def _skirt(self, canvas: Canvas) -> tuple[float, Callable[[], None]]:
        looks, pose = self.person.looks, self.person.pose
        knees = [self.limbs[name][1] for name in ("left_leg", "right_leg")]
        start = self.local(pose.pelvis, 0, -0.04, 0)
        reach = min(looks.skirt * 2, 1.25)
        end = start + (np.mean(knees, axis=0) - start) * reach
        scale = self._scale(start[2])
        gap = float(np.hypot(*(knees[0][:2] - knees[1][:2]))) / 2 * reach
        radius = ramp((0, 0.082 * scale), (0.3, 0.1 * scale), (1, max(0.1 * scale, gap + 0.052 * scale)), steps=STEPS)
        color = looks.bottom[:, None]
        seed = looks.texture
        # The hem is cut straight: the round end would look like a balloon.
        return float((start[2] + end[2]) / 2), lambda: canvas.loft(
            start, start + (end - start) * 0.8, radius, color, bulge=0.75, fold=0.3, fold_seed=seed
        )

    def _arm(self, canvas: Canvas, side: str) -> list[tuple[float, Callable[[], None]]]:
        looks = self.person.looks
        shoulder, elbow, wrist = self.limbs[f"{side}_arm"]
        scale = self._scale(float(elbow[2]))
        loose = 0.0055 if looks.sleeve > 0.9 else 0.0075
        upper = ramp((0, 0.031), (0.35, 0.0295), (1, 0.0235), steps=STEPS)
        fore = ramp((0, 0.0235), (0.25, 0.0245), (1, 0.0165), steps=STEPS)
        stripes = looks.second if looks.pattern == "stripes" else None
        parts: list[tuple[float, Callable[[], None]]] = []
        for part, (start, end, radius) in enumerate(((shoulder, elbow, upper), (elbow, wrist, fore))):
            bare = np.repeat(looks.skin[:, None], STEPS, axis=1)
            size, color, fold = _dress(radius, bare, part, looks.sleeve, loose, looks.top, stripes)
            parts.append(
                (
                    float((start[2] + end[2]) / 2),
                    _lofted(canvas, start, end, size * scale, color, fold, looks.texture + part),
                )
            )
        points = self.hands[side]
        palm_seen = bool(getattr(self.person.pose, f"{side}_arm").frame[2, 2] < 0)
        skin, size = looks.skin, self.hand_size
        parts.append(
            (float(points[:, 2].mean()) - 0.3 * size, lambda: paint_hand(canvas, points, size, skin, palm_seen))
        )
        return parts

    def _leg(self, canvas: Canvas, side: str) -> list[tuple[float, Callable[[], None]]]:
        looks = self.person.looks
        hip, knee, ankle = self.limbs[f"{side}_leg"]
        scale = self._scale(float(knee[2]))
        thigh = ramp((0, 0.053), (0.3, 0.051), (1, 0.0345), steps=STEPS)
        shin = ramp((0, 0.0345), (0.28, 0.0375), (0.8, 0.0225), (1, 0.021), steps=STEPS)
        parts: list[tuple[float, Callable[[], None]]] = []
        for part, (start, end, radius) in enumerate(((hip, knee, thigh), (knee, ankle, shin))):
            bare = np.repeat(looks.skin[:, None], STEPS, axis=1)
            if part == 1:
                bare[:, int(0.84 * STEPS) :] = looks.socks[:, None]
            size, color, fold = _dress(radius, bare, part, looks.trouser, 0.006, looks.bottom, None)
            parts.append(
                (
                    float((start[2] + end[2]) / 2),
                    _lofted(canvas, start, end, size * scale, color, fold, looks.texture + 5 + part),
                )
            )
        parts.append((float(ankle[2]), lambda: self._paint_shoe(canvas, side)))
        return parts

    def _paint_shoe(self, canvas: Canvas, side: str) -> None:
        looks, leg = self.person.looks, getattr(self.person.pose, f"{side}_leg")
        sign = 1 if side == "left" else -1
        sole, upper = self._foot(leg, SOLE, sign), self._foot(leg, UPPER, sign)
        raised = self._foot(leg, SOLE - (0, 0.013, 0), sign)
        size = 0.16 * self.placement.stature
        patch = Patch(canvas, np.concatenate([sole, upper])[:, :2], 0.1 * size, looks.shoes, 100.0)
        if patch.box is None:
            return
        from cigpose.data.rendered.face import _hull

        dark = looks.shoes * 0.78
        patch.polygon(_hull(np.concatenate([sole, raised])[:, :2]), looks.sole, solid=True, convex=True)
        patch.polygon(_hull(np.concatenate([raised, upper])[:, :2]), looks.shoes, solid=True, convex=True)
        if leg.frame[2, 1] < 0.2 or leg.frame[2, 2] > 0:
            top = self._foot(
                leg,
                np.array([(0.012, 0.012, -0.05), (-0.012, 0.011, -0.05), (0.01, 0.02, -0.088), (-0.01, 0.018, -0.094)]),
                sign,
            )
            patch.polygon(_hull(top[:, :2]), np.clip(looks.shoes * 1.1 + 4, 0, 255), convex=True)
            cap = self._foot(leg, np.array([(0.025, 0.03, -0.076), (0.0, 0.018, -0.084), (-0.023, 0.03, -0.082)]), sign)
            patch.line(cap[:, :2], dark, 0.03 * size)
            for z in (-0.034, -0.046, -0.058):
                lace = self._foot(
                    leg, np.array([(0.012, 0.01 - 0.1 * (z + 0.034), z), (-0.012, 0.008 - 0.1 * (z + 0.034), z)]), sign
                )
                patch.line(lace[:, :2], looks.sole, 0.03 * size)
        shape = (patch.box[3] - patch.box[1], patch.box[2] - patch.box[0])
        tone = canvas.light.tone(np.array([0, -0.5, -0.85]))
        patch.compose(canvas, float(sole[:, 2].mean()) - 0.2 * size, np.full(shape, tone, np.float32))

    def _label(self, canvas: Canvas) -> Labels:
        """Collect the keypoints; what lies deeper than the body's surface at its pixel is hidden."""
        pose, size = self.person.pose, self.placement.stature
        points, slack = np.zeros((133, 3)), np.zeros(133)
        facing = np.ones(133, bool)
        eyes, ears = eye_points(self.person.face), ear_points(self.person.face)
        points[0], slack[0] = self.landmarks[30], 0.9 * self.head_unit
        points[1:3], slack[1:3] = self.project_head(eyes), 0.9 * self.head_unit
        points[3:5], slack[3:5] = self.project_head(ears), 1.0 * self.head_unit
        seen = landmark_visible(self.person.face, pose.head)
        facing[0], facing[1], facing[2] = seen[30], seen[42:48].any(), seen[36:42].any()
        facing[3], facing[4] = (pose.head[2, 0] * s < 0.3 for s in (1, -1))
        for joint, radius in enumerate((0.045, 0.034, 0.03)):
            points[5 + 2 * joint], points[6 + 2 * joint] = self.limbs["left_arm"][joint], self.limbs["right_arm"][joint]
            slack[5 + 2 * joint : 7 + 2 * joint] = radius * size
        for joint, radius in enumerate((0.075, 0.045, 0.04)):
            points[11 + 2 * joint], points[12 + 2 * joint] = (
                self.limbs["left_leg"][joint],
                self.limbs["right_leg"][joint],
            )
            slack[11 + 2 * joint : 13 + 2 * joint] = radius * size
        for start, side in ((17, "left"), (20, "right")):
            points[start : start + 3], slack[start : start + 3] = self.feet[side], 0.06 * size
            ahead = getattr(pose, f"{side}_leg").frame[2, 2]
            facing[start : start + 2], facing[start + 2] = ahead > -0.45, ahead < 0.55
        points[FACE], facing[FACE], slack[FACE] = self.landmarks, seen, 0.9 * self.head_unit
        for part, side in ((LEFT_HAND, "left"), (RIGHT_HAND, "right")):
            hand = self.hands[side]
            points[part], slack[part] = hand, 0.6 * self.hand_size
            facing[part] = ~hidden_in_hand(hand, self.hand_size, palm_outline(hand, self.hand_size))
        column, row = np.floor(points[:, 0] + 0.5).astype(int), np.floor(points[:, 1] + 0.5).astype(int)
        inside = (column >= 0) & (row >= 0) & (column < canvas.width) & (row < canvas.height)
        surface = canvas.depth[np.clip(row, 0, canvas.height - 1), np.clip(column, 0, canvas.width - 1)]
        visible = inside & facing & (surface >= points[:, 2] - slack - 1.5)
        away = float(pose.head[2, 2]) < -0.25
        sizes = tuple(float(np.ptp(self.hands[side][:, :2], axis=0).max()) for side in ("left", "right"))
        return Labels(points[:, :2], visible, away, (sizes[0], sizes[1]), 2.2 * self.head_unit)


def _lofted(
    canvas: Canvas,
    start: np.ndarray,
    end: np.ndarray,
    radius: np.ndarray,
    color: np.ndarray,
    fold: float,
    seed: int = 0,
) -> Callable[[], None]:
    """A loft to be drawn later."""
    return lambda: canvas.loft(start, end, radius, color, fold=fold, fold_seed=seed)


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
        color: (3, STEPS) of the bare limb.
        part: 0 or 1.
        cover: share of the whole limb under cloth.
        loose: how far the cloth stands off.
        cloth: (3,) its colour.
        stripes: (3,) colour of its stripes.

    Returns:
        Radii, colours, strength of the creases.
    """
    position = (part + np.linspace(0, 1, STEPS)) / 2
    covered = position < cover
    if not covered.any():
        return radius, color, 0.0
    fabric = np.repeat(cloth[:, None], STEPS, axis=1)
    if stripes is not None:
        fabric = np.where(((position * 14).astype(int) % 2 == 0)[None], stripes[:, None], fabric)
    cuff = covered & (position > cover - 0.035)
    fabric = np.where(cuff[None], fabric * 0.86, fabric)
    return radius + loose * covered, np.where(covered[None], fabric, color), 0.16
