"""A complete model: everything needed to use it, judge it and make it again, as one MLflow model folder.

README.md                      model card
python_model.py (serving.py)   how it is served; code/cigpose is the library it was registered with
artifacts/model.safetensors    weights (they carry their configuration), params.yaml, model.onnx
artifacts/calibration.json     what its scores mean as probabilities
artifacts/keypoints.json       names, parts, flip pairs, sigmas, skeleton
artifacts/metrics.json         per part, with data and protocol
artifacts/lineage.json         git and dvc.lock revision, digests of every set of shards;  dvc.lock
artifacts/pictures/            sample predictions;  report.html: the page of the evaluation
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model
from packaging.requirements import Requirement

import cigpose
from cigpose.config import Config, public_params
from cigpose.config.schema import to_mapping
from cigpose.deploy.detector import Detector
from cigpose.evaluate.calibration import FILE as CALIBRATION
from cigpose.files.digest import sha256_of
from cigpose.shard.index import read_index
from pipelines.lineage import (
    content_digest,
    digest_of,
    dvc_hashes,
    git_revision,
    shards_digest,
)
from pipelines.paths import MODEL, REPORT, WEIGHTS
from pipelines.registry.versions import Measurement

DISTRIBUTION = "cigpose-pipelines"


@dataclass(frozen=True, kw_only=True)
class Package:
    """What goes into a registered model."""

    config: Config
    weights: Path
    params: Path
    onnx: Path
    evaluation: Measurement
    lineage: Mapping[str, Any]
    pictures: Sequence[Path]
    report: Path | None
    """The page of the evaluation; versions registered before there was one have none."""
    calibration: Path | None
    """What scores mean as probabilities; None where too little was labelled."""
    run: Mapping[str, Any]
    """run.json of the training."""
    detector: Path | None = None
    """Finds the people of pictures that come without boxes."""


def read_lineage(config: Config, root: Path) -> dict[str, Any]:
    """Where a model comes from, as plain values.

    Args:
        config: names the datasets.
        root: the project, with dvc.lock and data/shards.

    Raises:
        FileNotFoundError: shards without an index.
    """
    hashes = dvc_hashes(root / "dvc.lock")
    datasets = {}
    for name in dict.fromkeys((*config.data.train, config.data.val)):
        index = read_index(shards_location(config, name, root))
        datasets[name] = {
            "content": content_digest(index),
            "shards": shards_digest(index),
            "dvc_md5": None if name in config.data.locations else hashes.get(f"data/shards/{name}"),
            "sources": index.sources,
            **{count: getattr(index, count) for count in ("images", "persons", "detections")},
        }
    upstream = {path: md5 for path, md5 in hashes.items() if path != "data/registered.json"}
    return {
        "git_revision": git_revision(root),
        "dvc_lock": digest_of(upstream) if upstream else None,
        "datasets": datasets,
        "packages": {name: _version(name) for name in ("torch", "numpy", "opencv-python-headless", DISTRIBUTION)},
    }


def shards_location(config: Config, dataset: str, root: Path) -> str:
    """Folder or address of a dataset's shards."""
    return config.data.locations.get(dataset) or str(root / "data/shards" / dataset)


def build(package: Package, folder: Path, root: Path, model: Model) -> None:
    """Write the model folder.

    Args:
        package: what to put in.
        folder: made here; must not exist.
        root: the project, whose dvc.lock is kept.
        model: MLflow's description, with the ids of run and logged model.
    """
    staging = folder.with_name(folder.name + "-files")
    (staging / "pictures").mkdir(parents=True)
    for picture in package.pictures:
        shutil.copyfile(picture, staging / "pictures" / picture.name)
    lock = _public_lock(root / "dvc.lock", staging / "dvc.lock")
    files: dict[str, Path] = {
        "weights": package.weights,
        "params": _public_params(package.params, staging / "params.yaml"),
        "onnx": package.onnx,
        "keypoints": _write(staging / "keypoints.json", dataclasses.asdict(package.config.keypoint_set)),
        "metrics": _write(staging / "metrics.json", _metrics(package.evaluation)),
        "lineage": _write(staging / "lineage.json", package.lineage),
        "pictures": staging / "pictures",
        **({"dvc_lock": lock} if lock else {}),
        **({"report": package.report} if package.report else {}),
        **({"detector": package.detector} if package.detector else {}),
        **({"calibration": package.calibration} if package.calibration else {}),
    }
    with _quiet():
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={name: str(path) for name, path in files.items()},
            code_paths=[str(Path(cigpose.__file__).parent)],
            model_config=to_mapping(package.config.registry.serving),
            pip_requirements=requirements(),
            mlflow_model=model,
        )
    (folder / "README.md").write_text(model_card(package), encoding="utf-8")
    shutil.rmtree(staging)


def _public_params(source: Path, target: Path) -> Path:
    """The params of the training without secrets: earlier versions wrote them as they were."""
    values = yaml.safe_load(source.read_text(encoding="utf-8"))
    target.write_text(yaml.safe_dump(public_params(values), sort_keys=False), encoding="utf-8")
    return target


def _public_lock(source: Path, target: Path) -> Path | None:
    """A copy of dvc.lock, whose stages repeat the params they depend on, without secrets; None without one."""
    if not source.is_file():
        return None
    lock = yaml.safe_load(source.read_text(encoding="utf-8"))
    for stage in lock.get("stages", {}).values():
        for params in stage.get("params", {}).values():
            params |= {key: public_params(value, key) for key, value in params.items()}
    target.write_text(yaml.safe_dump(lock, sort_keys=False), encoding="utf-8")
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's advice (type hints, input examples) and its progress bar for every local file."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mlflow\..*")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def log_package(client: MlflowClient, package: Package, run_id: str, folder: Path, root: Path) -> str:
    """Build the model in `folder` and upload it as a logged model of a run.

    Returns: id of the logged model.
    """
    config, experiment_id = package.config, client.get_run(run_id).info.experiment_id
    tags = {"cigpose.preset": config.name, "keypoints": config.keypoint_set.name}
    logged = client.create_logged_model(
        experiment_id, name=_logged_name(config.name), source_run_id=run_id, tags=tags, model_type="pose estimation"
    )
    description = Model(run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id)
    try:
        build(package, folder, root, description)
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return logged.model_id


def _logged_name(name: str) -> str:
    return "".join("-" if character in "/:.%\"'" else character for character in name)


def requirements() -> list[str]:
    """The library's own dependencies and what runs the ONNX file, in the versions at work now."""
    pins = [f"{name}=={_version(name)}" for name in ("mlflow", "onnxruntime")]
    for text in requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            pins.append(f"{requirement.name}=={_version(requirement.name)}")
    return pins


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]  # without the build (torch 2.13.0+cpu): indexes do not know it
    except PackageNotFoundError:
        return None


def _metrics(evaluation: Measurement) -> dict[str, Any]:
    return {
        "metrics": dict(evaluation.metrics),
        "data": evaluation.data,
        "protocol": json.loads(evaluation.protocol),
    }


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1, default=list) + "\n", encoding="utf-8")
    return path


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


def model_card(package: Package) -> str:
    """The README.md of a registered model."""
    config, lineage = package.config, package.lineage
    width, height = config.model.input_size
    head, *rows = figure_rows(package.evaluation.metrics)
    protocol = json.loads(package.evaluation.protocol)
    val = lineage["datasets"][config.data.val]
    boxes = {"ground_truth": "ground-truth boxes", "detections": "detected boxes"}[config.evaluate.boxes]
    datasets = [
        f"| {name} | {'evaluation' if name == config.data.val else 'training'} | {facts['images']} | "
        f"{facts['persons']} | `{facts['content']}` | `{facts['dvc_md5'] or '-'}` |"
        for name, facts in lineage["datasets"].items()
    ]
    lines = [
        f"# {config.name}",
        "",
        f"Top-down pose model ({config.model.head.kind}), {len(config.keypoint_set)} keypoints "
        f"({config.keypoint_set.name}), input {height} x {width} (height x width).",
        "",
        "## Measurement",
        f"On {config.data.val}: {val['images']} images, {val['persons']} persons, {boxes}, flip test "
        f"{'on' if config.evaluate.flip_test else 'off'}, scored by pycocotools.",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Protocol: `{json.dumps(protocol)}`, data `{package.evaluation.data}`.",
        "",
        "## Data",
        "| dataset | for | images | persons | content | DVC md5 |",
        "| --- | --- | --- | --- | --- | --- |",
        *datasets,
        "",
        "## Origin",
        f"Training run `{package.run.get('run_id', '-')}`, epoch {package.run.get('best_epoch', '-')} of "
        f"{package.run.get('epochs', '-')}; git `{lineage['git_revision'] or '-'}`; dvc.lock "
        f"`{lineage['dvc_lock'] or '-'}`. `artifacts/params.yaml` holds every number of it.",
        "",
        *_use(package),
    ]
    return "\n".join(lines)


def _use(package: Package) -> list[str]:
    """The last part of the model card."""
    serving, inside = package.config.registry.serving, package.detector is not None
    without = "the detector inside finds the people" if inside else "the whole picture is one person"
    return [
        "## Use",
        "```python",
        "import mlflow, pandas",
        "",
        f'model = mlflow.pyfunc.load_model("models:/{package.config.registry.model}@champion")',
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
        "## Limits",
        f"It needs a box for each person ({'a' if inside else 'no'} detector inside), expects upright people as in its "
        "training data, and was measured on the set above only.",
        "",
    ]


def make_package(config: Config, root: Path, run_info: Mapping[str, Any], evaluation: Measurement) -> Package:
    """Gather the parts of a complete model.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    report, page = root / REPORT, root / REPORT / "report.html"
    calibration = report / CALIBRATION
    pictures = [path for path in sorted((report / "pictures").glob("*")) if path.suffix in (".jpg", ".png")]
    package = Package(
        config=config,
        weights=root / WEIGHTS,
        params=root / MODEL / "params.yaml",
        onnx=report / "model.onnx",
        evaluation=evaluation,
        lineage=read_lineage(config, root),
        pictures=pictures[: config.registry.pictures],
        report=page if page.is_file() else None,
        calibration=calibration if calibration.is_file() else None,
        run=run_info,
        detector=_detector(config, root),
    )
    for path in (package.weights, package.params, package.onnx):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. `dvc repro` makes it.")
    return package


def _detector(config: Config, root: Path) -> Path | None:
    """The detector of `registry.detector`, once it has been opened.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none.
    """
    return Detector(root / config.registry.detector).path if config.registry.detector else None


def origin_tags(package: Package) -> dict[str, str]:
    """Tags of a version that say where it comes from."""
    lineage = package.lineage
    tags = {f"data.{name}": facts["content"] for name, facts in lineage["datasets"].items()}
    tags |= {"git.revision": lineage["git_revision"] or "none", "dvc.lock": lineage["dvc_lock"] or "none"}
    if package.detector:
        tags["detector"] = sha256_of(package.detector)
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags | {"cigpose.preset": package.config.name, "keypoints": package.config.keypoint_set.name}
