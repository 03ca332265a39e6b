"""A model's poses of labelled people, in their own boxes, for the check of the labels."""

from __future__ import annotations

import itertools

import numpy as np

from cigpose.config import load_preset
from cigpose.dataset.check import Predict
from cigpose.dataset.check_labels import LabelledPeople
from cigpose.dataset.check_pictures import PhotoFolder
from cigpose.dataset.names import coco_spelling
from cigpose.deploy.models import find_model
from cigpose.deploy.predictor import Predictor
from cigpose.progress import progress

_PICTURES_AT_ONCE = 64


def poses_by(model: str, photos: PhotoFolder, *, preset: str | None = None, device: str | None = None) -> Predict:
    """A model that looks at labelled boxes; what it calls the same is the same keypoint.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it cannot be used, or has none of the keypoints.
    """
    config = load_preset(preset) if preset else None
    predictor = Predictor.load(find_model(model), config, device=device)
    place = {coco_spelling(name): k for k, name in enumerate(predictor.keypoint_set.names)}
    ours = [place.get(coco_spelling(name), -1) for name in photos.people.keypoint_set.names]
    mine, theirs = np.flatnonzero(np.array(ours) >= 0), [k for k in ours if k >= 0]
    if not theirs:
        raise ValueError(f"{model}: has none of the keypoints of the labels. Give a model of such people.")

    def predict(
        people: LabelledPeople, rows: np.ndarray, pictures: np.ndarray, *, mirrored: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        points = np.full((len(rows), len(ours), 2), np.nan)
        scores = np.zeros((len(rows), len(ours)))
        order = np.argsort(pictures, kind="stable")
        bounds = [0, *(np.flatnonzero(np.diff(pictures[order])) + 1).tolist(), len(order)] if len(order) else [0]
        groups = [order[a:b] for a, b in itertools.pairwise(bounds)]
        bar = progress(total=len(groups), desc="model", unit="image")
        for chunk in _chunks(groups, _PICTURES_AT_ONCE):
            images, boxes, members = [], [], []
            for group in chunk:
                image = photos.read(int(pictures[group[0]]))
                if image is None:
                    continue
                image = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
                corners, usable = people.corners(rows[group], (image.shape[1], image.shape[0]))
                images.append(image)
                boxes.append(corners[usable])
                members.append(group[usable])
            for poses, group in zip(predictor.predict_many(images, boxes), members, strict=True):
                points[np.ix_(group, mine)] = poses.keypoints[:, theirs]
                scores[np.ix_(group, mine)] = poses.scores[:, theirs]
            bar.update(len(chunk))
        bar.close()
        return points, scores

    return predict


def _chunks(groups: list[np.ndarray], count: int) -> list[list[np.ndarray]]:
    return [groups[start : start + count] for start in range(0, len(groups), count)]
