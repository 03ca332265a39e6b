from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.config.params_file import write_params
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights
from cigpose.shard.write import write_dataset

SIZE = (160, 120)
PERSONS_PER_IMAGE = (1, 2, 0, 3, 1, 2, 1)


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml, shards of a small validation set, and an untrained model."""

    folder: Path
    config: Config

    @property
    def shards(self) -> Path:
        return self.folder / "data/shards"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "data/model/model.safetensors"


def make_config(**evaluate: Any) -> Config:
    values = load_preset("quickstart").to_mapping()
    values["name"], values["keypoints"], values["train"]["validation"]["metric"] = "tiny", "coco", "body/AP"
    values["model"]["input_size"] = [64, 96]
    values["model"]["backbone"] |= {"widen_factor": 0.125}
    values["model"]["head"] |= {"hidden": 32, "gau_s": 16}
    values["model"]["causal"]["train_top_k"] = 1
    people = {"raw": "people", "reader": "coco", "images": "images.zip", "annotations": "annotations.json"}
    people |= {"ground_truth": True, "detections": "detections.json"}
    values["data"] |= {"render": {}, "datasets": {"people": people}, "train": ["people"], "val": "people"}
    values["data"]["sharding"] = {"images_per_shard": 3, "processes": 1}
    values["evaluate"] |= {"batch": 4, "metric": "body/AP", **evaluate}
    return config_from_mapping(values)


def write_raw(folder: Path) -> None:
    """Pictures of noise with labelled persons, and two detections for each of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations, detections = [], [], []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, persons in enumerate(PERSONS_PER_IMAGE, start=1):
            name = f"{number:012d}.jpg"
            pixels = rng.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
            pixels = cv2.resize(pixels, SIZE, interpolation=cv2.INTER_CUBIC)
            archive.writestr(f"images/{name}", cv2.imencode(".jpg", pixels)[1].tobytes())
            images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            for _ in range(persons):
                left, top = rng.uniform(0, 60, 2).round(1).tolist()
                box = [left, top, 50.0, 55.0]
                points = np.c_[rng.uniform(left, left + 50, 17), rng.uniform(top, top + 55, 17), rng.integers(0, 3, 17)]
                points[:2, 2] = 2
                annotations.append(
                    {"id": 100 + len(annotations), "image_id": number, "category_id": 1, "iscrowd": 0, "area": 1500.0}
                    | {"bbox": box, "keypoints": points.ravel().round(1).tolist()}
                    | {"num_keypoints": int((points[:, 2] > 0).sum())}
                )
                for shift in (0.0, 4.0):
                    moved = [left + shift, top, 50.0, 55.0]
                    row = {"image_id": number, "category_id": 1, "bbox": moved, "score": 0.9 - shift / 10}
                    detections.append(row)
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "detections.json").write_text(json.dumps(detections))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    config = make_config()
    write_raw(folder / "data/raw/people")
    write_dataset(config, "people", folder / "data/raw", folder / "data/shards")
    write_params(config, folder / "params.yaml")
    made = Project(folder, config)
    made.checkpoint.parent.mkdir()
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    save_weights(made.checkpoint, model.state_dict(), config)
    return made
