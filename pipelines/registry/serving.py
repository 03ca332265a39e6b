"""The registered model as MLflow loads it: `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow keeps this file with the model ("models from code"), beside the `cigpose` library it was registered with; nothing
is pickled. One row a picture: column `image` (bytes of a JPEG, PNG, WebP or BMP file; base64 in a request) and, if
wanted, column `boxes` (JSON text, [[x0, y0, x1, y1], ...] in image pixels; without it the whole picture is one person).
One answer a row:

    {"image_size": [width, height], "keypoint_set": "coco_wholebody", "names": ["nose", ...],
     "persons": [{"bbox_xyxy": [4], "score": 0.9, "keypoints": [[x, y, score], ...]}, ...]}
"""

from __future__ import annotations

import json
import math
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class PoseService(PythonModel):
    """Keypoints of the people in encoded pictures."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; they carry their configuration."""
        from cigpose.deploy.predictor import Predictor

        self._predictor = Predictor.load(context.artifacts["weights"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # hints would be a schema
        """Answers in the order of the rows (pandas.DataFrame).

        Raises:
            ValueError: a row whose picture or boxes cannot be used; the message names it.
        """
        del context, params
        images = list(model_input["image"])
        boxes = list(model_input["boxes"]) if "boxes" in model_input else [None] * len(images)
        return [self._answer(row, *item) for row, item in enumerate(zip(images, boxes, strict=True))]

    def _answer(self, row: int, image: Any, boxes: Any) -> dict[str, Any]:
        try:
            poses = self._predictor(bytes(image), parse_boxes(boxes))
        except ValueError as err:
            raise ValueError(f"row {row}: {err}") from err
        keypoints = self._predictor.keypoint_set
        return {
            "image_size": list(poses.image_size),
            "keypoint_set": keypoints.name,
            "names": list(keypoints.names),
            "persons": poses.to_records(),
        }


def parse_boxes(value: Any) -> Any:
    """Boxes from JSON text; None where a row has none.

    Raises:
        ValueError: it is not JSON.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        return json.loads(value)
    except (TypeError, ValueError) as err:
        raise ValueError(f"boxes: {value!r} is not JSON; expected [[x0, y0, x1, y1], ...].") from err


mlflow.models.set_model(PoseService())
