"""What a person looks like: skin, hair, clothes, in muted colours people really wear. RGB, 0 to 255."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

SKIN_TONES = np.array(
    [(238, 203, 180), (226, 184, 154), (206, 158, 124), (176, 126, 92), (138, 94, 66), (104, 70, 50),
     (80, 55, 42)], float
)  # fmt: skip
HAIR_COLORS = np.array(
    [(32, 27, 26), (44, 33, 28), (70, 48, 36), (98, 68, 46), (140, 100, 62), (190, 152, 100), (150, 74, 44),
     (150, 146, 142), (205, 202, 198)], float
)  # fmt: skip
_DARK_HAIR_SHARES = (0.5, 0.3, 0.08, 0.0, 0.0, 0.0, 0.0, 0.08, 0.04)
_HAIR_SHARES = (0.2, 0.17, 0.18, 0.13, 0.1, 0.07, 0.05, 0.06, 0.04)
CLOTH_COLORS = np.array(
    [(236, 233, 226), (206, 203, 196), (150, 150, 150), (84, 88, 94), (44, 47, 54), (38, 50, 78), (66, 88, 122),
     (110, 138, 166), (124, 42, 48), (160, 78, 66), (186, 128, 92), (196, 164, 104), (204, 190, 160), (98, 104, 74),
     (62, 84, 68), (74, 112, 110), (120, 104, 130), (186, 150, 152), (112, 84, 66), (150, 168, 150)], float
)  # fmt: skip
BOTTOM_COLORS = np.array(
    [(52, 66, 98), (74, 94, 128), (38, 42, 54), (56, 56, 58), (104, 98, 88), (168, 152, 124), (88, 84, 66),
     (120, 122, 126), (78, 58, 50)], float
)  # fmt: skip
SHOE_COLORS = np.array(
    [(230, 228, 222), (46, 44, 46), (104, 72, 50), (120, 122, 126), (58, 70, 98), (136, 56, 52), (150, 130, 104)], float
)  # fmt: skip

_IRISES = ((78, 52, 36), (96, 74, 48), (84, 110, 132), (82, 106, 78))
HairStyle = Literal["short", "crop", "long", "bun", "tail", "afro", "bald", "beanie"]
Pattern = Literal["plain", "stripes", "chest band", "jacket", "tank"]
_HAIR_STYLES: tuple[HairStyle, ...] = ("short", "crop", "long", "bun", "tail", "afro", "bald", "beanie")
_PATTERNS: tuple[Pattern, ...] = ("plain", "stripes", "chest band", "jacket", "tank")


@dataclass(frozen=True)
class Appearance:
    """One person's looks."""

    skin: np.ndarray
    hair: np.ndarray
    hair_style: HairStyle
    parting: float
    """Slope of the hairline, -1 to 1."""
    hat: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    beard: float
    """Opacity of a beard, 0 for none."""
    glasses: bool
    top: np.ndarray
    second: np.ndarray
    """Second colour of the top: stripes, or the shirt under a jacket."""
    pattern: Pattern
    sleeve: float
    """Share of the arm that is covered: 0 none, 0.5 to the elbow, 1 to the wrist."""
    bottom: np.ndarray
    trouser: float
    """Share of the leg that is covered."""
    skirt: float
    """Share of the leg that a skirt reaches, 0 for none."""
    socks: np.ndarray
    shoes: np.ndarray
    sole: np.ndarray
    texture: int
    """Which creases the clothes have."""


def draw(rng: np.random.Generator, weights: Sequence[float]) -> int:
    """A random index with probability proportional to its weight; faster than `Generator.choice`."""
    at = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        at -= weight
        if at < 0:
            return index
    return len(weights) - 1


def _pick(rng: np.random.Generator, table: np.ndarray, spread: float = 7.0) -> np.ndarray:
    return np.clip(table[int(rng.integers(len(table)))] + rng.normal(0, spread, 3) + rng.normal(0, spread), 16, 244)


def sample_appearance(rng: np.random.Generator) -> Appearance:
    """A random person's looks."""
    tone = rng.uniform(0, len(SKIN_TONES) - 1.001)
    low = int(tone)
    skin = SKIN_TONES[low] + (tone - low) * (SKIN_TONES[low + 1] - SKIN_TONES[low]) + rng.normal(0, 3, 3)
    hair = HAIR_COLORS[draw(rng, _HAIR_SHARES if tone < 3.2 else _DARK_HAIR_SHARES)] + rng.normal(0, 5, 3)
    style = _HAIR_STYLES[draw(rng, (0.3, 0.12, 0.24, 0.08, 0.09, 0.05, 0.05, 0.07))]
    pattern = _PATTERNS[draw(rng, (0.46, 0.16, 0.1, 0.2, 0.08))]
    sleeve = {"jacket": 0.97, "tank": 0.0}.get(pattern, (0.24, 0.3, 0.5, 0.97)[draw(rng, (0.3, 0.2, 0.1, 0.4))])
    skirt = (0.0, 0.42, 0.62)[draw(rng, (0.87, 0.08, 0.05))]
    trouser = 0.3 if skirt else (0.4, 0.55, 0.93, 0.97)[draw(rng, (0.16, 0.1, 0.3, 0.44))]
    bearded = style not in ("long", "bun", "tail") and skirt == 0 and rng.random() < 0.25
    lips = skin * (0.86, 0.66, 0.66) + (14, 0, 4)
    return Appearance(
        skin=np.clip(skin, 20, 250),
        hair=np.clip(hair, 14, 240),
        hair_style=style,
        parting=rng.uniform(-1, 1),
        hat=_pick(rng, CLOTH_COLORS),
        iris=np.array(_IRISES[draw(rng, (0.5, 0.2, 0.2, 0.1))], float),
        lips=np.clip(lips + rng.uniform(-8, 8, 3), 20, 240),
        beard=float(bearded) * rng.uniform(0.35, 0.85),
        glasses=bool(rng.random() < 0.12),
        top=_pick(rng, CLOTH_COLORS),
        second=_pick(rng, CLOTH_COLORS),
        pattern=pattern,
        sleeve=sleeve,
        bottom=_pick(rng, BOTTOM_COLORS if skirt == 0 else CLOTH_COLORS),
        trouser=trouser,
        skirt=skirt,
        socks=_pick(rng, CLOTH_COLORS[:5]),
        shoes=_pick(rng, SHOE_COLORS),
        sole=np.clip((232.0, 60.0, 170.0)[int(rng.integers(3))] + rng.normal(0, 6, 3), 20, 245),
        texture=int(rng.integers(1 << 16)),
    )
