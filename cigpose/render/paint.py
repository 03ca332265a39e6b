"""The canvas on which people are drawn: shaded lofts with a depth buffer, and supersampled patches for small features.

Colours are RGB, 0 to 255. Positions are image pixels (x right, y down; pixel centres on whole numbers); depth is in
pixels too, growing away from the viewer. The canvas is planar, (3, H, W) float32, which numpy handles fastest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

FAR = 1e6
"""Depth where nothing has been drawn."""

_ZERO, _ONE = np.float32(0), np.float32(1)

Color = Sequence[float] | np.ndarray


@functools.lru_cache(maxsize=8)
def noise_field(height: int, width: int, sigma: float, seed: int) -> np.ndarray:
    """(height, width) float32 smooth noise of unit variance, always the same for the same arguments."""
    raw = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    noise = np.asarray(cv2.GaussianBlur(raw, (0, 0), sigma), np.float32)
    field: np.ndarray = noise / noise.std()
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
        self.color = np.stack(cv2.split(background)).astype(np.float32)
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

    def blend(
        self,
        box: tuple[int, int, int, int],
        color: np.ndarray,
        alpha: np.ndarray,
        depth: np.ndarray,
        softness: float = 1.5,
    ) -> None:
        """Lay (3, h, w) `color` over the box where it is nearer, fading over `softness` pixels of depth."""
        left, top, right, bottom = box
        behind = self.depth[top:bottom, left:right]
        weight = (behind - depth) * np.float32(1 / softness)
        weight += np.float32(0.5)
        np.minimum(np.maximum(weight, _ZERO, out=weight), _ONE, out=weight)
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
        bulge: np.ndarray | None = None,
        caps: tuple[float, float] = (1.0, 1.0),
        smooth: bool = False,
        fold: float = 0.0,
        fold_seed: int = 0,
        panel: Panel | None = None,
    ) -> None:
        """A shaded solid of round cross-section along a straight axis.

        Args:
            start: (3,) x, y, depth of one end.
            end: (3,) of the other.
            radius: (N,) radii in pixels from start to end.
            color: (3, N) colours from start to end, or (3, 1).
            bulge: (N,) depth of the cross-section over its radius; None for circles.
            caps: how much flatter than a hemisphere the two ends are.
            smooth: radii change gradually everywhere (no cuffs), also where they change fast.
            fold: strength of creases, 0 for smooth skin.
            fold_seed: which creases.
            panel: a differently coloured strip along the axis (open jacket, tie).
        """
        (ax, ay, az), (bx, by, bz) = start.tolist(), end.tolist()
        reach = float(radius.max())
        box = self.clip_box(min(ax, bx) - reach, min(ay, by) - reach, max(ax, bx) + reach, max(ay, by) + reach)
        if box is None:
            return
        left, top, right, bottom = box
        length = max(float(np.hypot(bx - ax, by - ay)), 1e-3)
        ux, uy = (bx - ax) / length, (by - ay) / length
        xs = np.arange(left - ax, right - ax - 1e-6, dtype=np.float32)
        ys = np.arange(top - ay, bottom - ay - 1e-6, dtype=np.float32)[:, None]
        along = xs * np.float32(ux) + ys * np.float32(uy)
        across = xs * np.float32(-uy) + ys * np.float32(ux)
        clipped = np.maximum(along, _ZERO)
        np.minimum(clipped, np.float32(length), out=clipped)
        along -= clipped
        if caps != (1.0, 1.0):
            along *= np.where(along < 0, np.float32(caps[0]), np.float32(caps[1]))
        place = clipped * np.float32((len(radius) - 1) / length)
        index = (place + np.float32(0.5)).astype(np.intp)
        distance = across * across
        distance += along * along
        np.sqrt(distance, out=distance)
        size, alpha = _outline(radius, place, index, distance, length if smooth else None)
        inverse = np.float32(1) / size
        toward = distance
        toward *= inverse
        toward *= toward
        np.subtract(_ONE, toward, out=toward)
        np.sqrt(np.maximum(toward, _ZERO, out=toward), out=toward)
        depth = toward * (size if bulge is None else np.take((radius * bulge).astype(np.float32), index, mode="clip"))
        np.subtract(clipped * np.float32((bz - az) / length) + np.float32(az), depth, out=depth)
        across *= inverse
        along *= inverse
        shade = self._shade(box, (ux, uy), across, along, toward, fold, fold_seed)
        if color.shape[1] == 1:
            painted = shade * color.astype(np.float32)[:, :, None]
        else:
            painted = np.take(color.astype(np.float32), index, axis=1, mode="clip")
            painted *= shade
        if panel is not None:
            panel.paint(painted, across, toward, index / np.float32(len(radius) - 1), shade)
        self.blend(box, painted, alpha, depth, 1.0 + 0.07 * reach)

    def _shade(
        self,
        box: tuple[int, int, int, int],
        axis: tuple[float, float],
        across: np.ndarray,
        along: np.ndarray,
        toward: np.ndarray,
        fold: float,
        fold_seed: int,
    ) -> np.ndarray:
        """Brightness (h, w) of a surface whose normal is `across` and `along` an axis and `toward` the viewer."""
        left, top, right, bottom = box
        ux, uy = axis
        lx, ly, lz = self.light.direction
        shade = across * np.float32(0.5 * (ux * ly - uy * lx))
        shade += along * np.float32(0.5 * (ux * lx + uy * ly))
        shade += toward * np.float32(0.04 - 0.5 * lz)
        if fold:
            crease = noise_field(self.height + 256, self.width + 256, 3.2, 7)
            oy, ox = (fold_seed * 37) % 255, (fold_seed * 91) % 255
            shade += crease[top + oy : bottom + oy, left + ox : right + ox] * np.float32(0.5 * fold)
        shade += np.float32(0.46)
        shade *= shade
        shade *= np.float32(self.light.diffuse)
        shade += np.float32(self.light.ambient - 0.04)
        return shade

    def develop(self, gain: np.ndarray, grain: np.ndarray, strength: float) -> np.ndarray:
        """Expose: add noise (H, W), multiply each channel by its gain (3,). (H, W, 3) uint8 RGB."""
        planes = [cv2.scaleAdd(grain, strength, plane) for plane in self.color]
        return cv2.merge([cv2.convertScaleAbs(plane, alpha=factor) for plane, factor in zip(planes, gain, strict=True)])


def _outline(
    radius: np.ndarray, place: np.ndarray, index: np.ndarray, distance: np.ndarray, length: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Radius of a loft at each pixel and the pixel's coverage, (h, w) each.

    Args:
        radius: (N,) radii in pixels along the axis.
        place: (h, w) position along the axis, 0 to N - 1.
        index: `place` as whole numbers.
        distance: (h, w) pixels from the axis.
        length: of the axis in pixels, to interpolate the radii; None to keep steps (cuffs) sharp.
    """
    size = np.take(radius.astype(np.float32), index, mode="clip")
    if length is None:
        alpha = size - distance
    else:
        slope = np.empty(len(radius), np.float32)
        np.subtract(radius[1:], radius[:-1], out=slope[1:])
        slope[0] = 0
        size += (place - index) * np.take(slope, index, mode="clip")
        slope *= (len(radius) - 1) / length
        # Where the outline runs at an angle to the axis, its edge is nearer than measured across it.
        alpha = (size - distance) * np.take(1 / np.sqrt(1 + np.minimum(slope * slope, 9)), index, mode="clip")
    alpha += np.float32(0.5)
    np.minimum(np.maximum(alpha, _ZERO, out=alpha), _ONE, out=alpha)
    return size, alpha


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
    sharpness: float
    """Half width of the body in pixels: the strip's edge is one pixel soft."""

    def paint(
        self, color: np.ndarray, across: np.ndarray, toward: np.ndarray, along: np.ndarray, shade: np.ndarray
    ) -> None:
        """Recolour the strip in (3, h, w) `color`; the other arrays are (h, w) surface coordinates and brightness."""
        sideways = np.abs(across * np.float32(self.lateral[0]) + toward * np.float32(self.lateral[1]))
        ahead = across * np.float32(self.front[0]) + toward * np.float32(self.front[1])
        taper = self.half_width * (0.35 + 0.65 * (along - self.span[0]) / (self.span[1] - self.span[0]))
        inside = np.clip((taper - sideways) * np.float32(self.sharpness) + np.float32(0.5), 0, 1)
        inside *= (ahead > 0) & (along > self.span[0]) & (along < self.span[1])
        color += inside * (shade * self.color.astype(np.float32)[:, None, None] - color)


class Patch:
    """A small picture drawn several times too large, then averaged down and laid on the canvas."""

    def __init__(self, canvas: Canvas, points: np.ndarray, margin: float, fill: Color, detail: float) -> None:
        """Cover `points` (N, 2) with `margin` pixels around; `detail`: supersampled size of the larger side."""
        low, high = (points.min(axis=0) - margin).tolist(), (points.max(axis=0) + margin).tolist()
        self.box = canvas.clip_box(low[0], low[1], high[0], high[1])
        if self.box is None:
            return
        left, top, right, bottom = self.box
        self.scale = min(max(math.ceil(detail / max(high[0] - low[0], high[1] - low[1])), 2), 8)
        shape = ((bottom - top) * self.scale, (right - left) * self.scale)
        self.color = np.empty((*shape, 3), np.uint8)
        cv2.rectangle(self.color, (0, 0), (shape[1], shape[0]), _scalar(fill), -1)
        self.alpha = np.zeros(shape, np.uint8)
        self.step = 16 * self.scale
        self.shift = np.array([(left - 0.5) * self.step + 8, (top - 0.5) * self.step + 8])

    def to_patch(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) image pixels to int32 patch coordinates with 4 fractional bits; those are passed on as they are."""
        if points.dtype == np.int32:
            return points
        return np.rint(points * self.step - self.shift).astype(np.int32)

    def polygon(self, points: np.ndarray, color: Color, *, solid: bool = False, convex: bool = False) -> None:
        """Fill a polygon (N, 2); `solid` polygons belong to the outline of the patch, others only tint it."""
        corners = self.to_patch(points)
        if convex:
            cv2.fillConvexPoly(self.color, corners, _scalar(color), cv2.LINE_8, 4)
            if solid:
                cv2.fillConvexPoly(self.alpha, corners, 255, cv2.LINE_8, 4)
        else:
            cv2.fillPoly(self.color, [corners], _scalar(color), cv2.LINE_8, 4)
            if solid:
                cv2.fillPoly(self.alpha, [corners], 255, cv2.LINE_8, 4)

    def line(self, points: np.ndarray, color: Color, width: float, *, solid: bool = False) -> None:
        """A polyline (N, 2), or several (M, N, 2), of a width in image pixels."""
        corners = list(self.to_patch(points)) if points.ndim == 3 else [self.to_patch(points)]
        thickness = max(round(width * self.scale), 1)
        cv2.polylines(self.color, corners, False, _scalar(color), thickness, cv2.LINE_8, 4)
        if solid:
            cv2.polylines(self.alpha, corners, False, 255, thickness, cv2.LINE_8, 4)

    def disc(self, center: np.ndarray, radius: float, color: Color, *, solid: bool = False) -> None:
        """A filled circle, radius in image pixels."""
        x, y = self.to_patch(center).tolist()
        size = max(round(radius * self.scale * 16), 4)
        cv2.circle(self.color, (x, y), size, _scalar(color), -1, cv2.LINE_8, 4)
        if solid:
            cv2.circle(self.alpha, (x, y), size, 255, -1, cv2.LINE_8, 4)

    def compose(self, canvas: Canvas, depth: float | np.ndarray, shade: float | np.ndarray = 1.0) -> None:
        """Lay the patch on the canvas at a depth and times a brightness, each a number or (h, w)."""
        if self.box is None:
            return
        left, top, right, bottom = self.box
        size = (right - left, bottom - top)
        color = cv2.resize(self.color, size, interpolation=cv2.INTER_AREA)
        alpha = cv2.resize(self.alpha, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        alpha *= np.float32(1 / 255)
        planes = np.stack(cv2.split(color)).astype(np.float32)
        planes *= shade if isinstance(shade, np.ndarray) else np.float32(shade)
        canvas.blend(self.box, planes, alpha, np.broadcast_to(np.asarray(depth, np.float32), alpha.shape))


def _scalar(color: Color) -> Sequence[float]:
    """A colour as OpenCV wants it: plain numbers, which it clips itself. The canvas is RGB, so the order stays."""
    return color.tolist() if isinstance(color, np.ndarray) else color


def ramp(*stops: tuple[float, float], steps: int) -> np.ndarray:
    """(steps,) profile through (position 0 to 1, value) stops."""
    positions, values = zip(*stops, strict=True)
    return np.interp(along(steps), positions, values)


@functools.lru_cache(maxsize=4)
def along(steps: int) -> np.ndarray:
    """(steps,) positions from 0 to 1."""
    return np.linspace(0, 1, steps)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of points (N, 2)."""
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)
