"""The canvas on which people are drawn: shaded lofts with a depth buffer, and supersampled patches for small features.

Colours are RGB, 0 to 255. Positions are image pixels (x right, y down; pixel centres on whole numbers); depth is in
pixels too, growing away from the viewer. The canvas is planar, (3, H, W) float32, which numpy handles fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

FAR = 1e6
"""Depth where nothing has been drawn."""

Color = Sequence[float] | np.ndarray


@functools.lru_cache(maxsize=8)
def noise_field(height: int, width: int, sigma: float, seed: int) -> np.ndarray:
    """(height, width) float32 smooth noise of unit variance, always the same for the same arguments."""
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigma)
    field = noise / noise.std()
    field.setflags(write=False)
    return field


@dataclass(frozen=True)
class Light:
    """Where the light comes from and what shadows keep."""

    direction: np.ndarray
    """(3,) unit vector towards the light, camera axes."""
    ambient: float
    diffuse: float

    def tone(self, normal: np.ndarray) -> float:
        """Brightness of a flat surface with unit `normal` (3,)."""
        half = 0.5 + 0.5 * float(normal @ self.direction)
        return self.ambient + self.diffuse * half * half


class Canvas:
    """Picture, depth buffer and silhouette of the person being drawn."""

    def __init__(self, background: np.ndarray, light: Light) -> None:
        """Start from `background`, (H, W, 3) uint8 RGB."""
        self.height, self.width = background.shape[:2]
        self.color = np.ascontiguousarray(background.transpose(2, 0, 1), dtype=np.float32)
        self.light = light
        self.depth = np.full((self.height, self.width), FAR, np.float32)
        self.cover = np.zeros((self.height, self.width), np.float32)

    def begin_person(self) -> None:
        """Forget depth and silhouette: whatever is drawn now lies before all that is there."""
        self.depth.fill(FAR)
        self.cover.fill(0)

    def clip_box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int] | None:
        """Pixel box [left, top, right, bottom) around a region, cut to the picture; None if nothing is left."""
        left, top = max(int(np.floor(x0)) - 1, 0), max(int(np.floor(y0)) - 1, 0)
        right, bottom = min(int(np.ceil(x1)) + 2, self.width), min(int(np.ceil(y1)) + 2, self.height)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def blend(self, box: tuple[int, int, int, int], color: np.ndarray, alpha: np.ndarray, depth: np.ndarray) -> None:
        """Lay (3, h, w) `color` over the box where it is nearer, softly over one and a half pixels of depth."""
        left, top, right, bottom = box
        behind = self.depth[top:bottom, left:right]
        weight = (behind - depth) * np.float32(0.7)
        weight += np.float32(0.5)
        np.clip(weight, 0, 1, out=weight)
        weight *= alpha
        target = self.color[:, top:bottom, left:right]
        color -= target
        color *= weight
        target += color
        np.copyto(behind, depth, where=weight > 0.5)
        cover = self.cover[top:bottom, left:right]
        np.maximum(cover, alpha, out=cover)

    def loft(
        self,
        start: np.ndarray,
        end: np.ndarray,
        radius: np.ndarray,
        color: np.ndarray,
        *,
        bulge: float | np.ndarray = 1.0,
        fold: float = 0.0,
        fold_seed: int = 0,
        panel: Panel | None = None,
    ) -> None:
        """A shaded solid of round cross-section along a straight axis, with round ends.

        Args:
            start: (3,) x, y, depth of one end.
            end: (3,) of the other.
            radius: (N,) radii in pixels from start to end.
            color: (3, N) colours from start to end, or (3, 1).
            bulge: depth of the cross-section over its radius: a number or (N,).
            fold: strength of creases, 0 for smooth skin.
            fold_seed: which creases.
            panel: a differently coloured strip along the axis (open jacket, tie).
        """
        ax, ay, az = (float(v) for v in start)
        bx, by, bz = (float(v) for v in end)
        reach = float(radius.max())
        box = self.clip_box(min(ax, bx) - reach, min(ay, by) - reach, max(ax, bx) + reach, max(ay, by) + reach)
        if box is None:
            return
        left, top, right, bottom = box
        length = max(float(np.hypot(bx - ax, by - ay)), 1e-3)
        ux, uy = (bx - ax) / length, (by - ay) / length
        xs = np.arange(left, right, dtype=np.float32) - np.float32(ax)
        ys = (np.arange(top, bottom, dtype=np.float32) - np.float32(ay))[:, None]
        along = xs * np.float32(ux) + ys * np.float32(uy)
        across = xs * np.float32(-uy) + ys * np.float32(ux)
        clipped = np.clip(along, 0, np.float32(length))
        along -= clipped
        steps = len(radius)
        index = (clipped * np.float32((steps - 1) / length) + np.float32(0.5)).astype(np.intp)
        size = radius.astype(np.float32)[index]
        squared = across * across
        squared += along * along
        alpha = size - np.sqrt(squared)
        alpha += np.float32(0.5)
        np.clip(alpha, 0, 1, out=alpha)
        inverse = 1 / size
        toward = 1 - squared * inverse * inverse
        np.maximum(toward, 0, out=toward)
        np.sqrt(toward, out=toward)
        lift = (
            size
            if isinstance(bulge, float) and bulge == 1.0
            else size * (np.float32(bulge) if isinstance(bulge, float) else np.asarray(bulge, np.float32)[index])
        )
        depth = clipped * np.float32((bz - az) / length) + np.float32(az) - toward * lift
        lx, ly, lz = self.light.direction
        side = across * inverse
        shade = side * np.float32(-uy * lx + ux * ly)
        shade += along * inverse * np.float32(ux * lx + uy * ly)
        shade -= toward * np.float32(lz)
        if fold:
            crease = noise_field(self.height + 256, self.width + 256, 2.2, 7)
            oy, ox = (fold_seed * 37) % 255, (fold_seed * 91) % 255
            shade += crease[top + oy : bottom + oy, left + ox : right + ox] * np.float32(fold)
        shade *= np.float32(0.5)
        shade += np.float32(0.5)
        shade *= shade
        shade *= np.float32(self.light.diffuse)
        shade += np.float32(self.light.ambient)
        shade *= np.float32(0.72) + np.float32(0.28) * toward
        colors = color.astype(np.float32)
        painted = np.repeat(shade[None], 3, axis=0)
        painted *= colors[:, :, None] if colors.shape[1] == 1 else np.take(colors, index, axis=1)
        if panel is not None:
            panel.paint(painted, side, toward, index / np.float32(steps - 1), shade)
        self.blend(box, painted, alpha, depth)

    def picture(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return np.ascontiguousarray(np.clip(self.color, 0, 255).astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True)
class Panel:
    """A strip on the front of a loft, such as the shirt under an open jacket."""

    color: np.ndarray
    """(3,)"""
    half_width: float
    """Of the strip, in half widths of the body."""
    span: tuple[float, float]
    """Where along the axis it begins and ends, 0 to 1."""
    lateral: tuple[float, float]
    """The body's lateral axis in (across, towards the viewer) components."""
    front: tuple[float, float]
    """The body's forward axis in the same."""

    def paint(
        self, color: np.ndarray, across: np.ndarray, toward: np.ndarray, along: np.ndarray, shade: np.ndarray
    ) -> None:
        """Recolour the strip in (3, h, w) `color`; the other arrays are (h, w) surface coordinates and brightness."""
        sideways = np.abs(across * np.float32(self.lateral[0]) + toward * np.float32(self.lateral[1]))
        ahead = across * np.float32(self.front[0]) + toward * np.float32(self.front[1])
        taper = self.half_width * (0.35 + 0.65 * (along - self.span[0]) / (self.span[1] - self.span[0]))
        inside = (sideways < taper) & (ahead > 0) & (along > self.span[0]) & (along < self.span[1])
        for channel in range(3):
            np.copyto(color[channel], shade * np.float32(self.color[channel]), where=inside)


class Patch:
    """A small picture drawn several times too large, then averaged down and laid on the canvas."""

    def __init__(self, canvas: Canvas, points: np.ndarray, margin: float, fill: Color, detail: float) -> None:
        """Cover `points` (N, 2) with `margin` pixels around; `detail`: supersampled size of the larger side."""
        low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
        self.box = canvas.clip_box(low[0], low[1], high[0], high[1])
        if self.box is None:
            return
        left, top, right, bottom = self.box
        self.scale = int(np.clip(np.ceil(detail / max(high - low)), 2, 8))
        shape = ((bottom - top) * self.scale, (right - left) * self.scale)
        self.color = np.empty((*shape, 3), np.uint8)
        self.color[:] = np.clip(fill, 0, 255)
        self.alpha = np.zeros(shape, np.uint8)
        self.shift = np.array([left, top], np.float64) - 0.5

    def to_patch(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) image pixels to int32 patch coordinates with 4 fractional bits."""
        return np.round(((points - self.shift) * self.scale - 0.5) * 16).astype(np.int32)

    def polygon(self, points: np.ndarray, color: Color, *, solid: bool = False, convex: bool = False) -> None:
        """Fill a polygon (N, 2); `solid` polygons belong to the outline of the patch, others only tint it."""
        corners = self.to_patch(points)
        fill = cv2.fillConvexPoly if convex else _fill_polygon
        fill(self.color, corners, _bgr(color), lineType=cv2.LINE_8, shift=4)
        if solid:
            fill(self.alpha, corners, 255, lineType=cv2.LINE_8, shift=4)

    def line(self, points: np.ndarray, color: Color, width: float, *, solid: bool = False) -> None:
        """A polyline (N, 2) of a width in image pixels."""
        corners = [self.to_patch(points)]
        thickness = max(round(width * self.scale), 1)
        cv2.polylines(self.color, corners, False, _bgr(color), thickness, cv2.LINE_8, 4)
        if solid:
            cv2.polylines(self.alpha, corners, False, 255, thickness, cv2.LINE_8, 4)

    def disc(self, center: np.ndarray, radius: float, color: Color, *, solid: bool = False) -> None:
        """A filled circle, radius in image pixels."""
        x, y = (int(v) for v in self.to_patch(np.asarray(center)[None])[0])
        size = max(round(radius * self.scale * 16), 4)
        cv2.circle(self.color, (x, y), size, _bgr(color), -1, cv2.LINE_8, 4)
        if solid:
            cv2.circle(self.alpha, (x, y), size, 255, -1, cv2.LINE_8, 4)

    def compose(self, canvas: Canvas, depth: float | np.ndarray, shade: np.ndarray | None = None) -> None:
        """Lay the patch on the canvas at a depth (a number or (h, w) pixels), times a brightness (h, w)."""
        if self.box is None:
            return
        left, top, right, bottom = self.box
        size = (right - left, bottom - top)
        color = cv2.resize(self.color, size, interpolation=cv2.INTER_AREA)
        alpha = cv2.resize(self.alpha, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        alpha *= np.float32(1 / 255)
        planes = np.ascontiguousarray(color.transpose(2, 0, 1), dtype=np.float32)
        if shade is not None:
            planes *= shade
        canvas.blend(self.box, planes, alpha, np.broadcast_to(np.asarray(depth, np.float32), alpha.shape))


def _bgr(color: Color) -> tuple[int, int, int]:
    """A colour as OpenCV wants it. The canvas is RGB throughout, so the order stays."""
    red, green, blue = color
    return (
        min(max(int(red), 0), 255),
        min(max(int(green), 0), 255),
        min(max(int(blue), 0), 255),
    )


def _fill_polygon(image: np.ndarray, corners: np.ndarray, color: object, lineType: int, shift: int) -> None:  # noqa: N803
    cv2.fillPoly(image, [corners], color, lineType=lineType, shift=shift)


def ramp(*stops: tuple[float, float], steps: int = 48) -> np.ndarray:
    """(steps,) smooth profile through (position 0 to 1, value) stops."""
    positions, values = zip(*stops, strict=True)
    return np.interp(np.linspace(0, 1, steps), positions, values)
