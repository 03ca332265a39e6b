"""The embedded dataset: rendered people with whole-body labels, drawn with NumPy and OpenCV.

    data/raw/<name>/
        images.zip          images/000000000001.jpg ...  (stored, not compressed again)
        annotations.json    COCO-WholeBody format

Picture i of a dataset depends on its `RenderConfig` and on i alone, so the files are the same bytes whatever the number
of processes.
"""

from cigpose.render.dataset import render_dataset
from cigpose.render.scene import render_image

__all__ = ["render_dataset", "render_image"]
