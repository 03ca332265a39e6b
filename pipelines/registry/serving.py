"""The registered model as MLflow loads it: `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow keeps this file with the model ("models from code"), beside the `cigpose` library it was registered with; nothing
is pickled. One row a picture: column `image` (bytes of a JPEG, PNG, WebP or BMP file; base64 in a request) and, if
wanted, column `boxes` ([[x0, y0, x1, y1], ...] in image pixels, or that as JSON text). Without it the detector that was
registered with the model finds the people; without one the whole picture is one person. One answer a row:

    {"image_size": [width, height], "keypoint_set": "coco_wholebody", "names": ["nose", ...],
     "persons": [{"bbox_xyxy": [4], "score": 0.9, "keypoints": [[x, y, score], ...]}, ...]}

What a request may ask for is the model's `model_config` (params.yaml: registry.serving). The model has no MLflow
signature, for MLflow drops columns that a signature does not name, and a misspelt `boxes` with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

SERVER = "mlflow.pyfunc.scoring_server.app"
"""The module in which MLflow's server loads the model."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RefusedError(MlflowException, ValueError):
    """A request that is not answered; the server puts the sentence alone into `message`.

    MLflow would put all of the request before it.
    """

    def __init__(self, sentence: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        super().__init__(sentence, error_code=error_code)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """Body of the server's answer."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class PoseService(PythonModel):
    """Keypoints of the people in encoded pictures."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; they carry their configuration."""
        from cigpose.config import ServingConfig
        from cigpose.config.schema import from_mapping
        from cigpose.deploy.detector import Detector
        from cigpose.deploy.predictor import Predictor

        self._limits = from_mapping(ServingConfig, context.model_config or {}, "model_config")
        detector = context.artifacts.get("detector")
        self._detector = Detector(detector) if detector else None
        self._predictor = Predictor.load(context.artifacts["weights"])
        if SERVER in sys.modules:
            guard_server(self._limits)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # hints would be a schema
        """Answers in the order of the rows (pandas.DataFrame, or a mapping of columns).

        Raises:
            RefusedError: a request that cannot be answered; the message names row and value.
        """
        from cigpose.deploy.request import RequestError, grouped, read_rows

        del context, params
        if not hasattr(model_input, "items"):
            raise RefusedError(f"request: expected rows with a column 'image', got {type(model_input).__name__}.")
        try:
            groups = grouped(read_rows(dict(model_input.items()), self._limits), self._limits.max_megapixels)
            found = [poses for group in groups for poses in self._poses(group)]
        except RequestError as err:
            raise RefusedError(str(err)) from err
        except ValueError as err:  # of the model, not of the request
            raise RefusedError(str(err), INTERNAL_ERROR) from err
        keypoints = self._predictor.keypoint_set
        common = {"keypoint_set": keypoints.name, "names": list(keypoints.names)}
        return [{"image_size": list(poses.image_size), **common, "persons": poses.to_records()} for poses in found]

    def _poses(self, rows: list[Any]) -> list[Any]:
        """Of pictures that may be in memory together; the people of each that the detector is surest of."""
        pictures, boxes = [row.read() for row in rows], [row.boxes for row in rows]
        if self._detector:
            most = self._limits.max_boxes
            boxes = [
                self._detector(picture)[:most] if some is None else some
                for picture, some in zip(pictures, boxes, strict=True)
            ]
        return self._predictor.predict_many(pictures, boxes)


class GuardedBody:
    """ASGI middleware that refuses a body before MLflow reads it: too long, too deep, not rows.

    Args:
        app: what answers the others.
        limits: a `ServingConfig`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Any) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        most, body = int(self._limits.max_request_mb * 1e6), bytearray()
        length = headers.get(b"content-length", "0")
        too_long = length.isdigit() and int(length) > most
        more = not too_long
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return None
            body += message.get("body", b"")
            too_long = len(body) > most
            more = message.get("more_body", False) and not too_long
        if too_long:
            sentence = f"request: more than {most / 1e6:g} MB (registry.serving.max_request_mb). Send less at once."
            return await _refuse(send, 413, RefusedError(sentence))
        if headers.get(b"content-type", "").partition(";")[0].strip() == "application/json":
            from cigpose.deploy.request import RequestError, refuse_body

            try:
                refuse_body(bytes(body), self._limits)
            except RequestError as err:
                return await _refuse(send, 400, RefusedError(str(err)))
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        return await self._app(scope, receive_again, send)


async def _refuse(send: Send, status: int, refused: RefusedError) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]  # what is unsent need not come
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": refused.serialize_as_json().encode()})


def guard_server(limits: Any) -> None:
    """Put `GuardedBody` around the server that MLflow is about to make for this model, and around no other.

    MLflow reads and parses bodies of any size and depth before the model sees them, and has no place for a limit: its
    server loads the model and then makes its FastAPI.
    """
    import fastapi

    make = fastapi.FastAPI

    def make_guarded(*args: Any, **kwargs: Any) -> Any:
        fastapi.FastAPI = make  # type: ignore[misc]
        app = make(*args, **kwargs)
        app.add_middleware(GuardedBody, limits=limits)
        return app

    fastapi.FastAPI = make_guarded  # type: ignore[misc,assignment]


mlflow.models.set_model(PoseService())
