"""The course of a training as files: tables for `dvc plots`, one SVG, the figures of `dvc metrics`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from cigpose.config import Config
from cigpose.evaluate.report import nested

Record = Mapping[str, Any]
LOSS_COLUMNS = ("step", "epoch", "lr", "loss", "loss_kpt", "loss_cf", "loss_uncertainty", "acc_pose", "grad_norm")


def write_loss(history: Sequence[Record], path: Path) -> None:
    """loss.csv: losses, accuracy, rate and gradient norm, a row per record."""
    rows = [record for record in history if record["kind"] == "log"]
    _write_csv(path, [name for name in LOSS_COLUMNS if not rows or name in rows[0]], rows)


def write_validation(history: Sequence[Record], metric: str, path: Path) -> None:
    """validation.csv: `AP`, the chosen metric, and the AP and AR of every part, a row per validation."""
    rows = [{**record, "AP": record[metric]} for record in history if record["kind"] == "validation"]
    figures = [name for name in (rows[0] if rows else ()) if name.endswith(("/AP", "/AR"))]
    _write_csv(path, ["epoch", "step", "AP", *figures], rows)


def write_metrics(config: Config, result: Mapping[str, Any], path: Path) -> None:
    """train.json: where the run ended, and the figures of its best epoch by part."""
    logs = [record for record in result["history"] if record["kind"] == "log"]
    best = result["best"]
    values = {
        "epochs": config.train.epochs,
        "steps": result["step"],
        "loss": logs[-1]["loss"],
        "acc_pose": logs[-1]["acc_pose"],
        "best_epoch": best["epoch"],
        "best": nested({name: value for name, value in best["metrics"].items() if name.endswith(("/AP", "/AR"))}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def write_curves(config: Config, history: Sequence[Record], path: Path) -> None:
    """curves.svg: losses, learning rate and AP per part over the steps. Equal histories give equal bytes."""
    logs = [record for record in history if record["kind"] == "log"]
    validations = [record for record in history if record["kind"] == "validation"]
    figures = [name for name in (validations[0] if validations else ()) if name.endswith("/AP")]
    with matplotlib.rc_context({"svg.hashsalt": config.name, "font.size": 9}):
        figure, (losses, rates, scores) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for name in ("loss_kpt", "loss_cf", "loss_uncertainty"):
            _line(losses, logs, name)
        _line(rates, logs, "lr")
        for name in figures:
            _line(scores, validations, name, marker="o")
        losses.set(title="Training loss", yscale="log")
        rates.set(title="Learning rate")
        scores.set(title=f"Validation on {config.data.val}", ylim=(0, 1))
        for axes in (losses, rates, scores):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=8)
        if scores.lines:  # a curve per part leaves no room between them
            scores.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _line(axes: Any, records: Sequence[Record], name: str, **style: Any) -> None:
    points = [(record["step"], record[name]) for record in records if record.get(name, 0) > 0]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, markersize=3, **style)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_text(row[name]) for name in columns])


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
