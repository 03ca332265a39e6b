"""Person detectors that can be downloaded: ONNX files of YOLOX's own releases."""

from __future__ import annotations

from collections.abc import Mapping

from cigpose.download.sources import SourceFile

_RELEASE = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/"
_LICENCE = "Apache-2.0, Megvii (github.com/Megvii-BaseDetection/YOLOX); trained on COCO"

DETECTORS: Mapping[str, SourceFile] = {
    "yolox-nano": SourceFile(
        name="yolox_nano.onnx",
        urls=(_RELEASE + "yolox_nano.onnx",),
        licence=_LICENCE,
        bytes=3_659_407,
        sha256="c789161ed43c8269fcd4e67c67eeeb4e80c622da2eb296a20bc6007bd18a0b7d",
    ),
    # Nobody publishes the digest of this one: what comes first is recorded, and checked from then on.
    "yolox-m": SourceFile(
        name="yolox_m.onnx", urls=(_RELEASE + "yolox_m.onnx",), licence=_LICENCE, about_bytes=101_000_000
    ),
}
"""By the names that `cigpose detectors pull` and `cigpose predict --detector` know."""
