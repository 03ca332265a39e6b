"""The top-down affine: from a box in an image to a crop and back. Ours and upstream's, number by number.

Frames: *image* is the decoded picture, *crop* is the network's input; coordinates are (x, y) in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

_FRACTION_BITS = 5
_FRACTION_MASK = (1 << _FRACTION_BITS) - 1
_MATRIX_BITS = 10
_INT16 = np.iinfo(np.int16)


def box_to_center_scale(bbox_xyxy: np.ndarray, padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Center and padded size of boxes.

    Args:
        bbox_xyxy: (..., 4) in image pixels.
        padding: crop size over box size.

    Returns: center and scale, both (..., 2) float32.
    """
    box = np.asarray(bbox_xyxy, dtype=np.float32)
    return (box[..., :2] + box[..., 2:]) * np.float32(0.5), (box[..., 2:] - box[..., :2]) * np.float32(padding)


def fix_aspect_ratio(scale: np.ndarray, input_size: tuple[int, int]) -> np.ndarray:
    """Boxes enlarged to the aspect ratio of the crop.

    Args:
        scale: (..., 2) width and height.
        input_size: (width, height) of the crop.

    Returns: (..., 2), dtype of `scale`.
    """
    aspect = input_size[0] / input_size[1]
    width, height = scale[..., 0], scale[..., 1]
    wide = width > height * aspect
    return np.stack([np.where(wide, width, height * aspect), np.where(wide, width / aspect, height)], axis=-1)


def crop_matrix(
    center: np.ndarray, scale: np.ndarray | tuple[float], rotation: float, input_size: tuple[int, int] | np.ndarray
) -> np.ndarray:
    """Affine map from image to crop pixels.

    The middle of the box goes to (width / 2, height / 2) and the middle of its left edge to (0, height / 2); the map is
    a similarity. The points are rounded to float32 first, as the original does.

    Args:
        center: (2,) in image pixels.
        scale: (2,) width and height in image pixels, of the crop's aspect ratio. The height is not looked at.
        rotation: degrees; the left edge's middle lies at center + R (-width / 2, 0), R = [[cos, -sin], [sin, cos]].
        input_size: (width, height) of the crop.

    Returns: (2, 3) float64.
    """
    angle = np.deg2rad(rotation)
    half_width = 0.5 * float(scale[0])
    x, y = float(center[0]), float(center[1])
    source = np.array(
        [[x, y], [x - np.cos(angle) * half_width, y - np.sin(angle) * half_width], [0, 0]], dtype=np.float32
    )
    width, height = float(input_size[0]), float(input_size[1])
    target = np.array([[width * 0.5, height * 0.5], [0, height * 0.5], [0, 0]], dtype=np.float32)
    for points in (source, target):  # third point: a right angle at the second
        along = points[0] - points[1]
        points[2, 0], points[2, 1] = points[1, 0] - along[1], points[1, 1] + along[0]
    return cv2.getAffineTransform(source, target)


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) through an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def crop_to_image(
    keypoints: np.ndarray, center: np.ndarray, scale: np.ndarray, input_size: tuple[int, int]
) -> np.ndarray:
    """Keypoints of unrotated crops, back in image pixels.

    Args:
        keypoints: (N, K, 2) in crop pixels, or (K, 2) of one person.
        center: (N, 2) or (2,), of the crop in image pixels.
        scale: (N, 2) or (2,), width and height of the crop in image pixels after the aspect fix.
        input_size: (width, height) of the crop.

    Returns: the shape of `keypoints`, keypoints / input_size * scale + center - scale / 2.
    """
    center, scale = np.asarray(center)[..., None, :], np.asarray(scale)[..., None, :]
    return keypoints / np.asarray(input_size, dtype=keypoints.dtype) * scale + center - 0.5 * scale


def crop_image(
    image: np.ndarray,
    matrix: np.ndarray,
    input_size: tuple[int, int],
    mirrored: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Bilinear crop with black outside the picture.

    Positions are rounded to 1/32 pixel in integer arithmetic, as `cv2.warpAffine` did up to OpenCV 4.10 (newer ones do
    not round, and differ by up to 4 grey levels from the crops the published models were trained on). That also makes
    the crop of a mirrored picture exact without mirroring it: the integer positions are mirrored.

    Args:
        image: (H, W, C) uint8, never mirrored.
        matrix: (2, 3), from image pixels to crop pixels; from pixels of the mirrored image if `mirrored`.
        input_size: (width, height) of the crop.
        mirrored: cut from the mirrored picture.
        out: (height, width, C) uint8 to write into, by choice.

    Returns: (height, width, C) uint8.
    """
    whole, fraction = _source_positions(matrix, input_size, image.shape[1] if mirrored else None)
    return cv2.remap(image, whole, fraction, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_CONSTANT)


def _source_positions(
    matrix: np.ndarray, input_size: tuple[int, int], mirror_width: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where each crop pixel is read, as `cv2.remap` wants it.

    Returns: whole pixels (height, width, 2) int16, and (height, width) uint16 with the 1/32 pixels of x in the low five
        bits and of y in the next five.
    """
    width, height = input_size
    inverse = cv2.invertAffineTransform(matrix) * (1 << _MATRIX_BITS)
    along = np.rint(inverse[:, :1] * np.arange(width)).astype(np.int32)
    start = np.rint(inverse[:, 1:2] * np.arange(height) + inverse[:, 2:]).astype(np.int32)
    start += 1 << (_MATRIX_BITS - _FRACTION_BITS - 1)
    position = (
        start[:, :, None] + along[:, None, :]
    )  # (2, height, width) 1/1024 pixels; the last five bits do not count
    if mirror_width is not None:
        np.bitwise_and(position[0], -(1 << (_MATRIX_BITS - _FRACTION_BITS)), out=position[0])
        np.subtract((mirror_width - 1) << _MATRIX_BITS, position[0], out=position[0])
    corners = position[:, [0, 0, -1, -1], [0, -1, 0, -1]] >> _MATRIX_BITS
    if corners.min() < _INT16.min or corners.max() > _INT16.max:
        np.clip(position, _INT16.min << _MATRIX_BITS, _INT16.max << _MATRIX_BITS, out=position)
    fraction_x, fraction_y = position.astype(np.uint16)
    fraction_x >>= np.uint16(_MATRIX_BITS - _FRACTION_BITS)
    fraction_x &= np.uint16(_FRACTION_MASK)
    fraction_y &= np.uint16(_FRACTION_MASK << _FRACTION_BITS)
    fraction_y |= fraction_x
    position >>= _MATRIX_BITS
    whole = cv2.merge(list(position.astype(np.int16)))
    return whole, fraction_y
