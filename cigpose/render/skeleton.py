"""A body as a kinematic tree: proportions, poses within joint limits, and where its joints end up.

Axes of every frame: x to the person's left, y down, z backwards, so a person with no rotation faces the camera and has
their left on the picture's right. Lengths are in statures, angles in radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cigpose.render.appearance import draw

Frame = np.ndarray
"""(3, 3) rotation; columns are the frame's axes in camera axes."""

UPPER_ARM, FOREARM, HAND = 0.168, 0.142, 0.108
THIGH, SHIN = 0.245, 0.24
SPINE = 0.295
HEAD_UNIT = 0.0505
"""Half the width of a face: the unit of `face.py`."""

ELBOW_LIMIT = 2.5
KNEE_LIMIT = 2.4


def rotate_x(angle: float) -> Frame:
    """Lean: positive bends the top of an upright body forward."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def rotate_y(angle: float) -> Frame:
    """Turn: positive turns the face to the person's left."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def rotate_z(angle: float) -> Frame:
    """Tilt: positive leans to the person's left."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` at length 1."""
    return vector / max(float(np.sqrt(vector @ vector)), 1e-9)


@dataclass(frozen=True)
class Build:
    """Proportions of one person."""

    shoulder: float
    """Half the distance of the shoulder joints."""
    hip: float
    """Half the distance of the hip joints."""
    girth: float
    """Thickness of limbs and trunk, 1 for average."""
    leg: float
    """Factor on the legs' length."""
    head: float
    """Factor on the head's size."""


@dataclass(frozen=True)
class ArmPose:
    """One arm in the frame of the torso, written for the left arm; the right one is its mirror image."""

    name: str
    upper: tuple[float, float, float]
    """Direction of the upper arm."""
    fore: tuple[float, float, float]
    """Direction of the forearm."""
    palm: tuple[float, float, float]
    """Where the palm looks."""
    weight: float
    raised: bool = False
    jitter: float = 0.12


ARM_POSES = (
    ArmPose("relaxed", (0.16, 1, 0.05), (0.10, 1, -0.22), (-1, 0, 0.15), 5),
    ArmPose("swung forward", (0.12, 1, -0.35), (0.02, 0.85, -0.65), (-1, 0, 0), 1.5),
    ArmPose("swung back", (0.14, 1, 0.4), (0.1, 1, 0.12), (-1, 0, 0), 1.5),
    ArmPose("away from the body", (0.55, 0.85, 0), (0.5, 0.9, -0.25), (-0.3, 0.2, -1), 1.5),
    ArmPose("on the hip", (0.74, 0.74, 0.22), (-0.72, 0.66, -0.34), (-0.4, 0.5, 0.6), 2),
    ArmPose("held out", (1, 0.1, -0.1), (1, 0.02, -0.2), (0, 0.6, -0.8), 1.2, jitter=0.2),
    ArmPose("carrying", (0.16, 1, -0.12), (-0.05, 0.15, -1), (-0.6, -0.8, 0), 1.4),
    ArmPose("before the chest", (0.36, 0.85, -0.42), (-0.86, -0.15, -0.5), (-0.2, 0.2, 1), 1.2),
    ArmPose("pointing forward", (0.15, 0.35, -0.95), (0.05, 0.1, -1), (-0.7, 0.7, 0), 0.7, jitter=0.2),
    ArmPose("gesturing", (0.3, 0.9, -0.3), (0.45, -0.3, -0.85), (-0.35, -0.9, -0.2), 1.6, jitter=0.2),
    ArmPose("waving", (0.86, 0.3, -0.2), (0.34, -0.95, -0.2), (0, 0, -1), 2.4, raised=True, jitter=0.16),
    ArmPose("overhead", (0.36, -0.93, -0.08), (0.08, -1, -0.08), (-0.2, 0, -1), 1.6, raised=True),
    ArmPose("raised wide", (0.75, -0.66, -0.05), (0.6, -0.82, -0.1), (0, 0, -1), 2.2, raised=True, jitter=0.16),
    ArmPose("showing the palm", (0.34, 0.55, -0.62), (0.3, -0.88, -0.4), (0, 0, -1), 1.6, raised=True),
    ArmPose("at the head", (0.85, -0.25, -0.1), (-0.42, -0.9, -0.12), (-0.7, 0.1, 0.5), 0.8, raised=True, jitter=0.08),
    ArmPose("at the chin", (0.22, 0.82, -0.55), (-0.28, -0.86, -0.42), (-0.4, -0.2, 0.9), 0.6, jitter=0.05),
)
"""`raised`: the hand ends above the shoulder."""
_RAISED = tuple(pose for pose in ARM_POSES if pose.raised)
_LOWERED = tuple(pose for pose in ARM_POSES if not pose.raised)


@dataclass(frozen=True)
class Limb:
    """Joints of one arm or leg and the frame of what hangs at its end."""

    joints: np.ndarray
    """(3, 3): shoulder, elbow, wrist or hip, knee, ankle."""
    frame: Frame
    """Hand: fingers, thumb side, palm normal. Foot: outwards, down, backwards (as the body)."""


@dataclass(frozen=True)
class Pose:
    """Where everything is, in statures, pelvis at the origin."""

    build: Build
    pelvis: Frame
    torso: Frame
    head: Frame
    neck: np.ndarray
    """(3,) base of the neck."""
    head_center: np.ndarray
    """(3,) between the ears, at the height of the eyes."""
    left_arm: Limb
    right_arm: Limb
    left_leg: Limb
    right_leg: Limb
    seated: bool
    legs_bent: bool
    """Sitting, crouching or with one foot up."""
    right_arm_raised: bool
    """The right hand is above its shoulder."""
    yaw: float


def sample_build(rng: np.random.Generator) -> Build:
    """Proportions of a random adult."""
    broad = rng.uniform(-1, 1)
    return Build(
        shoulder=0.104 + 0.008 * broad,
        hip=0.054 - 0.003 * broad,
        girth=float(np.clip(rng.normal(1.0, 0.11), 0.82, 1.35)),
        leg=rng.uniform(0.96, 1.03),
        head=rng.uniform(0.97, 1.1),
    )


def sample_yaw(rng: np.random.Generator) -> float:
    """Heading of the body: mostly towards the camera, a third from the side, some from behind."""
    kind, sign = rng.random(), 1.0 if rng.random() < 0.5 else -1.0
    if kind < 0.58:
        return float(rng.normal(0, 0.35))
    if kind < 0.84:
        return float(sign * rng.uniform(0.6, 1.75))
    return float(sign * rng.uniform(1.9, np.pi))


def sample_pose(rng: np.random.Generator, build: Build, turn: float, bent_legs: float) -> Pose:
    """A natural pose: standing, walking, stepping, crouching or sitting, each arm on its own.

    Args:
        rng: of the person.
        build: their proportions.
        turn: factor on the heading; 0 has everyone face the camera.
        bent_legs: share of people who do not stand or walk.
    """
    yaw = turn * sample_yaw(rng)
    upright, bent = 1 - bent_legs, bent_legs
    stance = draw(rng, (0.7 * upright, 0.3 * upright, 0.27 * bent, 0.15 * bent, 0.58 * bent))
    if stance == 4 and abs(yaw) > 1.8:
        yaw *= 0.5
    pelvis = rotate_y(yaw)
    lean = rng.normal(0.04, 0.07) + (0.5 if stance == 3 else 0.0)
    torso = pelvis @ rotate_x(lean) @ rotate_z(rng.normal(0, 0.06)) @ rotate_y(rng.normal(0, 0.12))
    to_camera = -min(max(yaw, -0.7), 0.7) * rng.uniform(0, 1.1) if abs(yaw) < 1.9 else 0.0
    head_turn = min(max(to_camera + rng.normal(0, 0.25), -1.1), 1.1)
    nod = min(max(rng.normal(0.0, 0.14), -0.35), 0.25)
    head = torso @ rotate_y(head_turn) @ rotate_x(nod) @ rotate_z(rng.normal(0, 0.09))
    neck = torso @ np.array([0, -SPINE, 0.0])
    center = neck + torso @ np.array([0, -0.046, 0.0]) + head @ np.array([0, -0.05, -0.012])
    left, _ = _pose_arm(rng, build, torso, 1.0)
    right, _ = _pose_arm(rng, build, torso, -1.0)
    legs = _pose_legs(rng, build, pelvis, stance)
    raised = right.joints[2, 1] < right.joints[0, 1]
    return Pose(
        build, pelvis, torso, head, neck, center, left, right, *legs, stance == 4, stance >= 2, bool(raised), yaw
    )


def _pose_arm(rng: np.random.Generator, build: Build, torso: Frame, side: float) -> tuple[Limb, ArmPose]:
    """One arm; `side` is 1 for the left, -1 for the right."""
    raise_it = rng.random() < 0.42
    choices = _RAISED if raise_it else _LOWERED
    pose = choices[draw(rng, tuple(pose.weight for pose in choices))]
    mirror = np.array([side, 1, 1])
    noise = rng.standard_normal((4, 3))
    upper = unit(pose.upper + pose.jitter * noise[0])
    upper[0] = max(upper[0], -0.15)
    fore = limit_bend(unit(upper), unit(pose.fore + pose.jitter * noise[1]), ELBOW_LIMIT)
    upper, fore = torso @ (unit(upper) * mirror), torso @ (fore * mirror)
    lift = max(0.0, -float(upper @ torso[:, 1]))
    shoulder = torso @ np.array([side * build.shoulder * (1 - 0.06 * lift), -0.254 - 0.024 * lift, 0])
    elbow = shoulder + UPPER_ARM * upper
    wrist = elbow + FOREARM * fore
    palm = torso @ (pose.palm * mirror + 0.25 * noise[2])
    hand = unit(fore + 0.22 * noise[3])
    palm = unit(palm - (palm @ hand) * hand)
    (px, py, pz), (hx, hy, hz) = palm.tolist(), hand.tolist()
    thumb = np.array([py * hz - pz * hy, pz * hx - px * hz, px * hy - py * hx]) * side
    return Limb(np.array([shoulder, elbow, wrist]), np.array([hand, thumb, palm]).T), pose


def limit_bend(first: np.ndarray, second: np.ndarray, limit: float) -> np.ndarray:
    """`second`, turned towards `first` where the angle between the two directions exceeds `limit`."""
    angle = math.acos(min(max(float(first @ second), -1.0), 1.0))
    if angle <= limit:
        return second
    across = unit(second - (second @ first) * first)
    return np.cos(limit) * first + np.sin(limit) * across


def _pose_legs(rng: np.random.Generator, build: Build, pelvis: Frame, stance: int) -> tuple[Limb, Limb]:
    """Both legs. Stances: 0 standing, 1 walking, 2 one foot up, 3 crouching, 4 sitting."""
    spread = abs(rng.normal(0.05, 0.07))
    flex = rng.normal(0.0, 0.05, 2)
    knee = np.abs(rng.normal(0.04, 0.06, 2))
    first = int(rng.integers(2))
    if stance == 1:
        stride = rng.uniform(0.2, 0.5)
        flex = np.array([stride, -stride * 0.8])
        knee = np.array([rng.uniform(0.05, 0.25), rng.uniform(0.2, 0.8)])
    elif stance == 2:
        flex[0], knee[0] = rng.uniform(0.6, 1.2), rng.uniform(0.9, 1.5)
    elif stance == 3:
        flex = rng.uniform(0.9, 1.3) + rng.normal(0, 0.1, 2)
        knee = flex + rng.uniform(0.6, 0.9)
        spread += rng.uniform(0.1, 0.3)
    elif stance == 4:
        flex = rng.uniform(1.3, 1.5) + rng.normal(0, 0.06, 2)
        knee = flex + rng.normal(0.0, 0.2, 2)
        spread += rng.uniform(0.02, 0.2)
    order = (first, 1 - first)
    legs = [
        _pose_leg(build, pelvis, side, (float(flex[i]), float(knee[i])), spread, rng.normal(0.18, 0.12))
        for side, i in zip((1.0, -1.0), order, strict=True)
    ]
    return legs[0], legs[1]


def _pose_leg(
    build: Build, pelvis: Frame, side: float, bend: tuple[float, float], spread: float, turnout: float
) -> Limb:
    """One leg from hip flexion and knee flexion, sideways spread and the foot's turn to the outside."""
    flex, knee = bend
    knee = min(max(knee, 0.0), KNEE_LIMIT)
    outward = side * np.sin(spread)
    thigh = unit(np.array([outward, np.cos(flex), -np.sin(flex)]))
    shin = unit(np.array([outward * 0.6, np.cos(flex - knee), -np.sin(flex - knee)]))
    hip = pelvis @ np.array([side * build.hip, 0.012, 0])
    at_knee = hip + pelvis @ thigh * (THIGH * build.leg)
    ankle = at_knee + pelvis @ shin * (SHIN * build.leg)
    # A planted foot is level; one whose shin lies far back stands on its toes.
    pitch = min(max(knee - flex - 0.35, 0.0), 1.1)
    foot = pelvis @ rotate_y(side * turnout) @ rotate_x(pitch * 0.8)
    return Limb(np.array([hip, at_knee, ankle]), foot)
