"""What people read about a registered model: its card (README.md), the description of its version, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cigpose.config import Config
from cigpose.download.sources import TABLE
from pipelines.registry.gate import Decision
from pipelines.registry.measurement import Measurement

RENDERED = "rendered by this project, no real person; Apache-2.0 as its code"
UNKNOWN = "data from elsewhere: ask whoever wrote the shards"


def licences(config: Config) -> dict[str, list[str]]:
    """Dataset, `pretrained weights`, `start` (a model started from) -> terms of what it is made of, each once."""
    found = {}
    for name in dict.fromkeys((*config.data.train, config.data.val)):
        dataset = config.data.datasets.get(name)
        raw = dataset.raw if dataset and name not in config.data.locations else None
        files = config.data.download.sources.get(raw, ()) if raw else ()
        terms = [TABLE[file].licence for file in files if file in TABLE]
        found[name] = list(dict.fromkeys(terms)) or [RENDERED if raw in config.data.render else UNKNOWN]
    for what, file in (("pretrained weights", config.model.backbone.pretrained), ("start", config.train.start_from)):
        if file:
            found[what] = [TABLE[file].licence if file in TABLE else UNKNOWN]
    return found


def figure_rows(metrics: Mapping[str, float], figures: Sequence[str] = ("AP", "AP50", "AP75", "AR")) -> list[list[str]]:
    """Rows of text, one a part in the order of `metrics`, under a head; figures that nobody measured are left out."""
    parts: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        part, _, figure = name.rpartition("/")
        parts.setdefault(part, {})[figure] = value
    shown = [figure for figure in figures if any(figure in values for values in parts.values())]
    rows = [["part", *shown]]
    for part, values in parts.items():
        numbers = [values.get(figure) for figure in shown]
        if any(number is not None for number in numbers):
            rows.append([part, *("-" if number is None or number < 0 else f"{number:.3f}" for number in numbers)])
    return rows


def measured_rows(evaluation: Measurement) -> list[list[str]]:
    """`figure_rows`, with the interval of the AP, and what is left of it on spoilt pictures, where these are known."""
    head, *rows = figure_rows(evaluation.metrics)
    if evaluation.intervals:
        head.append("95 % interval of AP")
        for row in rows:
            ends = evaluation.intervals.get(row[0])
            row.append("{:.3f} to {:.3f}".format(*ends) if ends else "-")
    if evaluation.robustness:
        head.append("left on spoilt pictures")
        for row in rows:
            estimate = evaluation.robustness.get(row[0])
            row.append(f"{estimate[0]:.0%}" if estimate else "-")
    return [head, *rows]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def description(evaluation: Measurement, decision: Decision | None) -> str:
    """Of a version, in MLflow: the decision, once there is one, and the headline table."""
    head, *rows = measured_rows(evaluation)
    said = [f"**{decision.verdict.replace('_', ' ')}**: {decision.text}", ""] if decision else []
    sigmas = ["", f"AP with sigmas {evaluation.sigmas}."] if evaluation.sigmas else []
    return "\n".join([*said, *markdown_table(head, rows), *sigmas, ""])


def comparison(decision: Decision) -> list[str]:
    """Lines on how a model stands beside the champion it met."""
    lines = [decision.text, ""]
    if decision.changes:
        head = [
            "part",
            "of",
            "this",
            f"version {decision.champion_version}",
            "95 % interval of the difference",
            "known",
        ]
        rows = [
            [
                change.part,
                "AP" if change.of == "AP" else "share left on spoilt pictures",
                f"{change.ours:.3f}",
                f"{change.theirs:.3f}",
                "{:+.3f} to {:+.3f}".format(*change.interval) if change.interval else "-",
                change.how,
            ]
            for change in decision.changes
        ]
        lines += [*markdown_table(head, rows), ""]
    return lines


def use_and_limits(has_detector: bool) -> list[str]:
    """Lines of the model card on what the model is for."""
    return [
        "## Intended use",
        "Keypoints of people in pictures and videos, for whom a box is given, as far as the terms below allow it. "
        "Not for telling who somebody is, and not where a wrong keypoint does harm without a person looking at it.",
        "",
        "## Limits",
        f"It needs a box for each person ({'a' if has_detector else 'no'} detector inside), expects upright people as "
        "in its training data, and was measured on the set above only: on other pictures it may be worse, on groups of "
        "people that are rare there without anybody having measured it. A keypoint out of sight is a guess.",
        "",
    ]


def how_to_use(config: Config, has_detector: bool) -> list[str]:
    """Lines of the model card for whoever runs the model."""
    serving = config.registry.serving
    without = "the detector inside finds the people" if has_detector else "the whole picture is one person"
    return [
        "## Use",
        f"`cigpose models pull models:/{config.registry.model}@champion DIR`, then `cigpose predict --model DIR "
        "people.jpg`; or",
        "```python",
        "import mlflow, pandas",
        "",
        f'model = mlflow.pyfunc.load_model("models:/{config.registry.model}@champion")',
        'pictures = pandas.DataFrame({"image": [open("people.jpg", "rb").read()], "boxes": [[[10, 20, 200, 460]]]})',
        'model.predict(pictures)[0]["persons"][0]["keypoints"]     # [[x, y, score], ...] in image pixels',
        "```",
        "`image` is the bytes of a picture (JPEG, PNG, WebP, BMP) or their base64, `boxes` one person a box, as lists "
        f"or JSON text; without it {without}. One request holds at most {serving.max_pictures} pictures of "
        f"{serving.max_megapixels:g} megapixels and {serving.max_boxes} boxes; `load_model(..., model_config=...)`, or "
        "SERVING_MODEL_CONFIG for a server, sets other limits.",
        "",
        "`artifacts/model.onnx` is the network alone: normalised crops in, SimCC logits out.",
        "",
    ]


def model_card(
    config: Config,
    evaluation: Measurement,
    lineage: Mapping[str, Any],
    run: Mapping[str, Any],
    decision: Decision,
    *,
    has_detector: bool,
) -> str:
    """The README.md of a registered model."""
    width, height = config.model.input_size
    head, *rows = measured_rows(evaluation)
    protocol = json.loads(evaluation.protocol)
    val = lineage["datasets"][config.data.val]
    start = run.get("start_from")
    boxes = {"ground_truth": "ground-truth boxes", "detections": "detected boxes"}[config.evaluate.boxes]
    datasets = [
        [name, "evaluation" if name == config.data.val else "training", str(facts["images"]), str(facts["persons"]),
         f"`{facts['content']}`", f"`{facts['dvc_md5'] or '-'}`"]
        for name, facts in lineage["datasets"].items()
    ]  # fmt: skip
    lines = [
        f"# {config.name}",
        "",
        f"Top-down pose model ({config.model.head.kind}), {len(config.keypoint_set)} keypoints "
        f"({config.keypoint_set.name}), input {height} x {width} (height x width).",
        "",
        "## Measurement",
        f"On {config.data.val}: {val['images']} images, {val['persons']} persons, {boxes}, flip test "
        f"{'on' if config.evaluate.flip_test else 'off'}, scored by pycocotools with sigmas "
        f"{evaluation.sigmas or config.keypoint_set.sigmas_origin}.",
        "",
        *markdown_table(head, rows),
        "",
        f"Protocol: `{json.dumps(protocol)}`, data `{evaluation.data}`.",
        "",
        "## Beside the champion, when it was registered",
        *comparison(decision),
        *use_and_limits(has_detector),
        "## Licence",
        "The code is Apache-2.0. The weights may be used as far as the terms of what they were made from allow it:",
        "",
        *(f"- {name}: {'; '.join(terms)}" for name, terms in lineage["licences"].items()),
        "",
        "## Data",
        *markdown_table(["dataset", "for", "images", "persons", "content", "DVC md5"], datasets),
        "",
        "## Origin",
        f"Training run `{run.get('run_id', '-')}`, epoch {run.get('best_epoch', '-')} of "
        f"{run.get('epochs', '-')}; git `{lineage['git_revision'] or '-'}`; dvc.lock "
        f"`{lineage['dvc_lock'] or '-'}`. `artifacts/params.yaml` holds every number of it.",
        *(["", "Started from `{from}` (sha256 `{sha256}`): {summary}.".format(**start)] if start else []),
        "",
        *how_to_use(config, has_detector),
    ]
    return "\n".join(lines)
