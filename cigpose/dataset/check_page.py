"""The outcome of a label check: one HTML page that needs nothing beside it, and the same as JSON."""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cigpose.dataset.check import LabelCheck, Suspect
from cigpose.dataset.check_labels import LabelledPeople
from cigpose.dataset.check_pictures import PhotoFolder
from cigpose.dataset.check_rules import extents
from cigpose.dataset.faults import COUNTED, KINDS
from cigpose.draw import draw_poses, label_picture
from cigpose.evaluate import charts

TEMPLATE = "check.html.j2"
LISTED = 200
"""Suspects in the table below the pictures."""
MOST_CROSSES = 40
"""Keypoints up to which their places in the box are drawn."""

_HEIGHT, _WIDEST = 260, 1.8
_QUALITY = 80
_ANY_LABEL = 0.25  # labels are drawn with v / 2 as score: v = 1 faint
_MIN_SCORE = 0.3
_RING = 8
_QUARTILES = (0.25, 0.5, 0.75)


def label_report(check: LabelCheck) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    people = check.people
    return {
        "keypoint_set": people.keypoint_set.name,
        "people": len(people),
        "pictures": len(people.pictures),
        "suspicious": check.num_suspicious(),
        "counted_from": COUNTED,
        "counts": check.counts(),
        "notes": check.notes,
        "keypoints": keypoint_figures(check),
        "suspects": [
            {
                "annotation_id": suspect.annotation_id,
                "image_id": suspect.image_id,
                "suspicion": round(suspect.suspicion, 4),
                "findings": [finding.as_dict() for finding in suspect.findings],
            }
            for suspect in check.suspects
        ],
    }


def keypoint_figures(check: LabelCheck) -> list[dict[str, Any]]:
    """Of every keypoint: shares labelled and visible, quartiles of its place in the box, findings that count."""
    people = check.people
    labelled, visible = people.labelled, people.keypoints[..., 2] == 2
    anybody = max(int(labelled.any(axis=1).sum()), 1)
    box = people.bbox_xywh[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        places = np.where(labelled[..., None], (people.keypoints[..., :2] - box[..., :2]) / box[..., 2:], np.nan)
    named = Counter(
        name
        for suspect in check.suspects
        for finding in suspect.findings
        if finding.suspicion >= COUNTED
        for name in finding.keypoints
    )
    rows = []
    for k, name in enumerate(people.keypoint_set.names):
        here = places[np.isfinite(places[:, k]).all(axis=1), k]
        quartiles = np.quantile(here, _QUARTILES, axis=0).round(3).T.tolist() if len(here) else [None, None]
        rows.append(
            {
                "name": name,
                "labelled": round(float(labelled[:, k].sum()) / anybody, 4),
                "visible": round(float(visible[:, k].sum()) / anybody, 4),
                "x": quartiles[0],
                "y": quartiles[1],
                "suspicious": named[name],
            }
        )
    return rows


def label_page(check: LabelCheck, photos: PhotoFolder, *, title: str, facts: Mapping[str, object], top: int) -> str:
    """The page's HTML.

    Args:
        check: the outcome.
        photos: the pictures to draw into.
        title: of the set.
        facts: what was looked at, by name.
        top: suspects to draw.
    """
    figures, counts = keypoint_figures(check), check.counts()
    drawable = [suspect for suspect in check.suspects if suspect.image_id is not None]
    shown = list(itertools.islice(_drawn(check, drawable, photos), top))
    drawn = {id(picture["suspect"]) for picture in shown}
    rest = [s for s in check.suspects if id(s) not in drawn and s.suspicion >= COUNTED]
    return str(
        _template().render(
            title=title,
            tiles=_tiles(check),
            notes=check.notes,
            kinds=[{"name": kind, "count": counts[kind], "meaning": KINDS[kind]} for kind in KINDS if kind in counts],
            counted=COUNTED,
            shown=shown,
            has_model=check.predicted is not None,
            rest=[_row(suspect) for suspect in rest[:LISTED]],
            left_out=len(rest[LISTED:]),
            keypoints=[_figure_row(row) for row in figures],
            crosses=_crosses(figures) if len(figures) <= MOST_CROSSES else [],
            facts=facts,
        )
    )


def _template() -> Any:
    """Whatever a user may have named is escaped, and a value it lacks is an error; the style is the report's."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(charts.__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


def _tiles(check: LabelCheck) -> list[dict[str, str]]:
    people = check.people
    suspicious, labelled = check.num_suspicious(), int(people.labelled.any(axis=1).sum())
    return [
        {
            "name": "suspicious",
            "value": f"{suspicious:,}",
            "note": f"{suspicious / max(len(people), 1):.1%} of the people; pictures are counted too",
        },
        {"name": "people", "value": f"{len(people):,}", "note": f"{labelled:,} of them have labelled keypoints"},
        {"name": "pictures", "value": f"{len(people.pictures):,}", "note": "listed in the labels"},
        {
            "name": "keypoints",
            "value": f"{people.labelled.sum():,}",
            "note": f"labelled, of {len(people.keypoint_set)} a person",
        },
    ]


def _row(suspect: Suspect) -> dict[str, str]:
    why = "; ".join(f"{finding.kind}: {finding.text}" for finding in suspect.findings if finding.suspicion >= 0.2)
    return {
        "annotation": "-" if suspect.annotation_id is None else str(suspect.annotation_id),
        "picture": "-" if suspect.image_id is None else str(suspect.image_id),
        "suspicion": f"{suspect.suspicion:.2f}",
        "why": why,
    }


def _figure_row(row: Mapping[str, Any]) -> dict[str, str]:
    places = {axis: "{0:.2f} - {2:.2f}".format(*row[axis]) if row[axis] else "-" for axis in ("x", "y")}
    shares = {name: f"{row[name]:.0%}" for name in ("labelled", "visible")}
    return {"name": row["name"], **shares, **places, "suspicious": f"{row['suspicious']:,}"}


def _crosses(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines between the quartiles of every keypoint's place, in a box 100 wide and 120 high."""
    found = []
    for row in figures:
        if row["x"]:
            (x0, x, x1), (y0, y, y1) = (100 * np.array(row["x"])).round(1), (120 * np.array(row["y"])).round(1)
            name = str(row["name"])
            side = next((side for side in ("left", "right") if name.lower().startswith(side)), "middle")
            found.append({"x0": x0, "x": x, "x1": x1, "y0": y0, "y": y, "y1": y1, "side": side})
            found[-1]["name"] = name.replace("_", " ").replace("left ", "l. ").replace("right ", "r. ")
    return found


def _drawn(check: LabelCheck, suspects: list[Suspect], photos: PhotoFolder) -> Iterator[dict[str, Any]]:
    """Suspects whose picture can be had, drawn."""
    people = check.people
    rows = {int(annotation_id): row for row, annotation_id in enumerate(people.annotation_id)}
    pictures = {entry.image_id: row for row, entry in enumerate(people.pictures)}
    for suspect in suspects:
        if suspect.suspicion < COUNTED or suspect.image_id not in pictures:
            continue
        image = photos.read(pictures[suspect.image_id])
        if image is None:
            continue
        row = None if suspect.annotation_id is None else rows.get(suspect.annotation_id)
        tile = _tile(image, check, suspect, row, rows)
        jpeg = cv2.imencode(".jpg", tile, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
        who = "" if suspect.annotation_id is None else f"annotation {suspect.annotation_id} of "
        yield {
            "suspect": suspect,
            "uri": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
            "aspect": f"{tile.shape[1] / tile.shape[0]:.4f}",
            "suspicion": f"{suspect.suspicion:.2f}",
            "name": f"{who}picture {suspect.image_id}",
            "kind": suspect.findings[0].kind,
            "text": suspect.findings[0].text,
            "also": [finding.kind for finding in suspect.findings[1:] if finding.suspicion >= COUNTED],
        }


def _tile(
    image: np.ndarray, check: LabelCheck, suspect: Suspect, row: int | None, rows: Mapping[int, int]
) -> np.ndarray:
    """The person cut out, with the labels, rings on the keypoints in question, and the model's pose beside it."""
    people = check.people
    twins = [f.other for f in suspect.findings if f.kind == "duplicate person" and f.other is not None]
    others = [rows[twin] for twin in twins if twin in rows]
    members = np.array(([row] if row is not None else []) + others, dtype=np.int64)
    boxes = [f.bbox_xywh for f in suspect.findings if f.bbox_xywh is not None]
    x0, y0, x1, y1 = _cutout(image, people, members, boxes)
    small = image[y0:y1, x0:x1]
    scale = min(_HEIGHT / small.shape[0], _HEIGHT * _WIDEST / small.shape[1])
    shape = max(1, round(small.shape[1] * scale)), max(1, round(small.shape[0] * scale))
    small = cv2.resize(small, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    offset = np.array([x0, y0])
    points = (people.keypoints[members, :, :2] - offset) * scale
    drawn = draw_poses(small, points, people.keypoints[members, :, 2] / 2, people.keypoint_set, min_score=_ANY_LABEL)
    for x, y, w, h in boxes:
        corners = ((np.array([[x, y], [x + w, y + h]]) - offset) * scale).round().astype(int).tolist()
        cv2.rectangle(drawn, corners[0], corners[1], (200, 0, 200), 2, cv2.LINE_AA)
    names = {name for finding in suspect.findings if finding.suspicion >= COUNTED for name in finding.keypoints}
    if row is not None and len(names) < len(people.keypoint_set):
        for k, name in enumerate(people.keypoint_set.names):
            if name in names and np.abs(points[0, k]).max() < 1e4:
                center = (round(points[0, k, 0]), round(points[0, k, 1]))
                for color, width in ((255, 255, 255), 4), ((200, 0, 200), 2):
                    cv2.circle(drawn, center, _RING, color, width, cv2.LINE_AA)
    if check.predicted is None or row is None:
        return drawn
    seen = (check.predicted[row] - offset) * scale
    known = np.isfinite(seen).all(axis=1)
    model = draw_poses(
        small, np.nan_to_num(seen)[None], known[None].astype(float), people.keypoint_set, min_score=_MIN_SCORE
    )
    return np.hstack([label_picture(model, "model"), label_picture(drawn, "labels")])


def _cutout(
    image: np.ndarray, people: LabelledPeople, members: np.ndarray, boxes: list[tuple[float, float, float, float]]
) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around people, their boxes and further ones; the whole picture where there are none."""
    height, width = image.shape[:2]
    corners = np.concatenate([people.bbox_xywh[members], np.array(boxes).reshape(-1, 4)])
    low, high = extents(people.keypoints[members])
    low = np.concatenate([corners[:, :2], low])
    high = np.concatenate([corners[:, :2] + corners[:, 2:], high])
    known = np.isfinite(low).all(axis=1) & np.isfinite(high).all(axis=1)
    if not known.any():
        return 0, 0, width, height
    first, last = low[known].min(axis=0), high[known].max(axis=0)
    center, half = (first + last) / 2, (last - first) * 0.58 + 4
    half = np.maximum(half, half.max() * 0.45)
    x0, y0 = np.clip(np.floor(center - half), 0, [width - 2, height - 2]).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(center + half), [x0 + 2, y0 + 2], [width, height]).astype(int).tolist()
    return x0, y0, x1, y1
