"""How long a batch of crops takes in each form of the same network: eager, compiled, and exported.

    python tests/benchmarks/bench_latency.py [--presets NAME ...] [--batches 1 8] [--threads 1 2] [--rounds 9]
                                             [--compile] [--folder FOLDER]

From uint8 crops on to logits, normalisation included, with random weights and random crops. All forms take turns within
a round; a cell is the median over the rounds of eager's time over the form's, so that a busy machine slows both. With
one thread the processor's time counts, with more the wall's. Compiling takes minutes, for each batch and thread count.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rounds import timed

from cigpose.config import load_preset
from cigpose.deploy.export import export_onnx
from cigpose.deploy.onnx import OnnxModel
from cigpose.model.estimator import PoseEstimator, build_model, images_for, normalize

Step = Callable[[], object]
EXPORTS = ("float32", "float16", "int8")


def export_all(network: PoseEstimator, folder: Path) -> dict[str, Path]:
    """Each form of a network as a file."""
    width, height = network.config.model.input_size
    crops = torch.randint(0, 256, (4, height, width, 3), dtype=torch.uint8)
    return {
        f"onnxruntime {numbers}": path
        if (path := folder / f"{network.config.name}-{numbers}.onnx").exists()
        else export_onnx(network, network.config, path, numbers=numbers, calibration=[crops], tolerance=1e-2)
        for numbers in EXPORTS
    }


def make_steps(
    network: PoseEstimator, files: dict[str, Path], batch: int, threads: int, compiled: bool
) -> dict[str, Step]:
    """What a round runs, eager first."""
    width, height = network.config.model.input_size
    crops = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    plain = torch.randn(batch, 3, height, width)
    forms: dict[str, Callable] = {name: OnnxModel(path, threads=threads) for name, path in files.items()}
    steps: dict[str, Step] = {
        "eager": lambda: network(images_for(network, crops)),
        "eager, channels-last": lambda: network(normalize(crops)),
        "eager, without normalisation": lambda: network(plain),
    }
    if compiled:
        torch.compiler.reset()
        forms = {"compiled": torch.compile(network, fullgraph=True, dynamic=False), **forms}
    return steps | {name: lambda form=form: form(images_for(network, crops)) for name, form in forms.items()}


@torch.inference_mode()
def report(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Print a table of one network: a row a form, a column for each batch and number of threads."""
    torch.manual_seed(0)
    network = build_model(load_preset(name)).eval()
    with torch.inference_mode(False):
        files = export_all(network, folder)
    columns: dict[str, dict[str, float]] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            times = timed(make_steps(network, files, batch, threads, options.compile), options.rounds, threads=threads)
            eager = times["eager"]
            column = {
                form: statistics.median(a / b for a, b in zip(eager, each, strict=True)) for form, each in times.items()
            } | {"ms of eager": 1e3 * statistics.median(eager)}
            columns[f"batch {batch}, {threads} thread{'s' * (threads > 1)}"] = column
            print(f"{name}, batch {batch}, threads {threads}: {column}", file=sys.stderr, flush=True)
    print(f"\n| {name} | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for form in next(iter(columns.values())):
        print(f"| {form} | " + " | ".join(f"{column[form]:.2f}" for column in columns.values()) + " |", flush=True)


def main() -> None:
    """Print the report of each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["cigpose-m_coco-wholebody_256x192", "cigpose-l_coco-wholebody_384x288"]
    parser.add_argument("--presets", nargs="+", default=default)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="with torch.compile too, which needs a C++ compiler")
    parser.add_argument("--folder", type=Path, help="where exported files are kept for the next time")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__},")
    print(f"onnxruntime {onnxruntime.__version__}, {torch.backends.cpu.get_cpu_capability()}; times faster than eager")
    for name in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            report(name, options, options.folder or Path(folder))


if __name__ == "__main__":
    main()
