"""The one letterbox: how an image of any size is fitted into the network's input, and how boxes travel both ways."""

from dataclasses import dataclass

import cv2
import numpy as np

from utils.ops.boxes import Array, clip_boxes

FILL = 114


@dataclass(frozen=True)
class Letterbox:
    """Geometry of one fit. Sizes are (height, width); `ratio` is resized / source per axis; `pad` is (top, left)."""

    source_hw: tuple[int, int]
    target_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    ratio: tuple[float, float]
    pad: tuple[int, int]

    def to_network(self, xyxy: Array) -> Array:
        """Corner boxes in source pixels -> network pixels, [..., 4]."""
        scale, shift = self._vectors(xyxy)
        return xyxy * scale + shift

    def to_source(self, xyxy: Array) -> Array:
        """Corner boxes in network pixels -> source pixels, clipped to the source image, [..., 4]."""
        scale, shift = self._vectors(xyxy)
        return clip_boxes((xyxy - shift) / scale, self.source_hw)

    def _vectors(self, like: Array) -> tuple[Array, Array]:
        (rh, rw), (top, left) = self.ratio, self.pad
        if isinstance(like, np.ndarray):
            return np.array([rw, rh, rw, rh], like.dtype), np.array([left, top, left, top], like.dtype)
        return like.new_tensor([rw, rh, rw, rh]), like.new_tensor([left, top, left, top])


def letterbox_geometry(
    source_hw: tuple[int, int],
    target_hw: tuple[int, int] | int,
    *,
    stride: int = 32,
    auto: bool = False,
    scaleup: bool = True,
) -> Letterbox:
    """Fit `source_hw` into `target_hw` keeping the aspect ratio, centered.

    `auto` shrinks the target to the smallest multiple of `stride` that holds the resized image; without `scaleup`
    images smaller than the target keep their size. No side of the resized image falls below one pixel.
    """
    target = (target_hw, target_hw) if isinstance(target_hw, int) else tuple(target_hw)
    h, w = int(source_hw[0]), int(source_hw[1])
    gain = min(target[0] / h, target[1] / w)
    if not scaleup:
        gain = min(gain, 1.0)
    rh, rw = max(round(h * gain), 1), max(round(w * gain), 1)
    if auto:
        target = (-(-rh // stride) * stride, -(-rw // stride) * stride)
    pad = ((target[0] - rh) // 2, (target[1] - rw) // 2)
    return Letterbox((h, w), (int(target[0]), int(target[1])), (rh, rw), (rh / h, rw / w), pad)


def resize(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Resize HWC to (height, width): area averaging when shrinking, bilinear otherwise."""
    if image.shape[:2] == tuple(hw):
        return image
    shrinks = hw[0] < image.shape[0] or hw[1] < image.shape[1]
    return cv2.resize(image, (hw[1], hw[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def letterbox_image(image: np.ndarray, geometry: Letterbox, fill: int = FILL) -> np.ndarray:
    """Draw HWC `image` as `geometry` says into a new array of its target size; the border is `fill`."""
    channels = image.shape[2:]
    out = np.full((*geometry.target_hw, *channels), fill, image.dtype)
    (top, left), (rh, rw) = geometry.pad, geometry.resized_hw
    resized = resize(image, (rh, rw))
    out[top : top + rh, left : left + rw] = resized.reshape(rh, rw, *channels)
    return out
