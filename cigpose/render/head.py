"""How a head is drawn: skull, face and hair.

Everything in the face hangs on its 68 landmarks, so the labels lie on what is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from cigpose.render.appearance import Appearance
from cigpose.render.face import CRANIUM_CENTER, CRANIUM_RADII, FIRM, Face, landmark_visible
from cigpose.render.paint import Canvas, Patch, convex_hull


def _strands() -> np.ndarray:
    """(14, 9, 3) unit vectors: arcs from the forehead over the crown to the nape."""
    arc, tilt = np.meshgrid(np.linspace(-1.4, 1.4, 9), np.linspace(-2.4, 2.4, 14))
    return np.stack([np.sin(tilt) * np.cos(arc), -np.cos(tilt) * np.cos(arc), np.sin(arc)], axis=2)


_STRANDS = _strands()
_EAR = np.array(
    [(1.0, 0.0, -0.02), (1.06, -0.12, 0.12), (1.08, -0.08, 0.3), (1.06, 0.12, 0.34), (1.03, 0.36, 0.2),
     (1.0, 0.44, 0.04), (0.98, 0.3, -0.06)]
)  # fmt: skip
"""Outline of the left ear."""
_SOCKET = np.array([1.25, 1.7])
_RING = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 40, endpoint=False)), np.sin(t)], axis=1)

Project = Callable[[np.ndarray], np.ndarray]
"""Head frame (N, 3) to x, y, depth in pixels (N, 3)."""


class HeadPainter:
    """Draws one head."""

    def __init__(
        self, canvas: Canvas, face: Face, looks: Appearance, frame: np.ndarray, project: Project, unit: float
    ) -> None:
        """`frame`: the head's axes, (3, 3); `unit`: half a face's width in pixels."""
        self.canvas, self.face, self.looks, self.frame, self.project, self.unit = (
            canvas,
            face,
            looks,
            frame,
            project,
            unit,
        )
        self.points = project(face.landmarks)
        self.origin = project(np.zeros((1, 3)))[0]

    def paint(self) -> None:
        """Skull, ears, face, hair."""
        reach = {"afro": 1.75, "beanie": 1.5}.get(self.looks.hair_style, 1.45)
        around = self.origin[:2] + np.array([[-reach, -reach - 0.25], [reach, 1.7]]) * self.unit
        self.patch = Patch(self.canvas, around, 0.1 * self.unit, self.looks.skin, 130.0)
        if self.patch.box is None:
            return
        self._surface()
        facing = self.frame[2, 2]
        self._hair_at_the_back()
        self._ears(far=True)
        hull = np.concatenate([self.face.landmarks[:27], (FIRM * self.face.shape)])
        outline = np.concatenate([self.project(hull)[:, :2], self._cranium_outline(1.0)])
        self.patch.polygon(convex_hull(outline), self.looks.skin, solid=True, convex=True)
        if facing > -0.3:
            self._features()
        self._hair()
        self._ears(far=False)
        self._brim()
        self.patch.compose(self.canvas, self.depth, self.shade)

    def _skin(self, factor: float) -> np.ndarray:
        return self.looks.skin * factor

    def _px(self, *indices: int) -> np.ndarray:
        return self.points[list(indices), :2]

    def _cranium_outline(self, scale: float) -> np.ndarray:
        """(40, 2) pixels: silhouette of the cranium's ellipsoid."""
        radii = CRANIUM_RADII * self.face.shape * scale
        matrix = (self.frame * radii**2) @ self.frame.T
        low = math.sqrt(matrix[0, 0])
        slant = matrix[0, 1] / low
        root = np.array([[low, 0.0], [slant, math.sqrt(matrix[1, 1] - slant**2)]])
        center = self.project((CRANIUM_CENTER * self.face.shape)[None])[0, :2]
        return center + self.unit * _RING @ root.T

    def _surface(self) -> None:
        """Cast rays at the head's ellipsoids: depth and shading per pixel, head coordinates of the hair's surface."""
        left, top, right, bottom = self.patch.box or (0, 0, 1, 1)
        size = (right - left, bottom - top)
        grid = (min(size[0], 30), min(size[1], 38))
        xs = (np.arange(grid[0]) + 0.5) * (size[0] / grid[0]) - 0.5 + left - self.origin[0]
        ys = (np.arange(grid[1]) + 0.5) * (size[1] / grid[1]) - 0.5 + top - self.origin[1]
        u, v = np.meshgrid(xs / self.unit, ys / self.unit)
        whole = (np.array([0, 0.12, -0.02]), np.array([1.03, 1.5, 1.12]))
        surface, normal, _, _ = self._cast(u, v, *whole)
        light = self.canvas.light
        lit = 0.5 + 0.5 * np.einsum("chw,c->hw", normal, light.direction)
        shade = (light.ambient + light.diffuse * lit**2) * (0.8 + 0.2 * np.clip(-normal[2], 0, 1))
        # What stands out of the ellipsoid, nose and ears, is not as dark as its rim.
        shade = np.maximum(shade, light.ambient + 0.22 * light.diffuse)
        self.shade = cv2.resize(shade.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        depth = (self.origin[2] + self.unit * surface[2]).astype(np.float32)
        self.depth = cv2.resize(depth, size, interpolation=cv2.INTER_LINEAR)
        swell = {"afro": 1.5, "beanie": 1.13, "crop": 1.03}.get(self.looks.hair_style, 1.1)
        self.swell = swell
        head, _, hit, middle = self._cast(
            u, v, CRANIUM_CENTER * self.face.shape, CRANIUM_RADII * self.face.shape * swell
        )
        near = np.minimum(self._hair_field(np.einsum("dc,dhw->chw", self.frame, head)), hit)
        head[2] = 2 * middle - head[2]
        far = np.minimum(self._hair_field(np.einsum("dc,dhw->chw", self.frame, head)), hit)
        full = (self.patch.color.shape[1], self.patch.color.shape[0])
        grown = cv2.resize(np.dstack([near, far]).astype(np.float32), full, interpolation=cv2.INTER_LINEAR)
        self.hair_mask, self.hair_behind = (np.where(field > 0, 255, 0).astype(np.uint8) for field in cv2.split(grown))

    def _cast(
        self, u: np.ndarray, v: np.ndarray, center: np.ndarray, radii: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Nearest points (3, h, w) and normals of an ellipsoid under parallel rays, camera axes.

        Also by how much a ray hits, negative where it misses, and the depth halfway through the ellipsoid, (h, w).
        """
        cx, cy, cz = self.frame @ center
        x, y = u - cx, v - cy
        m = (self.frame / radii**2) @ self.frame.T
        b = m[0, 2] * x + m[1, 2] * y
        c = m[0, 0] * x * x + 2 * m[0, 1] * x * y + m[1, 1] * y * y - 1
        square = b * b - m[2, 2] * c
        middle = -b / m[2, 2]
        z = middle - np.sqrt(np.maximum(square, 0)) / m[2, 2]
        normal = np.einsum("dc,chw->dhw", m, np.stack([x, y, z]))
        normal /= np.sqrt((normal**2).sum(axis=0)) + 1e-9
        return np.stack([x + cx, y + cy, z + cz]), normal, square, middle + cz

    def _hair_field(self, head: np.ndarray) -> np.ndarray:
        """Positive where hair grows, for head coordinates (3, h, w)."""
        x, y, z = head / self.face.shape[:, None, None]
        style = self.looks.hair_style
        if style == "bald":
            return np.full(y.shape, -1.0)
        if style == "beanie":
            return -0.42 - 0.1 * np.clip(z, -1, 1) * -1 - y
        front = -0.78 + (0.1 if style == "crop" else 0.0)
        nape = {"crop": 0.5, "long": 1.2, "tail": 0.75, "bun": 0.75}.get(style, 0.72)
        side = {"crop": -0.05, "long": 0.5, "afro": 0.3}.get(style, 0.12)
        line = np.interp(
            z, (-1.2, -0.8, -0.5, -0.2, 0.1, 0.35, 0.7), (front, front + 0.1, -0.42, side, side + 0.1, nape, nape)
        )
        if style not in ("crop", "afro", "beanie"):
            line = line + 0.16 * np.clip(x * self.looks.parting, -0.4, 1) * (z < 0)
        return line - y

    def _features(self) -> None:
        """Everything between brows and chin."""
        patch, unit, p = self.patch, self.unit, self._px
        right, left = self.frame[2] @ (-0.5, 0, -0.85) < -0.02, self.frame[2] @ (0.5, 0, -0.85) < -0.02
        if self.looks.beard:
            self._beard()
        for seen, first in ((right, 36), (left, 42)):
            if seen:
                self._eye(first)
        brow = self.looks.hair * 0.75 + self.looks.skin * 0.12
        for seen, first in ((right, 17), (left, 22)):
            if seen:
                patch.line(p(*range(first, first + 5)), brow, 0.07 * unit)
        self._nose()
        self._mouth()
        if self.looks.glasses and self.frame[2, 2] > 0.3:
            self._glasses()

    def _eye(self, first: int) -> None:
        ring = self.points[first : first + 6, :2]
        patch, unit = self.patch, self.unit
        center = ring.sum(axis=0) / 6
        patch.polygon(center + (ring - center) * _SOCKET, self._skin(0.86))
        patch.polygon(ring, (244, 242, 240))
        wide, high = (ring.max(axis=0) - ring.min(axis=0)).tolist()
        iris = center + np.array([self.face.gaze[0] * wide, self.face.gaze[1] * high - 0.02 * unit])
        radius = min(0.56 * max(high, 0.12 * unit), 0.14 * unit)
        patch.disc(iris, radius, self.looks.iris)
        patch.disc(iris, radius * 0.55, (18, 14, 14))
        patch.disc(iris - (0.035 * unit, 0.04 * unit), 0.025 * unit, (250, 250, 250))
        patch.line(ring[:4], (38, 28, 26), 0.05 * unit)
        patch.line(ring[[3, 4, 5, 0]], self._skin(0.66), 0.025 * unit)

    def _nose(self) -> None:
        patch, unit, p = self.patch, self.unit, self._px
        turn = self.frame[2, 0]
        # The nose stands out of the face's outline when seen from the side.
        patch.polygon(convex_hull(p(27, 28, 29, 30, 31, 33, 35)), self._skin(0.985), solid=True, convex=True)
        shaded = 31 if (turn if abs(turn) > 0.15 else -self.canvas.light.direction[0]) < 0 else 35
        patch.polygon(p(27, 28, 29, 30, shaded), self._skin(0.9))
        patch.line(p(31, 32, 33, 34, 35), self._skin(0.66), 0.04 * unit)
        for a, b, seen in ((31, 32, turn > -0.55), (35, 34, turn < 0.55)):
            if seen:
                nostril = 0.35 * self.points[a, :2] + 0.65 * self.points[b, :2]
                patch.disc(nostril - (0, 0.02 * unit), 0.045 * unit, self._skin(0.42))
        patch.disc(self.points[30, :2] - (0, 0.05 * unit), 0.06 * unit, self._skin(1.08))

    def _mouth(self) -> None:
        patch, unit, p = self.patch, self.unit, self._px
        patch.polygon(p(*range(48, 60)), self.looks.lips, solid=True)
        patch.polygon(p(48, 49, 50, 51, 52, 53, 54, 64, 63, 62, 61, 60), self.looks.lips * 0.86, solid=True)
        inner = p(*range(60, 68))
        gap = float(np.linalg.norm(self.points[62, :2] - self.points[66, :2]))
        if gap > 0.05 * unit and abs(self.frame[2, 0]) < 0.8:
            patch.polygon(inner, (66, 24, 26))
            teeth = np.concatenate([p(60, 61, 62, 63, 64), 0.55 * p(63, 62, 61) + 0.45 * p(65, 66, 67)])
            patch.polygon(teeth, (236, 232, 224))
        else:
            patch.line(p(60, 61, 62, 63, 64), self.looks.lips * 0.5, 0.035 * unit)
        patch.line(self.points[[58, 57, 56], :2] + (0, 0.05 * unit), self._skin(0.84), 0.03 * unit)

    def _beard(self) -> None:
        colour = self.looks.hair * self.looks.beard + self.looks.skin * (1 - self.looks.beard)
        cheeks = self.face.landmarks[[3, 48, 31, 33, 35, 54, 13]] * (1, 1, 1.02)
        ring = np.concatenate([self.face.landmarks[3:14], cheeks[::-1]])
        seen = landmark_visible(self.face, self.frame)
        if seen[[3, 13]].any():
            self.patch.polygon(self.project(ring)[:, :2], colour)

    def _glasses(self) -> None:
        dark, unit = (40, 36, 38), self.unit
        for first in (36, 42):
            ring = self.points[first : first + 6, :2]
            center = ring.mean(axis=0)
            self.patch.line(np.concatenate([r := _circle(center, 0.29 * unit), r[:1]]), dark, 0.035 * unit)
        self.patch.line(self._px(39, 42) - (0, 0.03 * unit), dark, 0.035 * unit)

    def _hair_at_the_back(self) -> None:
        """The hair seen past the head."""
        if self.looks.hair_style == "bald":
            return
        color = (self.looks.hat if self.looks.hair_style == "beanie" else self.looks.hair) * 0.8
        behind = np.empty_like(self.patch.color)
        cv2.rectangle(behind, (0, 0), behind.shape[1::-1], color.tolist(), -1)
        cv2.copyTo(behind, self.hair_behind, self.patch.color)
        cv2.bitwise_or(self.patch.alpha, self.hair_behind, self.patch.alpha)

    def _hair(self) -> None:
        style, patch = self.looks.hair_style, self.patch
        if style == "bald":
            return
        color = self.looks.hat if style == "beanie" else self.looks.hair
        # Strands, or the knit of a cap: arcs over the crown, kept inside the hair.
        behind, strands = patch.color, np.empty_like(patch.color)
        cv2.rectangle(strands, (0, 0), strands.shape[1::-1], color.tolist(), -1)
        patch.color = strands
        crown, radii = CRANIUM_CENTER * self.face.shape, CRANIUM_RADII * self.face.shape * self.swell
        lines = self.project((crown + _STRANDS * radii).reshape(-1, 3)).reshape(_STRANDS.shape)
        for parity, tone in ((0, 0.85), (1, 1.13)):
            strokes = np.stack([lines[parity::2, :-1], lines[parity::2, 1:]], axis=2).reshape(-1, 2, 3)
            near = strokes[:, 0, 2] + strokes[:, 1, 2] < 2 * self.project(crown[None])[0, 2]
            patch.line(strokes[near, :, :2], color * tone, 0.055 * self.unit)
        patch.color = behind
        cv2.copyTo(strands, self.hair_mask, behind)
        cv2.bitwise_or(patch.alpha, self.hair_mask, patch.alpha)

    def _ears(self, *, far: bool) -> None:
        covered = self.looks.hair_style in ("long", "afro")
        for side in (-1.0, 1.0):
            near = self.frame[2, 0] * side < 0.0
            if near == far or covered:
                continue
            shape = self.project(_EAR * (side, 1, 1) * self.face.shape)[:, :2]
            self.patch.polygon(shape, self._skin(0.9), solid=True)
            middle = shape.mean(axis=0)
            self.patch.polygon(middle + (shape - middle) * 0.55, self._skin(0.74))

    def _brim(self) -> None:
        if self.looks.hair_style != "beanie":
            return
        angle = np.linspace(0, 2 * np.pi, 41)
        y = -0.4 + 0.08 * -np.sin(angle)
        level = np.sqrt(np.maximum(0, 1 - ((y - CRANIUM_CENTER[1]) / CRANIUM_RADII[1]) ** 2)) * 1.14
        ring = np.stack([np.cos(angle) * level, y, np.sin(angle) * level + 0.06], axis=1) * self.face.shape
        seen = (np.stack([np.cos(angle), 0 * y, np.sin(angle)], axis=1) @ self.frame[2]) < 0.1
        pixels = self.project(ring)[:, :2]
        for start, stop in _runs(seen):
            self.patch.line(pixels[start:stop], self.looks.hat * 0.82, 0.2 * self.unit, solid=True)


def _circle(center: np.ndarray, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    return center + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Stretches [start, stop) of at least two true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a > 1]
