"""Rooms and streets to stand in, and the context objects that may betray a pose. (H, W, 3) uint8 RGB."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from cigpose.render.appearance import CLOTH_COLORS
from cigpose.render.paint import Color, noise_field

WALLS = np.array(
    [(214, 208, 196), (196, 202, 204), (186, 192, 180), (206, 192, 178), (168, 178, 188), (222, 218, 210),
     (156, 150, 146), (178, 160, 146), (134, 146, 150)], float
)  # fmt: skip
FLOORS = np.array(
    [(150, 118, 88), (122, 92, 68), (172, 146, 112), (128, 126, 124), (160, 156, 150), (96, 88, 84),
     (110, 112, 118)], float
)  # fmt: skip
GREENS = np.array([(78, 104, 64), (96, 118, 74), (60, 88, 60), (112, 126, 84), (120, 112, 70)], float)
Item = Callable[[np.ndarray, np.random.Generator, int], None]


def draw_background(rng: np.random.Generator, width: int, height: int, clutter: float) -> tuple[np.ndarray, int]:
    """A background and the row of its horizon, where wall or sky meets the floor."""
    image: np.ndarray = np.empty((height, width, 3), np.uint8)
    horizon = int(height * rng.uniform(0.5, 0.82))
    inside = rng.random() < 0.68
    (_room if inside else _outdoors)(image, rng, horizon)
    count = int(rng.poisson(9 * clutter)) if clutter > 0 else 0
    items = INDOOR if inside else OUTDOOR
    for _ in range(min(count, 16)):
        items[int(rng.integers(len(items)))](image, rng, horizon)
    softness = rng.uniform(0, 1.5)
    if softness > 0.4:
        image = cv2.GaussianBlur(image, (0, 0), softness)
    return image, horizon


def _color(color: Color) -> Sequence[float]:
    return color.tolist() if isinstance(color, np.ndarray) else color


def _muted(rng: np.random.Generator) -> np.ndarray:
    return np.clip(CLOTH_COLORS[int(rng.integers(len(CLOTH_COLORS)))] + rng.normal(0, 8, 3), 12, 245)


def _quad(image: np.ndarray, points: list[tuple[float, float]], color: Color) -> None:
    corners = np.rint(np.array(points) * 16).astype(np.int32)
    cv2.fillConvexPoly(image, corners, _color(color), cv2.LINE_AA, 4)


def _box(image: np.ndarray, x: float, y: float, w: float, h: float, color: Color) -> None:
    """Fill an upright rectangle."""
    if w > 0 and h > 0:
        corner = (round(x + w) - 1, round(y + h) - 1)
        cv2.rectangle(
            image, (round(x), round(y)), (max(corner[0], round(x)), max(corner[1], round(y))), _color(color), -1
        )


def _gradient(image: np.ndarray, rng: np.random.Generator, color: np.ndarray, strength: float) -> None:
    """Fill with a colour under uneven light."""
    height, width = image.shape[:2]
    if height == 0:
        return
    small = (
        color
        + rng.normal(0, 0.7 * strength, (3, 4, 1))
        + rng.normal(0, 0.15 * strength, (3, 4, 3))
        + np.linspace(strength, -strength, 3)[:, None, None]
    )
    small = np.clip(small, 0, 255).astype(np.uint8)
    image[:] = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _grain(image: np.ndarray, strength: float, sigma: float) -> None:
    """Add a fixed fine texture."""
    height, width = image.shape[:2]
    if height == 0:
        return
    field = noise_field(max(height, width), max(height, width), round(sigma, 1), 3)[:height, :width]
    grain = cv2.merge([field * np.float32(strength)] * 3)
    image[:] = cv2.add(image, grain, dtype=cv2.CV_8U)


def _room(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    wall = WALLS[int(rng.integers(len(WALLS)))] + rng.normal(0, 3, 3) + rng.normal(0, 8)
    _gradient(image[:horizon], rng, wall, 14)
    kind = rng.random()
    if kind < 0.2:
        pitch = rng.uniform(10, 30)
        for x in np.arange(rng.uniform(0, pitch), width, pitch):
            _box(image, x, 0, pitch * 0.4, horizon, wall * rng.uniform(0.92, 0.98))
    elif kind < 0.34:
        rows = rng.uniform(9, 16)
        for row, y in enumerate(np.arange(0, horizon, rows)):
            cv2.line(image, (0, int(y)), (width, int(y)), _color(wall * 0.84), 1, cv2.LINE_AA)
            for x in np.arange((row % 2) * rows, width, rows * 2):
                cv2.line(image, (int(x), int(y)), (int(x), int(min(y + rows, horizon))), _color(wall * 0.86), 1)
    floor = FLOORS[int(rng.integers(len(FLOORS)))] + rng.normal(0, 6, 3)
    _gradient(image[horizon:], rng, floor, 12)
    vanish = (width * rng.uniform(0.2, 0.8), horizon - height * 0.3)
    for x in np.linspace(-width, 2 * width, int(rng.integers(12, 30))):
        t = (horizon - vanish[1]) / (height - vanish[1])
        top = (int(vanish[0] + (x - vanish[0]) * t), horizon)
        cv2.line(image, top, (int(x), height), _color(floor * 0.82), 1, cv2.LINE_AA)
    if rng.random() < 0.5:
        for t in np.linspace(0, 1, 6)[1:] ** 2:
            y = int(horizon + t * (height - horizon))
            cv2.line(image, (0, y), (width, y), _color(floor * 0.85), 1, cv2.LINE_AA)
    _box(image, -2, horizon - 0.018 * height, width + 4, 0.018 * height, wall * 1.12)


def _outdoors(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    top = np.array([(126, 164, 200), (170, 190, 206), (196, 200, 204), (206, 194, 184)][int(rng.integers(4))], float)
    pale = 0.5 * top + 118
    column = top + (pale - top) * np.linspace(0, 1, max(horizon, 1))[:, None]
    image[:horizon] = column[:horizon, None].astype(np.uint8)
    ground = (GREENS if rng.random() < 0.55 else FLOORS)[int(rng.integers(5))] + rng.normal(0, 6, 3)
    x = np.linspace(0, width, 20)
    far = horizon - height * (0.06 + 0.05 * np.abs(np.cumsum(rng.normal(0, 0.5, 20))))
    ridge = np.concatenate([np.stack([x, far], axis=1), [(width, horizon), (0, horizon)]])
    cv2.fillPoly(image, [np.round(ridge).astype(np.int32)], _color(0.5 * ground + 0.5 * pale), cv2.LINE_AA)
    _gradient(image[horizon:], rng, ground, 10)
    if rng.random() < 0.4:
        path = _muted(rng) * 0.3 + 110
        middle = width * rng.uniform(0.2, 0.8)
        _quad(
            image,
            [
                (middle - 8, horizon),
                (middle + 8, horizon),
                (middle + width * 0.4, height),
                (middle - width * 0.4, height),
            ],
            path,
        )
    _grain(image[horizon:], rng.uniform(4, 9), 1.0)


def _frame(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w, h = width * rng.uniform(0.08, 0.2), height * rng.uniform(0.08, 0.22)
    x, y = rng.uniform(0, width - w), rng.uniform(0, max(horizon - h - 4, 1))
    _box(image, x, y, w, h, _muted(rng) * 0.6)
    edge = 0.08 * w
    _box(image, x + edge, y + edge, w - 2 * edge, h - 2 * edge, _muted(rng) * 0.4 + 140)
    for _ in range(3):
        center = (int(rng.uniform(x + w * 0.3, x + w * 0.7)), int(rng.uniform(y + h * 0.3, y + h * 0.7)))
        cv2.circle(image, center, int(rng.uniform(0.08, 0.18) * min(w, h)), _color(_muted(rng)), -1, cv2.LINE_AA)


def _window(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width = image.shape[1]
    w, h = width * rng.uniform(0.15, 0.3), horizon * rng.uniform(0.4, 0.7)
    x, y = rng.uniform(-0.1 * width, width - 0.5 * w), horizon * rng.uniform(0.03, 0.2)
    _box(image, x, y, w, h, (232, 230, 226))
    glass = np.array((186, 206, 222)) + rng.normal(0, 8, 3)
    for i in range(2):
        for j in range(2):
            _box(image, x + w * (0.06 + 0.46 * i), y + h * (0.05 + 0.48 * j), w * 0.42, h * 0.43, glass + 14 * (1 - j))


def _shelf(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w, h = width * rng.uniform(0.14, 0.32), horizon * rng.uniform(0.5, 0.9)
    x, y = rng.uniform(-0.1 * width, width - 0.5 * w), horizon - h
    wood = _muted(rng) * 0.5 + 40
    _box(image, x, y, w, h + 0.03 * height, wood)
    rows = int(rng.integers(3, 6))
    books = [_muted(rng) * 0.85 for _ in range(8)]
    for row in range(rows):
        low = y + h * (row + 0.94) / rows
        _box(image, x + 2, y + h * (row + 0.08) / rows, w - 4, h * 0.86 / rows, wood * 0.6)
        at = x + 3
        while at < x + w - 8:
            thick, tall = rng.uniform(3, 8), h / rows * rng.uniform(0.45, 0.78)
            if rng.random() < 0.85:
                _box(image, at, low - tall, thick - 0.6, tall, books[int(rng.integers(len(books)))])
            at += thick


def _sofa(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w, h = width * rng.uniform(0.3, 0.55), height * rng.uniform(0.16, 0.26)
    x, y = rng.uniform(-0.2 * width, width - 0.5 * w), horizon - h * 0.55
    color = _muted(rng) * 0.8
    _box(image, x, y, w, h, color * 0.9)
    _box(image, x - w * 0.06, y + h * 0.25, w * 0.14, h * 0.8, color)
    _box(image, x + w * 0.92, y + h * 0.25, w * 0.14, h * 0.8, color)
    for i in range(3):
        _box(image, x + w * (0.08 + 0.285 * i), y + h * 0.45, w * 0.27, h * 0.28, color * 1.1 + 6)
        _box(image, x + w * (0.08 + 0.285 * i), y + h * 0.72, w * 0.27, h * 0.03, color * 0.7)


def _table(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w, h = width * rng.uniform(0.2, 0.4), height * rng.uniform(0.12, 0.22)
    x, y = rng.uniform(-0.1 * width, width - 0.6 * w), horizon - h * 0.4
    wood = FLOORS[int(rng.integers(4))] * rng.uniform(0.7, 1.2)
    for side in (0.04, 0.9):
        _box(image, x + w * side, y, w * 0.05, h, wood * 0.7)
    _box(image, x, y - h * 0.05, w, h * 0.12, wood)
    for _ in range(int(rng.integers(1, 4))):
        bx, bh = x + w * rng.uniform(0.1, 0.85), h * rng.uniform(0.15, 0.5)
        _box(image, bx, y - h * 0.05 - bh, bh * rng.uniform(0.3, 1), bh, _muted(rng))


def _lamp(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    x, top = rng.uniform(0, width), horizon * rng.uniform(0.15, 0.5)
    s = height * rng.uniform(0.05, 0.09)
    cv2.line(image, (int(x), int(top)), (int(x), horizon + 8), (70, 66, 64), 2, cv2.LINE_AA)
    _quad(
        image,
        [(x - s * 0.5, top - s), (x + s * 0.5, top - s), (x + s * 0.85, top + s * 0.5), (x - s * 0.85, top + s * 0.5)],
        (238, 222, 184),
    )


def draw_plant(image: np.ndarray, rng: np.random.Generator, x: float, base: float, size: float) -> None:
    """A potted plant standing at (x, base)."""
    pot = np.array((150, 92, 66)) + rng.normal(0, 10, 3)
    green = GREENS[int(rng.integers(len(GREENS)))]
    for angle in np.linspace(-1.2, 1.2, 9) + rng.normal(0, 0.1, 9):
        reach = size * rng.uniform(0.55, 0.85)
        tip = np.array([x + np.sin(angle) * reach, base - size * 0.3 - np.cos(angle) * reach])
        root, across = np.array([x, base - size * 0.3]), np.array([np.cos(angle), np.sin(angle)]) * size * 0.08
        middle = root + (tip - root) * 0.55
        leaf = np.array([root, middle + across, tip, middle - across])
        cv2.fillConvexPoly(
            image, np.round(leaf * 16).astype(np.int32), _color(green * rng.uniform(0.75, 1.2)), cv2.LINE_AA, 4
        )
    s = size * 0.2
    _quad(image, [(x - s, base - s * 1.6), (x + s, base - s * 1.6), (x + s * 0.7, base), (x - s * 0.7, base)], pot)


def _plant(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    draw_plant(
        image, rng, rng.uniform(0, width), horizon + height * rng.uniform(0, 0.08), height * rng.uniform(0.15, 0.4)
    )


def _door(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width = image.shape[1]
    w, h = width * rng.uniform(0.12, 0.18), horizon * rng.uniform(0.75, 0.95)
    x, color = rng.uniform(-0.05, 0.9) * width, _muted(rng) * 0.5 + 90
    _box(image, x - 3, horizon - h - 3, w + 6, h + 3, color * 1.15)
    _box(image, x, horizon - h, w, h, color)
    for i in range(2):
        _box(image, x + w * 0.15, horizon - h * (0.92 - 0.46 * i), w * 0.7, h * 0.36, color * 0.92)
    cv2.circle(image, (int(x + w * 0.88), int(horizon - h * 0.5)), 2, (190, 176, 130), -1, cv2.LINE_AA)


def _curtain(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w = width * rng.uniform(0.08, 0.2)
    x, color = rng.choice((rng.uniform(-0.05, 0.1), rng.uniform(0.8, 0.95))) * width, _muted(rng)
    for i, at in enumerate(np.arange(x, x + w, w / 9)):
        _box(image, at, 0, w / 9 + 1, horizon + 0.03 * height, color * (0.84 + 0.16 * ((i * 5) % 3) / 2))


def _tree(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    x, size = rng.uniform(0, width), height * rng.uniform(0.12, 0.3)
    green = GREENS[int(rng.integers(len(GREENS)))] * rng.uniform(0.7, 1.1)
    _box(image, x - size * 0.05, horizon - size, size * 0.1, size, (88, 70, 56))
    for _ in range(9):
        center = (int(x + rng.normal(0, 0.3) * size), int(horizon - size * 1.1 + rng.normal(0, 0.25) * size))
        cv2.circle(
            image, center, int(size * rng.uniform(0.16, 0.32)), _color(green * rng.uniform(0.8, 1.2)), -1, cv2.LINE_AA
        )


def _building(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width = image.shape[1]
    w, h = width * rng.uniform(0.15, 0.4), horizon * rng.uniform(0.3, 0.9)
    x, color = rng.uniform(-0.1, 0.9) * width, WALLS[int(rng.integers(len(WALLS)))] * rng.uniform(0.6, 1)
    _box(image, x, horizon - h, w, h, color)
    columns, rows = max(int(w / 16), 2), max(int(h / 20), 2)
    for i in range(columns):
        for j in range(rows):
            _box(
                image,
                x + w * (i + 0.25) / columns,
                horizon - h * (j + 0.75) / rows,
                w * 0.5 / columns,
                h * 0.5 / rows,
                color * 0.55 + (6, 12, 20),
            )


def _bush(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    x, size = rng.uniform(0, width), height * rng.uniform(0.03, 0.09)
    green = GREENS[int(rng.integers(len(GREENS)))] * rng.uniform(0.7, 1.1)
    for _ in range(8):
        center = (int(x + rng.normal(0, 1.5) * size), int(horizon - rng.uniform(-0.2, 0.5) * size))
        cv2.circle(
            image, center, int(size * rng.uniform(0.5, 0.9)), _color(green * rng.uniform(0.8, 1.15)), -1, cv2.LINE_AA
        )


def _bench(image: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    w, x = width * rng.uniform(0.15, 0.3), rng.uniform(0, 0.9) * width
    y, wood = horizon + height * rng.uniform(0.0, 0.06), np.array((120, 88, 62)) * rng.uniform(0.7, 1.2)
    for i in range(3):
        _box(image, x, y - 4 * (i + 1) - 12, w, 3, wood * (1 - 0.06 * i))
    _box(image, x, y - 10, w, 4, wood * 1.1)
    for side in (0.08, 0.9):
        _box(image, x + w * side, y - 24, 3, 30, (58, 58, 60))


INDOOR: tuple[Item, ...] = (_frame, _window, _shelf, _sofa, _table, _lamp, _plant, _door, _curtain, _frame, _shelf)
OUTDOOR: tuple[Item, ...] = (_tree, _building, _bush, _bench, _tree, _bush, _building)


def draw_context(image: np.ndarray, rng: np.random.Generator, center: np.ndarray, size: float, orange: bool) -> None:
    """One of the two context objects: an orange checker panel with a cup, or a blue striped one with a plant.

    Args:
        image: where, (H, W, 3).
        rng: for small variation; both kinds draw the same number of values from it.
        center: (2,) pixel of the panel's middle.
        size: side of the panel in pixels.
        orange: which of the two.
    """
    jitter = rng.normal(0, 6, 3)
    seed = int(rng.integers(1 << 31))
    x, y = center[0] - size / 2, center[1] - size / 2
    if orange:
        light, dark = np.array((222, 158, 88)) + jitter, np.array((188, 104, 48)) + jitter
        _box(image, x, y, size, size, light)
        cells = 6
        for i in range(cells):
            for j in range(cells):
                if (i + j) % 2:
                    _box(image, x + size * i / cells, y + size * j / cells, size / cells, size / cells, dark)
    else:
        light, dark = np.array((150, 180, 208)) + jitter, np.array((70, 104, 150)) + jitter
        _box(image, x, y, size, size, light)
        for i in range(5):
            _box(image, x + size * (0.02 + 0.2 * i), y, size * 0.1, size, dark)
    base = y + size * 1.24
    _box(image, x - size * 0.05, base, size * 1.1, size * 0.05, (122, 96, 74))
    at = x + size * 0.3
    if orange:
        cup = np.array((236, 232, 224)) + jitter
        cv2.circle(
            image,
            (int(at + size * 0.11), int(base - size * 0.08)),
            max(int(size * 0.05), 1),
            _color(cup * 0.8),
            2,
            cv2.LINE_AA,
        )
        _quad(
            image,
            [
                (at - size * 0.1, base - size * 0.18),
                (at + size * 0.1, base - size * 0.18),
                (at + size * 0.075, base),
                (at - size * 0.075, base),
            ],
            cup,
        )
    else:
        draw_plant(image, np.random.default_rng(seed), at, base, size * 0.36)
