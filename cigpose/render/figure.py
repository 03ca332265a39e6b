"""One person on the canvas: the pose is projected, the parts are sorted by depth and drawn, the keypoints collected."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cigpose.render import skeleton
from cigpose.render.appearance import Appearance, sample_appearance
from cigpose.render.face import Face, ear_points, eye_points, landmark_visible, sample_face
from cigpose.render.hand import Hand, hidden_in_hand, palm_outline, sample_hand
from cigpose.render.paint import Canvas
from cigpose.render.skeleton import Limb, Pose, sample_build, sample_pose

LEFT_HAND, RIGHT_HAND, FACE, FOOT = slice(91, 112), slice(112, 133), slice(23, 91), slice(17, 23)

FOOT_POINTS = np.array([(-0.015, 0.034, -0.106), (0.025, 0.036, -0.08), (0.0, 0.034, 0.041)])
"""Big toe, small toe, heel in statures from the ankle: outwards, down, backwards."""


@dataclass(frozen=True)
class Person:
    """A sampled person: who, how, and how they look."""

    pose: Pose
    face: Face
    left_hand: Hand
    right_hand: Hand
    looks: Appearance


def sample_person(rng: np.random.Generator, turn: float, bent_legs: float) -> Person:
    """A random person; `turn` and `bent_legs` as in `RenderConfig`."""
    build = sample_build(rng)
    pose = sample_pose(rng, build, turn, bent_legs)
    face, left, right, looks = sample_face(rng), sample_hand(rng), sample_hand(rng), sample_appearance(rng)
    if looks.skirt and pose.legs_bent:
        looks = replace(looks, skirt=0.0, trouser=0.45)
    return Person(pose, face, left, right, looks)


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
        result = np.empty((len(points), 3))
        result[:, 0] = self.x + scale * points[:, 0]
        result[:, 1] = self.y + scale * points[:, 1]
        result[:, 2] = self.stature * points[:, 2]
        return result


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
        self.feet = {side: self.foot(side, FOOT_POINTS) for side in ("left", "right")}

    def project_head(self, points: np.ndarray) -> np.ndarray:
        """Head frame (N, 3) to x, y, depth in pixels; the head is small enough for parallel rays."""
        return self.head_origin + self.head_unit * (points @ self.person.pose.head.T)

    def _hand_points(self, arm: Limb, hand: Hand) -> np.ndarray:
        return arm.joints[2] + (hand.points * skeleton.HAND) @ arm.frame.T

    def foot(self, side: str, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) in statures from an ankle (outwards, down, backwards) to x, y, depth in pixels."""
        leg: Limb = getattr(self.person.pose, f"{side}_leg")
        outward = np.array([1.0 if side == "left" else -1.0, 1, 1])
        return self.placement.project(leg.joints[2] + (points * outward) @ leg.frame.T)

    def local(self, frame: np.ndarray, *point: float) -> np.ndarray:
        """(3,) pixels of a point in a frame at the pelvis."""
        return self.placement.project((frame @ np.array(point))[None])[0]

    def thickness(self, depth: float) -> float:
        """Pixels per stature of a radius at a depth in pixels, for this person's girth."""
        return float(self.placement.scale(depth / self.placement.stature)) * self.person.pose.build.girth

    def label(self, canvas: Canvas) -> Labels:
        """The keypoints of the figure just painted; what lies deeper than the body's surface at its pixel is hidden."""
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
