"""How plausible a labelled pose is among the poses of its own data set, learnt from nothing but their labels.

A small network gives every pose a number f. It is fitted so that a pose has more of it than the same pose spoilt: left
and right exchanged in part or whole, labels shifted by one, a keypoint moved or left out (logistic loss of the
differences).
A difference f(repaired) - f(labelled) is then a log ratio of likelihoods: how much sooner such people are labelled the
one way than the other. What geometry cannot decide, such as the two legs of somebody seen from the side, gets about 0.

Everybody is judged by a network that did not see them (folds), so that no fault is learnt by heart. Nothing is known
beforehand of bodies: hands and animals are judged by their own kind. N people, K keypoints, B of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from cigpose.dataset.repairs import SHIFTED, Repair
from cigpose.keypoints import KeypointSet

LEAST_PEOPLE = 40
"""Labelled people below which nothing can be learnt of them."""
LEAST_LABELS = 4
"""Keypoints of a person below which a pose says nothing."""
FOLDS = 2
STEPS, MOST_STEPS, PEOPLE_A_STEP = 300, 800, 8
"""Of a fit: so many, one more for every so many people, at most so many."""
BATCH = 256
WIDTH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05

_AWAY = -np.inf
_SHIFT_SHARE = 0.12  # of the exchanged poses
_TURN, _ANY_TURN = 0.35, 0.15  # radians; share of poses turned by any angle
_DISPLACED = 1.2  # of a moved keypoint, in root mean squares of a pose
_SHRINKAGE = 1e-3
_ROWS = 1 << 16  # scored at once


@dataclass(frozen=True, kw_only=True, eq=False)
class PoseEvidence:
    """Log ratios of likelihoods, positive where the labels are the less likely ones."""

    repairs: np.ndarray
    """(N, R): of each repair; -inf where it changes nothing that is labelled, or the person was not judged."""
    without: np.ndarray
    """(N, K): that a labelled keypoint is somewhere else; -inf where it is not labelled."""


def judge_poses(keypoints: np.ndarray, keypoint_set: KeypointSet, repairs: Sequence[Repair], seed: int) -> PoseEvidence:
    """Judge everybody by the others.

    Args:
        keypoints: (N, K, 3) x, y, v; v above 0 is labelled.
        keypoint_set: names, pairs and lines.
        repairs: what may be wrong with a person as a whole.
        seed: of folds, first weights and order.

    Returns: the evidence; all -inf where there are too few people to learn from.
    """
    labelled = keypoints[..., 2] > 0
    known = np.flatnonzero(labelled.sum(axis=1) >= min(LEAST_LABELS, len(keypoint_set)))
    evidence = PoseEvidence(
        repairs=np.full((len(keypoints), len(repairs)), _AWAY), without=np.full(labelled.shape, _AWAY)
    )
    if len(known) < LEAST_PEOPLE:
        return evidence
    points = torch.from_numpy(keypoints[known, :, :2]).float()
    mask = torch.from_numpy(labelled[known]).float()
    points = _normalised(points, mask)
    fold = np.random.default_rng(seed).permutation(len(known)) % FOLDS
    for number in range(FOLDS):
        others, mine = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
        network = fit_plausibility(points[others], mask[others], keypoint_set, repairs, seed * FOLDS + number)
        rows = known[fold == number]
        evidence.repairs[rows], evidence.without[rows] = _compare(network, points[mine], mask[mine], repairs)
    return evidence


class PosePlausibility(nn.Module):
    """f of a pose, whatever its place and size. Inputs are coordinates, which are labelled, limbs and pairs."""

    ends: Tensor

    def __init__(self, keypoint_set: KeypointSet) -> None:
        super().__init__()
        joined = [*keypoint_set.lines, *keypoint_set.flip_pairs]
        joined = sorted({(min(edge), max(edge)) for edge in joined}) or [(0, len(keypoint_set) - 1)]
        self.register_buffer("ends", torch.tensor(joined).T, persistent=False)
        inputs = 3 * len(keypoint_set) + 4 * len(joined)
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)),
        )

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        """(B,) of points (B, K, 2) and which of them are labelled (B, K)."""
        points = _normalised(points, mask)
        first, second = self.ends.unbind()
        both = (mask[:, first] * mask[:, second])[..., None]  # (B, E, 1)
        limbs = points[:, second] - points[:, first]
        length = limbs.norm(dim=-1, keepdim=True)
        parts = (points, limbs * both, length * both, torch.log(length + 0.05) * both)
        f: Tensor = self.layers(torch.cat([mask, *(part.flatten(1) for part in parts)], dim=1))
        return f.squeeze(1)


def fit_plausibility(
    points: Tensor, mask: Tensor, keypoint_set: KeypointSet, repairs: Sequence[Repair], seed: int
) -> PosePlausibility:
    """A network that prefers these poses to the same ones spoilt.

    Args:
        points: (N, K, 2).
        mask: (N, K), 1 where labelled.
        keypoint_set: names, pairs and lines.
        repairs: how poses are spoilt, besides moved and missing keypoints.
        seed: of everything random.
    """
    steps = min(STEPS + len(points) // PEOPLE_A_STEP, MOST_STEPS)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PosePlausibility(keypoint_set)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    orders = torch.from_numpy(np.stack([repair.order for repair in repairs])) if repairs else None
    shifts = torch.tensor([float(repair.kind == SHIFTED) for repair in repairs])
    swaps = 1 - shifts
    share = _SHIFT_SHARE if swaps.any() else 1.0
    weights = share * shifts / shifts.sum().clamp(min=1) + (1 - share) * swaps / swaps.sum().clamp(min=1)
    flip = torch.from_numpy(keypoint_set.flip_index)
    for _ in range(steps):
        some = torch.randint(len(points), (BATCH,), generator=random)
        pose, seen = _varied(points[some], mask[some], flip, random)
        spoilt = [] if orders is None else [_exchanged(pose, seen, orders, weights, random) for _ in range(2)]
        at = torch.multinomial(seen + 1e-9, 1, generator=random)  # (B, 1)
        spoilt.append((_moved(pose, at, random), seen))
        without = seen.scatter(1, at, 0.0)
        stack = [(pose, seen), *spoilt, (pose, without)]
        f = network(torch.cat([p for p, _ in stack]), torch.cat([m for _, m in stack])).view(-1, BATCH)
        whole, worse, moved, less = f[0], f[1:-1], f[-2], f[-1]
        loss = softplus(worse - whole).mean(dim=1).sum() + softplus(moved - less).mean()
        loss = loss + 0.5 * softplus(less - whole).mean() + _SHRINKAGE * f.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def _compare(
    network: PosePlausibility, points: Tensor, mask: Tensor, repairs: Sequence[Repair]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `PoseEvidence`."""
    f = _scored(network, points, mask)
    repaired, without = np.full((len(points), len(repairs)), _AWAY), np.full(mask.shape, _AWAY)
    for column, repair in enumerate(repairs):
        order, moved = torch.from_numpy(repair.order), list(repair.keypoints)
        changes = mask[:, moved].any(dim=1).numpy()
        difference = _scored(network, points[:, order], mask[:, order]) - f
        repaired[:, column] = np.where(changes, difference, _AWAY)
    for k in range(mask.shape[1]):
        rows = torch.nonzero((mask[:, k] > 0) & (mask.sum(dim=1) > LEAST_LABELS)).squeeze(1)
        less = mask[rows]
        less[:, k] = 0
        without[rows.numpy(), k] = _scored(network, points[rows], less) - f[rows.numpy()]
    return repaired, without


def _scored(network: PosePlausibility, points: Tensor, mask: Tensor) -> np.ndarray:
    chunks = zip(torch.split(points, _ROWS), torch.split(mask, _ROWS), strict=True)
    return torch.cat([network(p, m) for p, m in chunks] or [torch.zeros(0)]).double().numpy()


def _normalised(points: Tensor, mask: Tensor) -> Tensor:
    """Centred on the labelled points' mean, of root mean square 1; zeros where nothing is labelled."""
    count = mask.sum(dim=1).clamp(min=1)[:, None, None]
    weight = mask[..., None]
    centred = (points - (points * weight).sum(dim=1, keepdim=True) / count) * weight
    return centred / ((centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt() + 1e-6)


def _varied(points: Tensor, mask: Tensor, flip: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same poses mirrored, turned, with fewer keypoints."""
    count = len(points)
    mirrored = torch.rand(count, generator=random) < 0.5
    points = torch.where(mirrored[:, None, None], points[:, flip] * torch.tensor([-1.0, 1.0]), points)
    mask = torch.where(mirrored[:, None], mask[:, flip], mask)
    angle = torch.randn(count, generator=random) * _TURN
    any_angle = torch.rand(count, generator=random) * (2 * torch.pi)
    angle = torch.where(torch.rand(count, generator=random) < _ANY_TURN, any_angle, angle)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    x, y = points.unbind(-1)
    points = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    most = 0.25 * torch.rand(count, 1, generator=random) * (torch.rand(count, 1, generator=random) < 0.5)
    return points, mask * (torch.rand(mask.shape, generator=random) >= most)


def _exchanged(
    points: Tensor, mask: Tensor, orders: Tensor, weights: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    chosen = orders[torch.multinomial(weights, len(points), replacement=True, generator=random)]
    return points.gather(1, chosen[..., None].expand(-1, -1, 2)), mask.gather(1, chosen)


def _moved(points: Tensor, at: Tensor, random: torch.Generator) -> Tensor:
    """One keypoint of each pose somewhere else: around where it was, or anywhere on the person."""
    index = at[..., None].expand(-1, -1, 2)
    near = torch.rand(len(points), 1, 1, generator=random) < 0.5
    places = points.gather(1, index) * near + torch.randn(len(points), 1, 2, generator=random) * _DISPLACED
    return points.scatter(1, index, places)
