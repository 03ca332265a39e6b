"""`dvc repro` from nothing to a registered champion on real photographs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from project import make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_real_people_are_learnt_by_heart_from_their_archives_to_a_registered_champion(
    tmp_path: Path, mirror: str
) -> None:
    """COCO-WholeBody as its hosts serve it, and a small model on its few people: their own AP comes near 1."""
    project = make_project(tmp_path)
    small = yaml.safe_load((project.folder / "params.yaml").read_text())
    project.run(sys.executable, "-m", "cigpose.cli.main", "use", "cigpose-m_coco-wholebody_256x192")
    values = yaml.safe_load((project.folder / "params.yaml").read_text())
    values |= {section: small[section] for section in ("model", "augmentation", "train", "evaluate")}
    values["data"]["datasets"]["coco-wholebody-train"]["ground_truth"] = True
    (project.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    still = {"shift_factor": 0.0, "scale_range": [1.0, 1.0], "rotate_degrees": 0.0, "hsv_delta": [0, 0, 0]}
    epochs = 240  # of one step: there are eight people
    project.change(
        data__download__mirror=mirror,
        data__val="coco-wholebody-train",
        augmentation__stage1={**small["augmentation"]["stage1"], **still},
        model__causal__train_top_k=1,  # as many as are replaced at evaluation
        train__epochs=epochs,
        train__schedule={
            "warmup_steps": 50,
            "cosines": [{"begin_epoch": 0, "end_epoch": epochs, "final_factor": 0.01}],
        },
        train__validate_every_epochs=epochs,
        train__checkpoint__every_minutes=10.0,
        train__cluster__num_workers=1,
    )
    project.commit("before")
    project.run("dvc", "repro", timeout_s=900)
    metrics = json.loads((project.folder / "data/metrics/evaluate.json").read_text())
    for part, figures in metrics.items():
        assert figures["AP"] > 0.85, (part, metrics)
    assert metrics["whole"]["AP"] > 0.9
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert (registered["model"], registered["alias"]) == ("cigpose-m-coco-wholebody", "champion")
    val = project.run("cigpose", "evaluate", "--dataset", "coco-wholebody-val", "--boxes", "detections").stdout
    assert "| whole |" in val
