"""Labels as a person sees them: people cut out, with their skeletons, and the names of the keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from cigpose.dataset.raw import Side
from cigpose.draw import draw_poses, keypoint_colors, label_picture, pack_pictures
from cigpose.keypoints import KeypointSet

HEIGHT = 384
MARGIN = 0.15
"""Around a person's box, on each side."""


def draw_labels(sides: Sequence[Side], keypoints: KeypointSet, count: int) -> np.ndarray:
    """A sheet of people of all sides, evenly from the whole of them, and the one with most keypoints with their names.

    Args:
        sides: what is drawn.
        keypoints: names and lines.
        count: of people, beside the one with names.

    Returns: uint8 (H, W, 3) BGR.
    """
    tiles = []
    best = max(((side, person) for side in sides for person in side.people), key=lambda pair: _num_labelled(pair[1]))
    tiles.append(_tile(*best, keypoints, with_names=True))
    for side, share in zip(sides, (count - count // 4, count // 4), strict=True):
        people = side.people
        places = np.linspace(0, len(people) - 1, min(share, len(people))).round().astype(int)
        tiles += [_tile(side, people[place], keypoints) for place in dict.fromkeys(places.tolist())]
    return pack_pictures(tiles)


def _num_labelled(person: dict[str, object]) -> int:
    return sum(v > 0 for v in person["keypoints"][2::3])  # type: ignore[index]


def _tile(side: Side, person: dict[str, object], keypoints: KeypointSet, *, with_names: bool = False) -> np.ndarray:
    """One person, enlarged to the height of the sheet."""
    file_name = next(image["file_name"] for image in side.images if image["id"] == person["image_id"])
    picture = side.photographs.find(file_name)
    assert picture is not None  # the labels were held against the pictures
    image = side.photographs.decode(picture)
    flat = [value for name in keypoints.annotation_fields for value in person[name]]  # type: ignore[attr-defined]
    points = np.array(flat, dtype=np.float64).reshape(-1, 3)
    x, y, w, h = np.array(person["bbox"], dtype=np.float64)
    seen = points[points[:, 2] > 0, :2]
    left, top = np.minimum([x - MARGIN * w, y - MARGIN * h], seen.min(axis=0, initial=np.inf))
    right, bottom = np.maximum([x + (1 + MARGIN) * w, y + (1 + MARGIN) * h], seen.max(axis=0, initial=-np.inf))
    left, top = max(int(left), 0), max(int(top), 0)
    crop = image[top : max(int(bottom), top + 8), left : max(int(right), left + 8)]
    factor = HEIGHT / max(crop.shape[0], 1)
    crop = cv2.resize(crop, (max(32, min(3 * HEIGHT, round(crop.shape[1] * factor))), HEIGHT))
    scale = np.array([crop.shape[1] / max(1, min(int(right), image.shape[1]) - left), factor])
    places = (points[:, :2] - [left, top]) * scale
    visible = points[:, 2] > 0
    frame = (np.array([x, y, x + w, y + h]).reshape(2, 2) - [left, top]) * scale
    drawn = draw_poses(crop, places[None], visible[None].astype(float), keypoints, boxes_xyxy=frame.reshape(1, 4))
    if with_names:
        return _with_names(drawn, places, visible, keypoints)
    return label_picture(drawn, f"{person['id']}  {file_name}")


def _with_names(drawn: np.ndarray, places: np.ndarray, visible: np.ndarray, keypoints: KeypointSet) -> np.ndarray:
    """The picture with numbers at the keypoints, and beside it the names of at most 40 of them."""
    listed = min(len(keypoints), 40)
    columns = -(-listed // 20)
    panel = np.full((HEIGHT, 190 * columns, 3), 255, dtype=np.uint8)
    colors = keypoint_colors(keypoints)
    for k in range(listed):
        if visible[k]:
            at = (int(places[k, 0]) + 6, int(places[k, 1]) - 4)
            for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                cv2.putText(drawn, str(k), at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, width, cv2.LINE_AA)
        row, column = k % 20, k // 20
        place = (8 + 190 * column, 18 + 18 * row)
        cv2.circle(panel, (place[0] + 4, place[1] - 4), 5, colors[k], cv2.FILLED, cv2.LINE_AA)
        text = f"{k} {keypoints.names[k]}"
        cv2.putText(panel, text, (place[0] + 14, place[1]), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.hstack([drawn, panel])
