"""An exported network in smaller numbers: float16 for GPUs, int8 for CPUs. Inputs and outputs stay as they are."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def to_float16(path: Path) -> Any:
    """The network with float16 inside.

    Args:
        path: an ONNX file in float32.

    Returns: the `onnx.ModelProto`.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        return convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)


def to_int8(path: Path, pixels: np.ndarray) -> Any:
    """The network with a backbone of int8: 8-bit activations whose ranges are those of the pixels, weights by channel.

    The head stays as it is: a few per cent of the work, whose products of products do not fit 8 bits (measured on the
    quickstart's model: -0.017 whole AP with it, -0.004 without).

    Args:
        path: an ONNX file in float32.
        pixels: its input for some hundred crops, first axis the crops.

    Returns: the `onnx.ModelProto`.

    Raises:
        ValueError: no pixels.
    """
    if not len(pixels):
        raise ValueError("int8: no crops to calibrate with; give some hundred of the training data.")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Crops(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self._feeds = iter([{name: pixels[i : i + 1]} for i in range(len(pixels))])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="cigpose-int8-") as folder, _quiet():
        prepared, result = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        network = onnx.load(str(prepared))
        quantize_static(
            str(prepared),
            str(result),
            Crops(network.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_outside_the_backbone(network.graph),
        )
        return onnx.load(str(result))


def _outside_the_backbone(graph: Any) -> list[str]:
    """Nodes before the first convolution and after the last one, the head's `final_layer`."""
    convolutions = [number for number, node in enumerate(graph.node) if node.op_type == "Conv"]
    last = graph.node[convolutions[-1]]
    after = set(last.output)
    names = [node.name for node in graph.node[: convolutions[0]]]
    for node in graph.node:  # in topological order
        if node is not last and after.intersection(node.input):
            after.update(node.output)
            names.append(node.name)
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
