"""A complete model: everything needed to use it, judge it and make it again, as one MLflow model folder.

README.md                      model card
python_model.py (serving.py)   how it is served; code/cigpose is the library it was registered with
artifacts/model.safetensors    weights (they carry their configuration), params.yaml, model.onnx
artifacts/calibration.json     what its scores mean as probabilities
artifacts/keypoints.json       names, parts, flip pairs, sigmas, skeleton
artifacts/metrics.json         per part, with intervals, data and protocol
artifacts/lineage.json         git and dvc.lock revision, digests of every set of shards;  dvc.lock
artifacts/curves.svg           losses and AP of the training
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import cv2
import mlflow
import pandas
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property
from packaging.requirements import Requirement

import cigpose
from cigpose.config import Config, RenderConfig, public_params
from cigpose.config.schema import to_mapping
from cigpose.deploy.detector import Detector
from cigpose.evaluate.calibration import FILE as CALIBRATION
from cigpose.files.digest import sha256_of
from cigpose.render.scene import render_image
from pipelines.lineage import dataset_facts, digest_of, dvc_hashes, git_revision
from pipelines.paths import SHARDS, WEIGHTS
from pipelines.registry.card import licences
from pipelines.registry.measurement import Measurement
from pipelines.tracking.run import PARAMS, RECORD

DISTRIBUTION = "cigpose-pipelines"


@dataclass(frozen=True, kw_only=True)
class Package:
    """What goes into a registered model."""

    config: Config
    folder: Path
    """data/model: weights, params, the training's record."""
    report: Path
    """data/report."""
    evaluation: Measurement
    lineage: Mapping[str, Any]
    run: Mapping[str, Any]
    """run.json of the training."""
    detector: Path | None = None
    """Finds the people of pictures that come without boxes."""

    def files(self) -> dict[str, Path]:
        """Name -> file, of those that are taken as they are.

        Raises:
            FileNotFoundError: one that a model cannot do without is not there.
        """
        files = {"weights": self.folder / WEIGHTS.name, "onnx": self.report / "model.onnx"}
        for path in (*files.values(), self.folder / PARAMS):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: not found. `dvc repro` makes it.")
        shown = {
            "report": self.report / "report.html",
            "curves": self.folder / RECORD / "curves.svg",
            "calibration": self.report / CALIBRATION,
        }
        return files | {name: path for name, path in shown.items() if path.is_file()}

    def pictures(self) -> list[Path]:
        """Sample predictions."""
        found = [path for path in sorted((self.report / "pictures").glob("*")) if path.suffix in (".jpg", ".png")]
        return found[: self.config.registry.pictures]


def read_lineage(config: Config, root: Path, run: Mapping[str, Any], dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model comes from, as plain values.

    Args:
        config: names the datasets.
        root: the project, with dvc.lock.
        run: run.json of the training; those of earlier versions do not tell of their shards, which are then read.
        dataset: what measurement.json tells of the people of the evaluation.

    Raises:
        FileNotFoundError: shards without an index, where they are needed.
    """
    told = {**run.get("datasets", {}), dataset["name"]: {k: value for k, value in dataset.items() if k != "name"}}
    datasets = {
        name: told.get(name) or dataset_facts(config, name, root / SHARDS)
        for name in dict.fromkeys((*config.data.train, dataset["name"]))
    }
    upstream = {path: md5 for path, md5 in dvc_hashes(root / "dvc.lock").items() if path != "data/registered.json"}
    return {
        "git_revision": run.get("git_revision") or git_revision(root),
        "dvc_lock": digest_of(upstream) if upstream else None,
        "datasets": datasets,
        "licences": licences(config),
        "packages": {name: _version(name) for name in ("torch", "numpy", "opencv-python-headless", DISTRIBUTION)},
    }


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
    for picture in package.pictures():
        shutil.copyfile(picture, staging / "pictures" / picture.name)
    lock = _public_lock(root / "dvc.lock", staging / "dvc.lock")
    files = package.files() | {
        "params": _public_params(package.folder / PARAMS, staging / PARAMS),
        "keypoints": _write(staging / "keypoints.json", dataclasses.asdict(package.config.keypoint_set)),
        "metrics": _write(staging / "metrics.json", package.evaluation.to_json()),
        "lineage": _write(staging / "lineage.json", package.lineage),
        "pictures": staging / "pictures",
        **({"dvc_lock": lock} if lock else {}),
        **({"detector": package.detector} if package.detector else {}),
    }
    with _quiet():
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={name: str(path) for name, path in files.items()},
            code_paths=[str(Path(cigpose.__file__).parent)],
            model_config=to_mapping(package.config.registry.serving),
            signature=SIGNATURE,
            input_example=example(),
            pip_requirements=requirements(),
            mlflow_model=model,
        )
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
    with warnings.catch_warnings(record=True):  # a filter would be set aside by MLflow's own
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


SIGNATURE = ModelSignature(  # of the answer alone: MLflow drops columns that a signature of the request does not name
    outputs=Schema(
        [
            ColSpec(Array(DataType.long), "image_size"),
            ColSpec(DataType.string, "keypoint_set"),
            ColSpec(Array(DataType.string), "names"),
            ColSpec(
                Array(
                    Object(
                        [
                            Property("bbox_xyxy", Array(DataType.double)),
                            Property("score", DataType.double),
                            Property("keypoints", Array(Array(DataType.double))),
                        ]
                    )
                ),
                "persons",
            ),
        ]
    ),
)


def example() -> pandas.DataFrame:
    """A row that the model takes: a rendered person and its box."""
    drawing = RenderConfig(seed=7, num_images=1, image_size=(160, 200), max_persons=1)
    picture, people = render_image(drawing, 0)
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (person["bbox"] for person in people)]
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    return pandas.DataFrame({"image": [jpeg], "boxes": [json.dumps(boxes)]})


def create_logged_model(client: MlflowClient, config: Config, run_id: str) -> str:
    """An empty logged model, the output of a run; `upload` fills it.

    Returns: its id.
    """
    tags = {"preset": config.name, "keypoints": config.keypoint_set.name}
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id, name=_logged_name(config.name), source_run_id=run_id, tags=tags, model_type="pose estimation"
    )
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    return logged.model_id


def upload(client: MlflowClient, package: Package, run_id: str, model_id: str, *, root: Path, staging: Path) -> None:
    """Build the model in the empty folder `staging` and let it be the content of a logged model."""
    description = Model(run_id=run_id, model_id=model_id, model_uuid=model_id)
    folder = staging / "model"
    try:
        build(package, folder, root, description)
        client.log_model_artifacts(model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


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


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1, default=list) + "\n", encoding="utf-8")
    return path


def read_detector(config: Config, root: Path) -> Path | None:
    """The detector of `registry.detector`, once it has been opened.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none.
    """
    return Detector(root / config.registry.detector).path if config.registry.detector else None


def origin_tags(package: Package) -> dict[str, str]:
    """Tags of a version that say what it is and where it comes from."""
    lineage = package.lineage
    tags = {"preset": package.config.name, "keypoints": package.config.keypoint_set.name}
    tags |= {"git.revision": lineage["git_revision"] or "none", "dvc.lock": lineage["dvc_lock"] or "none"}
    if package.detector:
        tags["detector"] = sha256_of(package.detector)
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags
