"""ONNX files, opened by onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cigpose.model.weights import ONNX, refuse_foreign


class MissingPackageError(ModuleNotFoundError, ValueError):
    """A package that only some commands need; both kinds, so that callers who report user errors report it too."""


def open_session(path: Path, threads: int = 0) -> Any:
    """An `onnxruntime.InferenceSession`; several threads may run it at once.

    Args:
        path: the file.
        threads: of one run; 0 leaves onnxruntime the choice.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackageError: onnxruntime is not installed.
        ValueError: it is no ONNX file, or one that onnxruntime cannot run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no ONNX file there.")
    refuse_foreign(path, ONNX)
    try:
        import onnxruntime
    except ModuleNotFoundError as err:
        raise MissingPackageError(
            f"{path}: onnxruntime is not installed, which ONNX files need. Run `pip install onnxruntime`."
        ) from err
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would slow torch's
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's own exceptions have no common base
        reason = str(err).strip().splitlines()[0][:200]
        raise ValueError(f"{path}: onnxruntime cannot load it ({reason}). Copy or export it again.") from err
