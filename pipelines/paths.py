"""Where the stages read and write, below the project's folder; dvc.yaml names the same."""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")
RAW, SHARDS = DATA / "raw", DATA / "shards"
MODEL, REPORT = DATA / "model", DATA / "report"
WEIGHTS = MODEL / "model.safetensors"
METRICS, PARTS_PLOT = DATA / "metrics/evaluate.json", DATA / "plots/parts.csv"
LOSS_PLOT, VALIDATION_PLOT = DATA / "plots/loss.csv", DATA / "plots/validation.csv"
ROBUSTNESS = DATA / "robustness/robustness.json"
ROBUSTNESS_METRICS, ROBUSTNESS_PLOT = DATA / "metrics/robustness.json", DATA / "plots/robustness.csv"
CHAMPION_FIGURES = Path(".runs") / "champion.json"
"""Figures of the present champion, as the registry leaves them for the report: name, metrics, perhaps intervals."""
REGISTERED = DATA / "registered.json"
RUNS = Path(".runs")
"""Work states of trainings, and their records for MLflow; not an output of DVC, which deletes those."""
