"""The report of an evaluation: one HTML page that needs nothing beside it, neither file nor network."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import nn

from cigpose.config.outcome import FIGURES
from cigpose.evaluate import charts
from cigpose.evaluate.checkpoint import Evaluation, pictures_of, sample_pictures
from cigpose.evaluate.coco import ScoredPersons, run_parts, score_persons
from cigpose.evaluate.diagnosis import KINDS, Diagnosis, diagnose, side_confusion
from cigpose.evaluate.gallery import choose_persons, image_tile, person_tile
from cigpose.evaluate.groups import Group, measure_groups
from cigpose.evaluate.interventions import intervened_keypoints
from cigpose.evaluate.matches import Matches
from cigpose.evaluate.report import nested, pck
from cigpose.evaluate.robustness import Robustness
from cigpose.evaluate.tables import SAMPLES, MatchTables
from cigpose.files import atomic
from cigpose.keypoints import KeypointSet, parts_with_whole
from cigpose.loader.shards import ShardSet
from cigpose.model.complexity import complexity

TEMPLATE = "report.html.j2"
PERSONS_OF_A_KIND = 4
LARGEST_PICTURES = 2_500_000
"""Bytes of sample pictures in the page; further ones are in the folder of the contact sheets alone."""
CURVE_POINTS = 300
"""Of a training's losses; more are averaged."""

_TILE_HEIGHT = 320
_MIN_SCORE = 0.3
_JPEG_QUALITY = 82


def write_page(
    path: Path,
    evaluation: Evaluation,
    shards: ShardSet,
    *,
    facts: Mapping[str, object],
    loss: Path | None = None,
    validation: Path | None = None,
    model: nn.Module | None = None,
    robustness: Robustness | None = None,
    champion: Mapping[str, Any] | None = None,
) -> Path:
    """Measure what the page shows beyond the figures, draw it, and write it whole.

    Args:
        path: the file.
        evaluation: what was measured.
        shards: the dataset it was measured on; pictures are read from it.
        facts: the protocol, and where data and model come from, by name.
        loss: loss.csv of the training, if there is one.
        validation: validation.csv of the training.
        model: which was measured, so that what its CIM replaced can be marked on the drawn people.
        robustness: what it retains on changed pictures.
        champion: another model's `name`, `metrics` (part -> figure -> value) and, if known, `intervals` (part -> low,
            high) of its AP.

    Raises:
        ValueError: a picture or a table cannot be read.
    """
    config, truth = evaluation.config, evaluation.truth
    keypoints = config.keypoint_set
    scored = score_persons(evaluation.predictions, truth, keypoints, config.evaluate)
    parts = {part: run.matches for part, run in run_parts(scored, truth, keypoints).items()}
    headline = config.evaluate.metric.partition("/")[0]
    main = parts.get(headline) or parts[list(parts)[-1]]
    diagnosis = diagnose(scored, truth, keypoints)
    intervals = _intervals(MatchTables(images=np.array(sorted(truth.images)), parts=parts))
    text = _template().render(
        title=config.name,
        dataset=config.data.val,
        tiles=_tiles(evaluation, intervals),
        parts=_part_rows(evaluation, intervals),
        published=config.published,
        champion=_beside(champion, evaluation, intervals),
        samples=SAMPLES,
        figures=_figure_table(evaluation.metrics),
        pck=pck(evaluation.predictions, truth, keypoints) if config.evaluate.boxes == "ground_truth" else {},
        parts_chart=_chart("Average precision of every part, with intervals", charts.parts_chart(intervals)),
        curves=_curves(parts, list(intervals), main),
        score_chart=_score_chart(evaluation),
        learning=_learning_charts(loss, validation),
        groups=_by_aspect(measure_groups(main, scored, truth, keypoints)),
        headline=headline,
        kinds=KINDS,
        **_mistakes(diagnosis, keypoints),
        confusions=side_confusion(diagnosis, truth, keypoints),
        **_robustness(robustness, headline),
        people=_people(diagnosis, scored, evaluation, shards, model),
        marks=model is not None and evaluation.config.model.head.kind == "cigpose",
        pictures=_pictures(evaluation, shards, config.registry.pictures),
        facts=facts,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)
    return path


def _template() -> Any:
    """The page's template; whatever a user may have named is escaped, and a value it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "words": _words, "percent": _percent}
    return environment.get_template(TEMPLATE)


def _figure(value: float | None) -> str:
    """A figure in 0..1, or a dash where nothing was measured."""
    return f"{value:.3f}" if value is not None and value >= 0 else "-"


def _percent(value: float) -> str:
    """A share; nothing is shown as nothing, and a little is not shown as nothing."""
    return "0" if value == 0 else f"{100 * value:.0f} %" if value >= 0.0095 else "< 1 %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _intervals(tables: MatchTables) -> dict[str, tuple[float, float, float]]:
    """Part -> AP, low, high, of the parts somebody has."""
    return {part: (tables.parts[part].average_precision(), *ends) for part, ends in tables.intervals().items()}


def _tiles(evaluation: Evaluation, intervals: Mapping[str, tuple[float, float, float]]) -> list[dict[str, str]]:
    """What one wants to know first: name, value and a word on it."""
    config, metric = evaluation.config, evaluation.config.evaluate.metric
    part, _, figure = metric.partition("/")
    note = "95 % interval {:.3f} to {:.3f}".format(*intervals[part][1:]) if figure == "AP" and part in intervals else ""
    size = complexity(config)
    width, height = config.model.input_size
    people = len(evaluation.predictions)
    return [
        {"name": metric.replace("_", " "), "value": _figure(evaluation.metrics.get(metric)), "note": note},
        {
            "name": "people predicted",
            "value": f"{people:,}",
            "note": f"{len(evaluation.truth.images):,} pictures, {config.evaluate.boxes.replace('_', ' ')} boxes",
        },
        {
            "name": "parameters",
            "value": f"{size.parameters / 1e6:.1f} M",
            "note": f"{4 * size.parameters / 1e6:.1f} MB; {size.multiply_adds / 1e9:.2f} billion multiply-adds a pass",
        },
        {
            "name": "speed",
            "value": f"{people / max(evaluation.seconds, 1e-9):.3g} / s",
            "note": f"people{' and their mirror images' if config.evaluate.flip_test else ''}, reading included",
        },
        {"name": "input", "value": f"{width} x {height}", "note": f"pixels; {len(config.keypoint_set)} keypoints"},
    ]


def _part_rows(evaluation: Evaluation, intervals: Mapping[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """A row per part: the figures, the interval of the AP, and the published AP where the preset has one."""
    config, rows = evaluation.config, []
    for part, figures in nested(evaluation.metrics).items():
        row: dict[str, Any] = {"name": part, "interval": intervals.get(part, (None, None, None))[1:]}
        row |= {name: figures.get(name) for name in ("AP", "AP50", "AP75", "AR")}
        is_published = config.published is not None and config.evaluate.metric == f"{part}/AP"
        rows.append({**row, "published": config.published.ap / 100 if config.published and is_published else None})
    return rows


def _beside(
    champion: Mapping[str, Any] | None,
    evaluation: Evaluation,
    intervals: Mapping[str, tuple[float, float, float]],
) -> dict[str, Any] | None:
    """This model's AP of every part beside another's, and beside the published one where there is one."""
    if not champion:
        return None
    published = {row["name"]: row["published"] for row in _part_rows(evaluation, intervals)}
    rows = [
        {
            "name": part,
            "ours": evaluation.metrics.get(f"{part}/AP"),
            "interval": intervals.get(part, (None, None, None))[1:],
            "theirs": figures.get("AP"),
            "their_interval": champion.get("intervals", {}).get(part, (None, None)),
            "published": published.get(part),
        }
        for part, figures in champion["metrics"].items()
        if f"{part}/AP" in evaluation.metrics
    ]
    return {"name": champion["name"], "rows": rows}


def _robustness(robustness: Robustness | None, headline: str) -> dict[str, Any]:
    """The table and chart of what is retained; nothing where it was not measured."""
    if robustness is None:
        return {"robustness": None, "severity_chart": None}
    table: dict[str, dict[str, Any]] = {}
    for row in robustness.retained:
        table.setdefault(row.part, {})[row.corruption] = row
    part = headline if headline in table else next(reversed(table))
    clean = next(iter(table[part].values())).clean
    shares = {
        name: [ap / clean if clean > 0 else 0.0 for ap in parts[part]] for name, parts in robustness.by_severity.items()
    }
    text = charts.severity_chart(shares, robustness.severities)
    return {
        "robustness": {"table": table, "names": list(next(iter(table.values()))), "about": robustness},
        "severity_chart": _chart(f"AP of {part} retained by severity of each corruption", text),
    }


def _figure_table(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Every figure there is: a row each, a column per part."""
    table = nested(metrics)
    names = [name for name in FIGURES if any(name in row for row in table.values())]
    names += sorted({name for row in table.values() for name in row} - set(names))
    return {"parts": list(table), "rows": {name: [row.get(name) for row in table.values()] for name in names}}


def _curves(parts: Mapping[str, Matches], measured: Sequence[str], main: Matches) -> list[dict[str, str]]:
    """Precision over recall of the part that models are compared by, and AP by OKS threshold of all that have one."""
    if not main.num_truths.any():
        return []
    text = charts.precision_recall_chart(main.precision(), main.thresholds)
    found = [_chart("Precision over recall at ten OKS thresholds", text)]
    rows = {part: parts[part].precision().mean(axis=1) for part in measured}
    text = charts.threshold_chart(rows, main.thresholds)
    return [*found, _chart("Average precision by OKS threshold, per part", text)]


def _score_chart(evaluation: Evaluation) -> dict[str, str]:
    scores, parts = evaluation.predictions.keypoint_scores, evaluation.config.keypoint_set.parts
    text = charts.score_chart({part: scores[:, list(members)].ravel() for part, members in parts.items()})
    return _chart("Distribution of the keypoint scores, per part", text)


def _learning_charts(loss: Path | None, validation: Path | None) -> list[dict[str, str]]:
    """How the training went, as far as its tables are there."""
    found = []
    if loss is not None and (columns := _columns(loss)).get("step"):
        names = [name for name in columns if name.startswith("loss") and max(columns[name]) > 0]
        curves = {name: (_thinned(columns["step"]), _thinned(columns[name])) for name in names}
        text = charts.curve_chart("Training loss", "step", curves, falling=True)
        found.append(_chart("Losses over the steps of the training", text))
    if validation is not None and (columns := _columns(validation)).get("epoch"):
        names = [name for name in columns if name.endswith("/AP")]
        curves = {name.removesuffix("/AP"): (columns["epoch"], columns[name]) for name in names}
        text = charts.curve_chart("AP on validation", "epoch", curves, falling=False)
        found.append(_chart("Average precision per part over the epochs of the training", text))
    return found


def _columns(table: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers; none if there is no such file.

    Raises:
        ValueError: it is not one.
    """
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    except (TypeError, ValueError) as err:
        raise ValueError(f"{table}: not a table of numbers ({err}). `dvc repro train` writes it.") from err


def _thinned(values: Sequence[float]) -> list[float]:
    return [float(np.mean(some)) for some in np.array_split(values, min(len(values), CURVE_POINTS))]


def _by_aspect(groups: Iterable[Group]) -> dict[str, list[Group]]:
    table: dict[str, list[Group]] = {}
    for group in groups:
        table.setdefault(group.aspect, []).append(group)
    return table


def _mistakes(diagnosis: Diagnosis, keypoints: KeypointSet) -> dict[str, Any]:
    """Kinds of error: charts of the parts and of the body's keypoints, and a table of all keypoints."""
    by_part = {part: diagnosis.shares(members) for part, members in parts_with_whole(keypoints).items()}
    by_part = {part: shares for part, shares in by_part.items() if shares}
    rows = [
        {"name": name, "count": diagnosis.count([k]), "shares": diagnosis.shares([k])}
        for k, name in enumerate(keypoints.names)
    ]
    rows = [row for row in rows if row["count"]]
    body = {keypoints.names[k]: diagnosis.shares([k]) for k in next(iter(keypoints.parts.values()))}
    body = {name: shares for name, shares in body.items() if shares}
    titles = ("Kinds of error, by part", "Kinds of error, keypoints of the body")
    part_kinds, body_kinds = (
        _chart(title, charts.kinds_chart(title, shares)) if shares else None
        for title, shares in zip(titles, (by_part if len(by_part) > 1 else {}, body), strict=True)
    )
    return {
        "part_kinds": part_kinds,
        "body_kinds": body_kinds,
        "keypoints": rows,
        "found_people": len(diagnosis.predicted),
    }


def _people(
    diagnosis: Diagnosis, scored: ScoredPersons, evaluation: Evaluation, shards: ShardSet, model: nn.Module | None
) -> dict[str, list[dict[str, str]]]:
    """The best, median and worst people, drawn; with rings on what was intervened on."""
    truth, keypoints = evaluation.truth, evaluation.config.keypoint_set
    chosen = choose_persons(diagnosis, truth, PERSONS_OF_A_KIND)
    wanted = {int(truth.image_id[person.labelled]) for people in chosen.values() for person in people}
    images = dict(pictures_of(shards, wanted))
    shown: dict[str, list[dict[str, str]]] = {}
    for kind, people in chosen.items():
        shown[kind] = []
        for person in people:
            image_id = int(truth.image_id[person.labelled])
            if image_id not in images:  # left out of the shards when they were written
                continue
            image, row, marked = images[image_id], person.predicted, None
            if model is not None and row is not None:
                found, size = scored.people, evaluation.config.model.input_size
                marked = intervened_keypoints(model, image, found.center[row], found.scale[row], size)
            tile = person_tile(
                *(image, person, scored, truth, keypoints),
                height=_TILE_HEIGHT,
                min_score=_MIN_SCORE,
                intervened=marked,
            )
            says = f"OKS {person.oks:.3f}" if person.predicted is not None else "not found"
            name = f"{says}: person {truth.annotation_id[person.labelled]} of picture {image_id}"
            shown[kind].append(_photo(name, tile, _jpeg(tile)))
    return {kind: people for kind, people in shown.items() if people}


def _pictures(evaluation: Evaluation, shards: ShardSet, count: int) -> list[dict[str, str]]:
    """Pictures spread over the dataset, as many as the page can carry."""
    shown, size = [], 0
    for image_id, image in sample_pictures(shards, count):
        tile = image_tile(
            image,
            image_id,
            evaluation.predictions,
            evaluation.config.keypoint_set,
            truth=evaluation.truth,
            height=_TILE_HEIGHT,
            min_score=_MIN_SCORE,
        )
        jpeg = _jpeg(tile)
        size += len(jpeg)
        if size > LARGEST_PICTURES:
            break
        shown.append(_photo(f"picture {image_id}", tile, jpeg))
    return shown


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()


def _photo(text: str, image: np.ndarray, jpeg: bytes) -> dict[str, str]:
    aspect = f"{image.shape[1] / image.shape[0]:.4f}"
    return {"uri": _uri(jpeg, "image/jpeg"), "text": text, "aspect": aspect}


def _chart(text: str, svg: str) -> dict[str, str]:
    return {"uri": _uri(svg.encode(), "image/svg+xml"), "text": text}


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
